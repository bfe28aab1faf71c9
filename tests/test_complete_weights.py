"""A checkpoint gives every weight of the model its value, or an error names those that it does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_holds_weights_of, rewrite, stock_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskGeneration, PreTrainedModel, SamModel

from checkpoint_tools.checkout import split_class


TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
PARTS = [
    "mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
    "mask_decoder.iou_token.weight",
    "mask_decoder.upscale_layer_norm.bias",
    "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.point_embed.1.weight",
    "prompt_encoder.mask_embed.conv1.weight",
    "vision_encoder.neck.conv1.weight",
    "vision_encoder.neck.layer_norm2.bias",
    "vision_encoder.pos_embed",
    "vision_encoder.patch_embed.projection.bias",
    "vision_encoder.layers.0.layer_norm1.weight",
    "vision_encoder.layers.2.mlp.lin2.bias",
    "vision_encoder.layers.1.attn.proj.weight",
    TIED[0],
]


def without(path: Path, name: str, source: Path) -> Path:
    return rewrite(shutil.copytree(source, path), lambda weights: weights.pop(name))


@pytest.mark.parametrize("name", PARTS)
def test_any_missing_weight_is_named(name: str, stock_dir: Path, tmp_path: Path) -> None:
    path = without(tmp_path / "sam", name, stock_dir)
    with pytest.raises(ValueError, match=rf"missing: .*{name}"):
        split_class().from_pretrained(path)


@pytest.mark.parametrize("source", ["stock_dir", "split_dir"])
def test_subclass_names_the_weights_that_checkpoints_lack(source, request, tmp_path):
    """And those that it has no use for. All others are still needed."""

    class WithHead(split_class()):
        _keys_to_ignore_on_load_missing = [r"^head\."]
        _keys_to_ignore_on_load_unexpected = [r"\.attn\.temperature$"]

        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(16, 2)
            self.post_init()

    def add(weights):
        weights["vision_encoder.layers.0.attn.temperature"] = torch.ones(1)

    path = rewrite(shutil.copytree(request.getfixturevalue(source), tmp_path / "sam"), add)
    model = WithHead.from_pretrained(path)
    assert model.head.weight.any()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(WithHead.from_pretrained(tmp_path / "saved").head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"missing: vision_encoder\.neck\.conv1\.weight\."):
        WithHead.from_pretrained(rewrite(path, lambda weights: weights.pop("vision_encoder.neck.conv1.weight")))


ROADS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "AutoModel": lambda path: AutoModel.from_pretrained(path, trust_remote_code=True),
    "mask generation": lambda path: AutoModelForMaskGeneration.from_pretrained(path, trust_remote_code=True),
    "half precision": lambda path: AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float16),
    "device map": lambda path: AutoModel.from_pretrained(path, trust_remote_code=True, device_map="cpu"),
    "loading info": lambda path: AutoModel.from_pretrained(path, trust_remote_code=True, output_loading_info=True),
    "mismatches ignored": lambda path: AutoModel.from_pretrained(
        path, trust_remote_code=True, ignore_mismatched_sizes=True
    ),
    "vision model": lambda path: split_class("SamSplitVisionModel").from_pretrained(path),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["vision_encoder.neck.conv1.weight", "vision_encoder.layers.0.mlp.lin1.weight"])
def test_missing_weights_on_every_road(road: str, name: str, split_dir: Path, tmp_path: Path) -> None:
    path = without(tmp_path / "sam", name, split_dir)
    with pytest.raises(ValueError, match=f"missing: {name}"):
        ROADS[road](path)


def test_missing_weights_in_a_pickle_and_in_memory(stock: SamModel, stock_dir: Path, tmp_path: Path) -> None:
    state_dict = stock.state_dict()
    del state_dict["vision_encoder.neck.conv2.weight"]
    with pytest.raises(ValueError, match=r"missing: vision_encoder\.neck\.conv2\.weight"):
        split_class().from_pretrained(None, config=stock.config, state_dict=dict(state_dict))
    shutil.copy(stock_dir / "config.json", tmp_path)
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing: vision_encoder\.neck\.conv2\.weight"):
        split_class().from_pretrained(tmp_path)


def test_missing_weights_of_the_base_of_an_adapter(load, split_dir: Path, tmp_path: Path) -> None:
    base = without(tmp_path / "base", "mask_decoder.mask_tokens.weight", split_dir)
    adapted = get_peft_model(load(), LoraConfig(target_modules=["q", "v"], task_type="FEATURE_EXTRACTION"))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"missing: mask_decoder\.mask_tokens\.weight"):
        AutoModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True)


@pytest.mark.parametrize("present", TIED)
def test_one_of_tied_weights_is_enough(present: str, stock: SamModel, stock_dir: Path, tmp_path: Path, logged) -> None:
    def keep_one(weights: dict) -> None:
        tensor = weights.pop(TIED[0])
        weights[present] = tensor

    path = rewrite(shutil.copytree(stock_dir, tmp_path / "sam"), keep_one)
    assert_holds_weights_of(split_class().from_pretrained(path), stock)
    assert logged == []


def test_other_shapes_are_both_told(stock_dir: Path, tmp_path: Path) -> None:
    name = "vision_encoder.neck.conv1.weight"
    path = rewrite(
        shutil.copytree(stock_dir, tmp_path / "sam"), lambda weights: weights.update({name: torch.zeros(8, 28, 1, 1)})
    )
    with pytest.raises(ValueError, match=rf"of another shape: {name} \(8, 28, 1, 1\), in the model \(16, 28, 1, 1\)"):
        split_class().from_pretrained(path)
    model, info = split_class().from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {name}
    assert model.vision_encoder.neck.conv1.weight.isfinite().all()
    assert not info["missing_keys"]


def resized(source: Path, path: Path, side: int, **vision) -> Path:
    """A copy whose configuration is for images of `side` pixels."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= {"image_size": side, **vision}
    config["prompt_encoder_config"] |= {"image_size": side, "image_embedding_size": side // 8}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("use_abs_pos", [True, False])
def test_another_image_size_is_named(use_abs_pos: bool, tmp_path: Path) -> None:
    stock_model(use_abs_pos=use_abs_pos).save_pretrained(tmp_path / "stock")
    path = resized(tmp_path / "stock", tmp_path / "sam", 128)
    with pytest.raises(
        ValueError, match="for images of 64 pixels, and the configuration for 128: give image_size=128"
    ):
        split_class().from_pretrained(path)


def test_vision_attention_is_never_initialised_anew(stock_dir: Path, tmp_path: Path) -> None:
    path = resized(stock_dir, tmp_path / "sam", 128)
    with pytest.raises(ValueError, match=r"layers\.1\.attn\.rel_pos_h \(15, 14\), in the model \(31, 14\)"):
        split_class().from_pretrained(path, ignore_mismatched_sizes=True)


def test_without_relative_positions_another_image_size_can_be_asked_for(tmp_path: Path, logged) -> None:
    stock_model(use_rel_pos=False).save_pretrained(tmp_path / "stock")
    path = resized(tmp_path / "stock", tmp_path / "sam", 128)
    model, info = split_class().from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert model.vision_encoder.pos_embed.shape == (1, 16, 16, 28)
    assert {key for key, *_ in info["mismatched_keys"]} == {"vision_encoder.pos_embed"}
    assert not info["missing_keys"], "the tied embedding is not missing"


def test_one_name_in_two_shards(stock_dir: Path, tmp_path: Path) -> None:
    """Of which the last would win, without a word."""
    path = tmp_path / "sam"
    SamModel.from_pretrained(stock_dir).save_pretrained(path, max_shard_size="20KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    name = "vision_encoder.neck.conv1.weight"
    other = next(file for key, file in index["weight_map"].items() if file != index["weight_map"][name])
    from safetensors.torch import load_file

    save_file(load_file(path / other) | {name: torch.zeros(16, 28, 1, 1)}, path / other, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"there twice, in two files, or both fused and separate: {name}"):
        split_class().from_pretrained(path)


@pytest.mark.parametrize(("shape", "named"), [((), "qkv"), ((83, 28), "qkv"), ((84, 28, 1), "q")], ids=str)
def test_fused_weights_that_are_none(shape: tuple[int, ...], named: str, stock_dir: Path, tmp_path: Path) -> None:
    name = "vision_encoder.layers.1.attn.qkv.weight"
    path = rewrite(
        shutil.copytree(stock_dir, tmp_path / "sam"), lambda weights: weights.update({name: torch.zeros(shape)})
    )
    with pytest.raises(ValueError, match=rf"layers\.1\.attn\.{named}\.weight"):
        split_class().from_pretrained(path)
