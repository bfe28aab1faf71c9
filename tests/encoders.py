"""Stock's encoder and ours with the same weights, and what a loss makes of them."""

import sys
from types import ModuleType

import torch
from conftest import stock_model
from torch import nn

from checkpoint_tools.checkout import split_class


def attention_module() -> ModuleType:
    """attention_sam_split.py, as the models of this process use it."""
    return sys.modules[split_class().__module__.replace("modeling_sam_split", "attention_sam_split")]


def models(**vision) -> tuple[nn.Module, nn.Module]:
    """The stock encoder and ours, with the same weights, in training mode."""
    stock = stock_model(**{key: value for key, value in vision.items() if key != "attention_tile_bytes"})
    config = split_class().config_class.from_sam(stock.config)
    config.vision_config.attention_tile_bytes = vision.get("attention_tile_bytes", 1_000)
    split = split_class()(config)
    split.load_state_dict(stock.state_dict())
    return stock.vision_encoder.train(), split.vision_encoder.train()


def outputs_and_gradients(encoder: nn.Module, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that weighs all outputs differently; gradients of q, k and v as stock's qkv."""
    leaf = pixel_values.clone().requires_grad_()
    encoder.zero_grad()
    output = encoder(leaf).last_hidden_state
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    output.backward(weights.view_as(output))
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    for name in [name for name in grads if ".q." in name]:
        grads[name.replace(".q.", ".qkv.")] = torch.cat([grads.pop(name.replace(".q.", f".{p}.")) for p in "qkv"])
    return {"output": output.detach(), "pixel_values": leaf.grad, **grads}
