"""Files of a wrong shape end a command with one line that names the checkpoint, and nothing is written."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Malicious, configure, randomize, rewrite, tiny_config
from safetensors.torch import load_file
from transformers import SamModel

import convert
import segment
import upload
import verify
from checkpoint_tools.checkout import ROOT


COMMANDS = {
    "to-sam": (convert, "to-sam {base} out"),
    "to-split": (convert, "to-split {base} out"),
    "upload": (upload, "--base {base} --output out"),
    "verify": (verify, "{base} --base {whole}"),
    "segment": (segment, f"{ROOT}/docs/images/coins.png --base {{base}} --point 3 3 --output out"),
}


def set_vision(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        configure(folder, "vision_config", {**vision, name: value})

    return change


def write_index(content: Callable[[list[str]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        names = list(load_file(file))
        file.rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content(names)))

    return change


def pickled(content: Callable[[dict], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(content(weights), folder / "pytorch_model.bin")

    return change


WRONG_VALUE = "JSON file there has a wrong value ("
OBJECTS = "The file of weights is damaged, or holds objects, which are code: save it anew as safetensors."
# What is done to a checkpoint, and what is said of it. Half of a line may be the library's.
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "settings that are a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "an activation that does not exist": (set_vision("hidden_act", "nope"), WRONG_VALUE),
    "a quantization that is a number": (lambda folder: configure(folder, "quantization_config", 3), "quantiz"),
    "a quantization": (
        lambda folder: configure(folder, "quantization_config", {"quant_method": "fp8"}),
        "quantiz",
    ),
    "an index that is a list": (write_index(lambda names: []), WRONG_VALUE),
    "an index without a map": (write_index(lambda names: {"metadata": {}}), "wei"),
    "an index of numbers": (write_index(lambda names: {"metadata": {}, "weight_map": dict.fromkeys(names, 3)}), ""),
    "an index without a file": (
        write_index(lambda names: {"metadata": {}, "weight_map": dict.fromkeys(names, "none.safetensors")}),
        "none.safetensors",
    ),
    "a pickle with code": (pickled(lambda weights: {**weights, "x": Malicious()}), OBJECTS),
    "a pickle with an object": (pickled(lambda weights: {**weights, "x": argparse.Namespace()}), OBJECTS),
    "a pickle that is none": (lambda folder: pickled(lambda weights: 0)(folder), ""),
    "more weights": (
        lambda folder: rewrite(folder, lambda weights: weights.update({"loss.weight": torch.zeros(2)})),
        "loss.weight",
    ),
    "two values for one weight": (
        lambda folder: rewrite(
            folder,
            lambda weights: weights.update(
                {
                    "shared_image_embedding.positional_embedding": torch.ones(2, 8),
                    "prompt_encoder.shared_embedding.positional_embedding": torch.zeros(2, 8),
                }
            ),
        ),
        "",
    ),
    "no weights": (lambda folder: rewrite(folder, lambda weights: weights.clear()), "[...]"),
}
ANY = ("verify", "segment")  # which may find something else first
NOT_TESTED = {
    ("segment", "more weights"): "They are not used.",
    ("segment", "two values for one weight"): "One of them is not used.",
    ("segment", "a quantization"): "It may be what is in the files.",
    ("upload", "two values for one weight"): "Its verification finds them, in some seconds.",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CASES)
def test_one_line(command, case, base_dir, split_dir, tmp_path, monkeypatch, capsys):
    change, message = CASES[case]
    source = split_dir if command == "verify" else base_dir
    change(shutil.copytree(source, tmp_path / "base"))
    module, arguments = COMMANDS[command]
    values = arguments.format(base=tmp_path / "base", whole=base_dir).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *values])
    if (command, case) in NOT_TESTED:
        pytest.skip(NOT_TESTED[command, case])
    with pytest.raises(SystemExit) as caught:
        module.main()
    line = str(caught.value.code)
    assert "\n" not in line
    assert len(line) < 1300
    assert "weights_only" not in line
    if command not in ANY:
        assert message in line
    assert not (tmp_path / "out").exists()


def test_a_processor_for_other_images_is_told(base_dir, tmp_path, convert):
    config = tiny_config(image_size=32)
    config.prompt_encoder_config.image_size, config.prompt_encoder_config.image_embedding_size = 32, 4
    randomize(SamModel(config)).save_pretrained(tmp_path / "small")
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (base_dir / name).exists():
            shutil.copy(base_dir / name, tmp_path / "small")
    assert "The processor makes images of 64 pixels, and the model takes 32" in convert("to-split small out")
    assert "The processor makes images" not in convert(f"to-split {base_dir} whole")


def test_a_processor_of_another_class(split_dir, base_dir, tmp_path, monkeypatch):
    shutil.copytree(split_dir, tmp_path / "repo")
    file = tmp_path / "repo" / "processor_config.json"
    file.write_text(json.dumps({"image_processor": {"image_processor_type": "SamImageProcessor"}}))
    monkeypatch.setattr(sys, "argv", ["verify.py", str(tmp_path / "repo"), "--base", str(base_dir)])
    with pytest.raises(
        SystemExit, match=r"processor_config\.json gives a SamImageProcessor\w*, expected a SamProcessor"
    ):
        verify.main()
