"""LoRA on q and v, which stock cannot have, trains as the chain rule on stock says, or as undisturbed steps do."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import assert_same_outputs
from gradient_comparison import (  # noqa: F401
    EXACT,
    LORA,
    Tensors,
    adapted,
    adapter_gradients,
    add_hooks,
    copied,
    fill_adapters,
    inputs,
    loss,
    models,
    path,
    plain,
    split,
    stock_twin,
)
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import SamModel


def chain_rule(model: PeftModel, stock: SamModel, inputs: Tensors, scale: float = 1.0) -> Tensors:
    """What `adapter_gradients` must give without dropout: from stock with the adapter, times `scale`, merged."""
    stock = copy.deepcopy(stock)
    factors = {}
    for index, layer in enumerate(stock.vision_encoder.layers):
        attention = model.base_model.model.vision_encoder.layers[index].attn
        for part, weight in zip("qkv", layer.attn.qkv.weight.data.chunk(3), strict=True):
            if part == "k":
                continue
            linear = getattr(attention, part)
            a, b = linear.lora_A["default"].weight.detach(), linear.lora_B["default"].weight.detach()
            factor = scale * linear.scaling["default"]
            weight += factor * b @ a
            factors[index, part] = a, b, factor
    expected = {"output": plain(stock, inputs)["output"]}
    for index, layer in enumerate(stock.vision_encoder.layers):
        for part, grad in zip("qkv", layer.attn.qkv.weight.grad.chunk(3), strict=True):
            if part != "k":
                a, b, factor = factors[index, part]
                name = f"base_model.model.vision_encoder.layers.{index}.attn.{part}.lora_%s.default.weight"
                expected |= {name % "A": factor * b.T @ grad, name % "B": factor * grad @ a.T}
    return expected


@contextlib.contextmanager
def doubled_input(model: nn.Module) -> Iterator[None]:
    """A temporary forward pre-hook on every adapter."""
    handles = [
        module.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        for name, module in model.named_modules()
        if name.endswith("lora_A.default")
    ]
    yield
    for handle in handles:
        handle.remove()


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def scale_layers(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


def test_adapters_train_as_the_chain_rule_says(split, stock_twin, path, inputs):
    model = adapted(split)
    assert_same_outputs(adapter_gradients(model)(inputs), chain_rule(model, stock_twin, inputs), EXACT)


@pytest.mark.parametrize("context, scale", [(rescale_adapter_scale, 0.5), (doubled_input, 2)], ids=["scale", "hook"])
def test_adapters_changed_around_the_forward_alone(context, scale, split, stock_twin, path, inputs):
    model = adapted(split)
    arguments = (model, scale) if context is rescale_adapter_scale else (model,)
    actual = adapter_gradients(model, context=lambda: context(*arguments))(inputs)
    assert_same_outputs(actual, chain_rule(model, stock_twin, inputs, scale), EXACT)


@pytest.mark.parametrize("context, scale", [(rescale_adapter_scale, 0.5), (doubled_input, 2)], ids=["scale", "hook"])
def test_adapters_with_dropout_changed_around_the_forward_alone(context, scale, split, path, inputs):
    """As if they were changed around backward, too."""
    alone, throughout = (adapted(split, dropout=0.5, target_modules=["q", "v", "lin1"]) for _ in range(2))
    arguments = (scale,) if context is rescale_adapter_scale else ()
    actual = adapter_gradients(alone, context=lambda: context(alone, *arguments))(inputs)
    with context(throughout, *arguments):
        expected = adapter_gradients(throughout)(inputs)
    assert_same_outputs(actual, expected, EXACT)


ADAPTER_CHANGES = {
    "Dropout.p": lambda model: set_dropout(model, 0.1),
    "scale_layer": scale_layers,
    "eval": nn.Module.eval,
    "hooks": add_hooks,
    "disable_adapter_layers": lambda model: (model.base_model.disable_adapter_layers(), model.requires_grad_(True)),
    "unload": lambda model: model.unload(),
    "deepcopy": copied,
    "output_hidden_states": lambda model: model(
        pixel_values=torch.randn(1, 3, 64, 64, dtype=torch.float64), output_hidden_states=True
    ),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
@pytest.mark.parametrize("path", ["tiled"], indirect=True)
def test_adapters_changed_between_forward_and_backward(change, split, path, inputs):
    undisturbed, model = (adapted(split, dropout=0.5, target_modules=["q", "v", "lin1"]) for _ in range(2))
    expected = adapter_gradients(undisturbed)(inputs)
    actual = adapter_gradients(model, between=ADAPTER_CHANGES[change])(inputs)
    assert_same_outputs(actual, expected, EXACT)


def test_optimizer_in_backward_of_adapters_with_dropout(split, path, inputs):
    """Ends where a step after backward ends."""
    models = adapted(split, dropout=0.5), adapted(split, dropout=0.5)
    for model, in_backward in zip(models, (True, False), strict=True):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers = {parameter: torch.optim.AdamW([parameter], 1e-2) for parameter in parameters}

        def step(parameter: nn.Parameter, optimizers=optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in parameters if in_backward else ():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(2):
            torch.manual_seed(seed)
            loss(model(**inputs)).backward()
            for parameter in parameters if not in_backward else ():
                step(parameter)
    actual, expected = ({n: p.detach() for n, p in m.named_parameters() if "lora_" in n} for m in models)
    assert_same_outputs(actual, expected, EXACT)
    start = dict(adapted(split).named_parameters())
    assert all((expected[name] - start[name]).abs().max() > 5e-3 for name in expected)


def test_two_adapters_in_one_loss(split, stock_twin, path, inputs):
    model = adapted(split)
    model.add_adapter("other", LoraConfig(**LORA))
    model.double()
    fill_adapters(model, seed=4)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    total = 0
    for name, weight in (("default", 1), ("other", 3)):
        model.set_adapter(name)
        total += weight * loss(model(**inputs))
    for parameter in parameters.values():  # set_adapter freezes the others
        parameter.requires_grad_()
    total.backward()
    actual = {name: parameter.grad for name, parameter in parameters.items()}

    expected = {}
    for name, weight in (("default", 1), ("other", 3)):
        model.zero_grad()
        model.set_adapter(name)
        (weight * loss(model(**inputs))).backward()
        expected |= {n: p.grad.clone() for n, p in parameters.items() if f".{name}." in n}
    assert_same_outputs(actual, expected, EXACT)
    model.set_adapter("default")
    model.zero_grad()
    oracle = chain_rule(model, stock_twin, inputs)
    assert_same_outputs({n: actual[n] for n in oracle if n in actual}, {n: oracle[n] for n in oracle if n in actual})


@pytest.mark.parametrize("target", ["mlp.lin1.weight", "mlp.lin2.weight"])
def test_target_parameters(target, split, stock_twin, path, inputs):
    """Stock has the same adapters."""
    models = [adapted(model, target_modules=[], target_parameters=[target]) for model in (split, stock_twin)]
    actual, expected = (adapter_gradients(model)(inputs) for model in models)
    assert_same_outputs(actual, expected, EXACT)


@pytest.mark.parametrize("path", ["tiled"], indirect=True)
def test_each_image_with_its_own_adapter(split, path, inputs):
    """In one batch, as PEFT's `adapter_names` asks for, `__base__` among them."""
    model = adapted(split)
    model.add_adapter("other", LoraConfig(**LORA))
    model.double().eval()
    fill_adapters(model, seed=4)
    images = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    points = torch.cat([inputs["input_points"], inputs["input_points"][:1]])
    names = ["other", "__base__", "default"]
    actual = model(pixel_values=images, input_points=points, adapter_names=names).pred_masks
    for index, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            one = slice(index, index + 1)
            expected = model(pixel_values=images[one], input_points=points[one]).pred_masks
        torch.testing.assert_close(actual[one], expected, rtol=1e-10, atol=0)
