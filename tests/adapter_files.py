"""LoRA adapters as training would leave them, and changes of their files."""

import json
from pathlib import Path

import torch
from conftest import randomize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "FEATURE_EXTRACTION", **settings})


def write(model: PreTrainedModel, config: LoraConfig, path: Path, trained: bool = True, dtype=None) -> PeftModel:
    """Saves an adapter of `model` as training would leave it, and returns the model with it."""
    adapted = get_peft_model(model, config).eval()
    if trained:
        randomize(torch.nn.ParameterList(p for p in adapted.parameters() if p.requires_grad), seed=5)
    for parameter in adapted.parameters():
        if dtype is not None and parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(path)
    return adapted


def stored(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


def rewrite(
    path: Path, config: dict | None = None, rename: tuple[str, str] = ("", ""), value=lambda tensor: tensor
) -> None:
    settings, weights = stored(path)
    (path / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}))
    save_file(
        {name.replace(*rename): value(tensor) for name, tensor in weights.items()}, path / "adapter_model.safetensors"
    )
