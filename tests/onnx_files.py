"""A tiny checkpoint with an adapter, and its ONNX files for each interface, written by the command."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomize
from filelock import FileLock
from onnxruntime import InferenceSession
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, SamConfig, SamModel
from transformers.utils import logging

import convert
from checkpoint_tools.checkout import split_class
from checkpoint_tools.loading import processor_for


SIDE = 64
GRID = 32  # of masks
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]  # not those that tools assume
EXPORTS = {
    "transformers": ("--interface", "transformers", "--adapter", "adapter"),
    "sam": ("--interface", "sam"),
    "sam-fp16": ("--interface", "sam", "--dtype", "float16", "--all-masks"),
    "transformers-js": ("--interface", "transformers-js"),
}


@dataclass
class OnnxFiles:
    """Where the files of each export are, and the models that they were written from."""

    folder: Path
    stock: SamModel
    side: int = SIDE
    grid: int = GRID

    def __getitem__(self, export: str) -> Path:
        """Exports what has not been exported yet, in this process or another."""
        with FileLock(self.folder / f"{export}.lock"):
            if not (self.folder / export).exists():
                run_convert(self.folder, "to-onnx", "stock", export, *EXPORTS[export])
        return self.folder / export

    def adapted(self) -> PreTrainedModel:
        """The split model with the adapter, not merged."""
        base = split_class().from_pretrained(self.folder / "stock")
        return PeftModel.from_pretrained(base, self.folder / "adapter").get_base_model().eval()


def make_checkpoint(folder: Path) -> None:
    """Small, as exporting takes seconds for each layer."""
    vision = {**TINY["vision_config"], "num_hidden_layers": 2, "global_attn_indexes": [1]}
    decoder = {**TINY["mask_decoder_config"], "num_hidden_layers": 1}
    stock = randomize(SamModel(SamConfig(**{**TINY, "vision_config": vision, "mask_decoder_config": decoder}))).eval()
    stock.save_pretrained(folder / "stock")
    processor_for(stock.config, image_mean=MEAN, image_std=STD).save_pretrained(folder / "stock")
    config = LoraConfig(target_modules=["q", "v"], r=2, init_lora_weights=False)
    get_peft_model(split_class().from_pretrained(folder / "stock"), config).save_pretrained(folder / "adapter")


def run_convert(folder: Path, *words: str) -> None:
    """Runs the command in `folder`."""
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["convert.py", *words])
        try:
            convert.main()
        finally:
            logging.set_verbosity(verbosity)


def run(file: Path, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of a file by name."""
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
