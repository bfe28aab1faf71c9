"""A model that is changed within a training step, in whatever way, still has the gradients of stock SAM."""

import pytest
import torch
from conftest import assert_same_outputs
from gradient_comparison import (  # noqa: F401
    EXACT,
    Loop,
    Tensors,
    add_hooks,
    copied,
    disturbed,
    gradients,
    inputs,
    joined,
    loss,
    models,
    other_weights,
    parameters_of,
    path,
    split,
    stock_twin,
)
from torch import nn


def replace_weights(model: nn.Module) -> None:
    weights = other_weights(model)
    for name in list(parameters_of(model)):
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, nn.Parameter(weights[name]))


def replace_data(model: nn.Module) -> None:
    weights = other_weights(model)
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # which keep their weight itself for backward, on stock as well
            parameter.data = weights[name]


def overwrite(model: nn.Module) -> None:
    """Changes weights in place, which backward must notice."""
    model.load_state_dict(other_weights(model))


def toggle(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".mlp." in name or ".0.attn." in name:
            parameter.requires_grad_(False)


def toggle_and_back(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.requires_grad_(True)


def other_dtype(model: nn.Module) -> None:
    model.float()
    model.double()


def other_forward(model: nn.Module) -> None:
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        model(pixel_values=image)
    model.eval()
    loss(model(pixel_values=image))
    model.train()


def optimizer_in_backward(model: nn.Module, inputs: Tensors) -> Tensors:
    """Each weight is changed as soon as its gradient is there."""
    rate = 1e-3
    seen = {}
    for name, parameter in parameters_of(model).items():
        optimizer = torch.optim.SGD([parameter], rate, momentum=0.9)

        def step(parameter: nn.Parameter, name: str = name, optimizer: torch.optim.Optimizer = optimizer) -> None:
            seen[name] = parameter.grad.clone()
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        loss(model(**inputs)).backward()
    return joined(seen | {f"{name} after": weight.detach() for name, weight in parameters_of(model).items()})


def hidden_states_between(model: nn.Module, inputs: Tensors) -> Tensors:
    """The first such call makes transformers install hooks."""
    outputs = model(**inputs)
    hidden_states = model(**inputs, output_hidden_states=True).vision_hidden_states
    loss(outputs).backward()
    return {"hidden_states": torch.stack(hidden_states[:3]).detach(), **gradients(parameters_of(model))}


def other_implementation(model: nn.Module, inputs: Tensors) -> Tensors:
    """On stock, it is that of the next model built."""
    outputs = model(**inputs)
    model.set_attn_implementation("eager")
    loss(outputs).backward()
    model.set_attn_implementation("sdpa")
    return gradients(parameters_of(model))


def ema_swap(model: nn.Module, inputs: Tensors) -> Tensors:
    """Weights exchanged with their averages between forward and backward, and back again."""
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        loss(model(**inputs)).backward()
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad()
    parameters = parameters_of(model)
    outputs = model(**inputs)
    for mine, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data, averaged.data = averaged.data, mine.data
    with torch.no_grad():
        averaged_masks = model.eval()(**inputs).pred_masks
    for mine, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data, averaged.data = averaged.data, mine.data
    loss(outputs).backward()
    return {"averaged": averaged_masks, "output": outputs.pred_masks.detach(), **gradients(parameters)}


LOOPS: dict[str, Loop] = {
    "load_state_dict(assign=True)": disturbed(lambda m: m.load_state_dict(other_weights(m), assign=True)),
    "weights replaced": disturbed(replace_weights),
    "weight.data replaced": disturbed(replace_data),
    "optimizer in backward": optimizer_in_backward,
    "output_hidden_states in between": hidden_states_between,
    "requires_grad off": disturbed(toggle),
    "requires_grad off and on": disturbed(toggle_and_back),
    "eval in between": disturbed(nn.Module.eval),
    "no-op hooks in between": disturbed(add_hooks),
    "other dtype and back": disturbed(other_dtype),
    "copies in between": disturbed(copied),
    "other forwards in between": disturbed(other_forward),
    "other implementation in between": other_implementation,
    "zero_grad in between": disturbed(nn.Module.zero_grad),
    "EMA swap": ema_swap,
}


@pytest.mark.parametrize(
    "path, name", [("tiled", name) for name in LOOPS] + [("folded", "weights replaced")], indirect=["path"]
)
def test_equals_stock(name, split, stock_twin, path, inputs):
    expected = LOOPS[name](stock_twin, inputs)
    assert_same_outputs(LOOPS[name](split, inputs), expected, EXACT)


def test_weights_changed_in_place_are_noticed(split, stock_twin, path, inputs):
    for model in (stock_twin, split):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            disturbed(overwrite)(model, inputs)
