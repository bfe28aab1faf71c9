"""Every command refuses a checkpoint that lacks weights, and names them: none writes or uses random ones instead."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, rewrite
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SamModel

import app
import demo
import evaluate
import finetune
import segment
import upload
import verify
from checkpoint_tools import meta_layout
from checkpoint_tools.checkout import split_class


# The beginning of the names that are dropped.
PARTS = [
    "mask_decoder.transformer.layers.0.self_attn.q_proj.",
    "mask_decoder.iou_token.",
    "mask_decoder.output_hypernetworks_mlps.3.",
    "mask_decoder.",
    "prompt_encoder.no_mask_embed.",
    "prompt_encoder.mask_embed.",
    "shared_image_embedding.",
    "vision_encoder.pos_embed",
    "vision_encoder.neck.",
    "vision_encoder.layers.1.attn.rel_pos_h",
    "vision_encoder.layers.2.mlp.lin1.bias",
    "vision_encoder.layers.0.layer_norm1.weight",
]
assert len(PARTS) == 12


def without(path: Path, part: str, source: Path) -> Path:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        dropped = [name for name in weights if name.startswith(part)]
        assert dropped
        for name in dropped:
            del weights[name]

    return rewrite(shutil.copytree(source, path), drop)


def lora(model: torch.nn.Module, targets: list[str], path: Path) -> Path:
    config = LoraConfig(target_modules=targets, r=2, task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(stock: SamModel, base_dir: Path, split_dir: Path, tmp_path_factory) -> dict[str, Path]:
    """What the commands need beside the checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(folder / "image.png")
    samed = {f"w_{factor}_{index:03d}": torch.ones(*shape) for index in range(6) for factor, shape in
             (("a", (2, 28)), ("b", (28, 2)))}  # fmt: skip
    torch.save(samed, folder / "samed.pth")
    meta = meta_layout.meta_from_sam(stock)
    for factor, shape in (("a", (2, 28)), ("b", (28, 2))):
        meta[f"image_encoder.blocks.0.attn.qkv.w_{factor}_linear_q.weight"] = torch.ones(*shape)
    torch.save(meta, folder / "micro.pth")
    return {
        "image": folder / "image.png",
        "samed": folder / "samed.pth",
        "micro": folder / "micro.pth",
        "split_adapter": lora(split_class().from_pretrained(split_dir), ["q", "v"], folder / "split"),
        "stock_adapter": lora(randomize(SamModel(stock.config)), ["qkv"], folder / "stock"),
        "split": split_dir,
        "whole": base_dir,
    }


COMMANDS = {
    "convert.py to-sam": "to-sam {base} out",
    "convert.py to-sam --adapter": "to-sam {base} out --adapter {split_adapter}",
    "convert.py to-split": "to-split {base} out",
    "convert.py to-meta": "to-meta {base} out.pth",
    "convert.py to-onnx": "to-onnx {base} out",
    "convert.py adapter-to-fused": "adapter-to-fused {split_adapter} out --base {base}",
    "convert.py adapter-to-split": "adapter-to-split {stock_adapter} out --base {base}",
    "convert.py from-samed": "from-samed {samed} out --base {base}",
    "convert.py from-micro-sam": "from-micro-sam {micro} out --base {base}",
    "upload.py": "--base {base} --output out",
    "verify.py": "{split} --base {base}",
    "verify.py of the repo": "{base} --base {whole}",
    "demo.py": "--base {base} --output out --steps 1",
    "finetune.py": "--base {base} --output out --steps 1",
    "segment.py": "{image} --base {base} --point 3 3 --output out",
    "segment.py --adapter": "{image} --base {base} --adapter {split_adapter} --point 3 3 --output out",
    "evaluate.py": "--model {base} --output out",
    "evaluate.py --adapter": "--adapter {split_adapter} --base {base} --output out",
    "app.py": "--base {base}",
}
MAINS = {
    "app": app.main,
    "evaluate": evaluate.main,
    "upload": upload.main,
    "verify": verify.main,
    "demo": demo.main,
    "finetune": finetune.main,
    "segment": segment.main,
}


