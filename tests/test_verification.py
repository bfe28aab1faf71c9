"""What is staged is the base and this checkout's code, and nothing else; and deviations are detected."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CODE_FILES, Malicious, configure, rewrite, stock_model
from safetensors.torch import load_file

from checkpoint_tools.checkout import ROOT, split_class
from checkpoint_tools.model_repo import FILES, check_staged, stage
from checkpoint_tools.push_to_hub import is_ours
from checkpoint_tools.verification import Weights, compare_weights, verify


AUTO_MAP = json.loads((ROOT / "config.json").read_text())["auto_map"]


def sharded(base_dir: Path, path: Path) -> None:
    split_class().from_pretrained(base_dir).to_sam().save_pretrained(path, max_shard_size="20KB")
    (path / "config.json").write_bytes((base_dir / "config.json").read_bytes())


def pickled(base_dir: Path, path: Path) -> None:
    path.mkdir()
    torch.save(load_file(base_dir / "model.safetensors"), path / "pytorch_model.bin")


def split(base_dir: Path, path: Path) -> None:
    split_class().from_pretrained(base_dir).save_pretrained(path)
    for file in CODE_FILES:
        (path / file).write_text("raise RuntimeError('code of the base was run')")


def fused_with_split_configuration(base_dir: Path, path: Path) -> None:
    split_class().from_pretrained(base_dir).save_pretrained(path)
    shutil.copy(base_dir / "model.safetensors", path)


def split_in_half_precision(base_dir: Path, path: Path) -> None:
    split_class().from_pretrained(base_dir, dtype=torch.bfloat16).save_pretrained(path)


@pytest.mark.parametrize(
    "make", [None, sharded, pickled, split, fused_with_split_configuration, split_in_half_precision]
)
def test_staged_from(make, base_dir: Path, tmp_path: Path) -> None:
    """From every kind of base come its weights and this checkout's code, and `verify` finds no fault with it."""
    folder, output = base_dir, tmp_path / "staged"
    if make:
        folder = tmp_path / "made"
        make(base_dir, folder)
        for file in base_dir.glob("*.json"):
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
    output.mkdir()
    stage(folder, output, "5GB")
    assert {path.name for path in output.iterdir()} == CODE_FILES | {
        "LICENSE-code",
        "config.json",
        "processor_config.json",
        "model.safetensors",
    }
    dtype = torch.bfloat16 if make is split_in_half_precision else torch.float32
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {dtype}
    assert all((output / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE_FILES)
    figures = verify(str(output), folder)
    assert figures["num_parameters"] == stock_model().num_parameters()
    assert figures["max_difference"] <= 1e-5


def test_sharded_output(base_dir: Path, tmp_path: Path) -> None:
    stage(base_dir, tmp_path, "20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert all(is_ours(path.name, FILES) for path in tmp_path.iterdir())
    compare_weights(tmp_path, base_dir)


def append(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)  # type: ignore[return-value]


def append_setting(file: str, name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(  # type: ignore[return-value]
        json.dumps({**json.loads((folder / file).read_text()), name: value})
    )


def exchange_q_and_k(weights: dict) -> None:
    q, k = (f"vision_encoder.layers.0.attn.{name}.weight" for name in "qk")
    weights[q], weights[k] = weights[k], weights[q]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: rewrite(folder, exchange_q_and_k), "outputs differ"),
        (
            lambda folder: rewrite(
                folder, lambda weights: weights["mask_decoder.iou_token.weight"].mul_(float("nan"))
            ),
            "outputs differ",
        ),
        # which have no part in the outputs that are compared
        (
            lambda folder: rewrite(folder, lambda weights: weights["prompt_encoder.mask_embed.conv1.bias"].add_(1e-6)),
            "conv1.bias .* differs from the base",
        ),
        (
            lambda folder: rewrite(folder, lambda weights: weights.update(foreign=torch.zeros(1))),
            "unexpected weights: foreign",
        ),
        (
            append("modeling_sam_split.py", "\nimport torch as scipy\nif False:\n    import antigravity, PIL\n"),
            "modeling_sam_split.py imports PIL",
        ),
        (
            lambda folder: configure(folder, "auto_map", {**AUTO_MAP, "AutoModelForMaskGeneration": "another.Model"}),
            "no class of this repo for AutoModelForMaskGeneration",
        ),
        (
            lambda folder: configure(folder, "auto_map", {**AUTO_MAP, "AutoTokenizer": "else/where--code.Tokenizer"}),
            "config.json names code of another repo",
        ),
        (lambda folder: configure(folder, "auto_map", ["modeling_sam_split.SamSplitModel"]), "no class of this repo"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json holds \[\], expected an object"),
        (lambda folder: configure(folder, "custom_pipelines", {"any": {}}), "custom_pipelines, which makes users run"),
        (
            append_setting("processor_config.json", "auto_map", {"AutoProcessor": "code.Processor"}),
            "processor_config.json has auto_map, which makes users run",
        ),
    ],
)
def test_verify_finds(spoil, problem: str, staged_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(staged_dir, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ValueError, match=problem):
        verify(str(folder), base_dir)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (append("conversion_sam_split.py", "\n"), "conversion_sam_split.py differs from this checkout"),
        (lambda folder: (folder / "notes.txt").write_text(""), "Unexpected file notes.txt"),
        (
            lambda folder: (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n"),
            "library_name: transformers, got timm",
        ),
    ],
)
def test_staged_files_are_checked(spoil, problem: str, staged_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(staged_dir, tmp_path / "spoilt")
    check_staged(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=problem):
        check_staged(folder)


def test_no_code_of_pickles_is_run(tmp_path: Path) -> None:
    torch.save(Malicious(), tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="exec was not an allowed global"):
        Weights(tmp_path)