def run(command: str, convert: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, arguments: str) -> str:
    """Runs a command that must fail, and returns its message."""
    name = command.split(".py")[0]
    with pytest.raises(SystemExit) as error:
        if name == "convert":
            convert(arguments)
        else:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
            MAINS[name]()
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_incomplete(command, files, base_dir, split_dir, tmp_path, convert, monkeypatch):
    for index, part in enumerate(PARTS):
        of_the_repo = command == "verify.py of the repo"
        base = without(tmp_path / str(index), part, split_dir if of_the_repo else base_dir)
        message = run(command, convert, monkeypatch, COMMANDS[command].format(base=base, **files))
        assert "\n" not in message
        assert re.search(rf"(missing: |lacks ).*{re.escape(part)}", message), message
        assert not [path for path in tmp_path.glob("out*/**/*") if path.is_file()], part


@pytest.mark.slow
def test_incomplete_meta_checkpoints(stock, tmp_path, convert, refused):
    weights = meta_layout.meta_from_sam(stock)
    names = meta_layout.names(stock.config)
    for part in PARTS:
        dropped = {names[name] for name in names if name.startswith(part)}
        torch.save({name: tensor for name, tensor in weights.items() if name not in dropped}, "sam.pth")
        for command in ("from-meta sam.pth out --decoder-heads 2", "from-meta sam.pth out --stock --decoder-heads 2"):
            message = refused(command)
            assert any(name in message for name in dropped), message
        factors = {f"image_encoder.blocks.0.attn.qkv.w_{f}_linear_q.weight": torch.ones(*s) for f, s in
                   (("a", (2, 28)), ("b", (28, 2)))}  # fmt: skip
        torch.save({**{n: t for n, t in weights.items() if n not in dropped}, **factors}, "micro.pth")
        message = refused("from-micro-sam micro.pth out --decoder-heads 2")
        assert any(name in message for name in dropped), message
    assert not list(tmp_path.glob("out*"))


INCOMPLETE_ADAPTERS = {
    "one matrix": lambda name: "layers.0.attn.q.lora_A" in name,
    "the other matrix": lambda name: "layers.2.attn.v.lora_B" in name,
    "a layer": lambda name: "layers.1." in name,
    "a bias of the neck": lambda name: name.endswith("neck.layer_norm1.bias"),
    "a module of the prompt encoder": lambda name: "no_mask_embed" in name,
}


ADAPTED = {
    "convert.py to-sam": "to-sam {split} out --adapter adapter",
    "convert.py adapter-to-fused": "adapter-to-fused adapter out --base {split}",
    "segment.py": "{image} --base {split} --adapter adapter --point 3 3 --output out",
    "evaluate.py": "--adapter adapter --base {split} --output out",
    "app.py": "--base {split} --adapter adapter",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ADAPTED)
def test_incomplete_adapters(command, files, split_dir, tmp_path, convert, monkeypatch):
    """PEFT only warns, or not even that, and initialises what is missing."""

    def message() -> str:
        return run(command, convert, monkeypatch, ADAPTED[command].format(**files))

    config = LoraConfig(target_modules=["q", "v"], r=2, modules_to_save=["neck", "prompt_encoder.no_mask_embed"])
    get_peft_model(split_class().from_pretrained(split_dir), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    for is_dropped in INCOMPLETE_ADAPTERS.values():
        save_file({name: tensor for name, tensor in whole.items() if not is_dropped(name)}, file)
        first = min(name for name in whole if is_dropped(name))
        assert f"lacks {first}" in message()
    save_file({**whole, "base_model.model.vision_encoder.layers.9.attn.q.lora_A.weight": torch.ones(2, 28)}, file)
    assert "no module for base_model.model.vision_encoder.layers.9" in message()


def test_an_adapter_of_the_other_form_is_told_how_to_convert_it(split_dir, files, refused):
    assert "convert.py adapter-to-split" in refused(f"to-sam {split_dir} out --adapter {files['stock_adapter']}")
