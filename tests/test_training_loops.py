"""Whatever a training loop does around the model, gradients are those of stock SAM, or there is an error.

A loop is a function of a model and inputs that returns tensors, and runs with stock SAM and with ours. What LoRA does
on q and v, which stock cannot have, is compared with the chain rule on stock, or with the same step undisturbed.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import assert_same_outputs
from gradient_comparison import (  # noqa: F401
    EXACT,
    Loop,
    Tensors,
    gradients,
    inputs,
    joined,
    loss,
    models,
    other_weights,
    parameters_of,
    path,
    plain,
    split,
    stock_eager,
    stock_twin,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint


def around(context: Callable[[nn.Module], contextlib.AbstractContextManager]) -> Loop:
    """A loop with forward and backward within a context."""

    def loop(model: nn.Module, inputs: Tensors) -> Tensors:
        with context(model):
            return plain(model, inputs)

    return loop


def functional(model: nn.Module, inputs: Tensors) -> Tensors:
    """Other weights than the model's own, through `functional_call`."""
    others = other_weights(model)
    weights = {name: nn.Parameter(others[name]) for name in parameters_of(model)}
    outputs = functional_call(model, weights, kwargs=inputs)
    loss(outputs).backward()
    return {"output": outputs.pred_masks.detach(), **gradients(weights)}


def accumulation(model: nn.Module, inputs: Tensors) -> Tensors:
    """Of four losses, two of which are still open when the others go backward."""
    losses = [loss(model(inputs["pixel_values"] * scale, input_points=inputs["input_points"])) for scale in (1, 2, 3)]
    losses[1].backward()
    (losses[0] + losses[2]).backward()
    loss(model(inputs["pixel_values"].flip(0), input_points=inputs["input_points"])).backward()
    return gradients(parameters_of(model))


def backward_twice(model: nn.Module, inputs: Tensors) -> Tensors:
    outputs = model(**inputs)
    loss(outputs).backward(retain_graph=True)
    (2 * loss(outputs)).backward()
    return gradients(parameters_of(model))


def some_gradients(model: nn.Module, inputs: Tensors) -> Tensors:
    """Of the image, and of the tables alone."""
    image = inputs["pixel_values"].clone().requires_grad_()
    chosen = {name: parameter for name, parameter in model.named_parameters() if "rel_pos" in name}
    grads = torch.autograd.grad(loss(model(**{**inputs, "pixel_values": image})), [image, *chosen.values()])
    return dict(zip(["image", *chosen], grads, strict=True))


def frozen(model: nn.Module, inputs: Tensors) -> Tensors:
    """All but the image, and the tables of one layer."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.attn.rel_pos" in name)
    return some_gradients_of_unfrozen(model, inputs)


def some_gradients_of_unfrozen(model: nn.Module, inputs: Tensors) -> Tensors:
    image = inputs["pixel_values"].clone().requires_grad_()
    loss(model(**{**inputs, "pixel_values": image})).backward()
    return {"image": image.grad, **gradients(parameters_of(model))}


def whole_encoder_checkpointed(model: nn.Module, inputs: Tensors, use_reentrant: bool = False) -> Tensors:
    image = inputs["pixel_values"].clone().requires_grad_()
    embeddings = checkpoint(lambda image: model.vision_encoder(image)[0], image, use_reentrant=use_reentrant)
    loss(model(image_embeddings=embeddings, input_points=inputs["input_points"])).backward()
    return {"image": image.grad, **gradients(parameters_of(model))}


def whole_encoder_checkpointed_reentrant(model: nn.Module, inputs: Tensors) -> Tensors:
    return whole_encoder_checkpointed(model, inputs, use_reentrant=True)


def backward_hooks(model: nn.Module, inputs: Tensors) -> Tensors:
    """What they see, and what they change."""
    seen = {}

    def hook(name: str) -> Callable:
        def look(module, grad_input, grad_output):
            seen[f"{name} in"], seen[f"{name} out"] = grad_input[0].clone(), grad_output[0].clone()
            return (grad_input[0] * 2, *grad_input[1:])

        return look

    for name, module in model.named_modules():
        if name.endswith(("lin2", "neck.conv1", ".proj", ".1", "layer_norm1")) and "vision_encoder.layers" in name:
            module.register_full_backward_hook(hook(name))
    results = plain(model, inputs)
    assert len(seen) == 2 * (3 + 1 + 3 + 3)
    # stock projects the windows one by one, and with their padding
    return results | {name: tensor for name, tensor in seen.items() if ".attn.proj" not in name}


def attention_hooks(model: nn.Module, inputs: Tensors) -> Tensors:
    """They take what stock gives them: the states by name, and so no gradient to change in backward."""

    def scaled(module, args, kwargs):
        return args, {**kwargs, "hidden_states": 2 * kwargs["hidden_states"]}

    for layer in model.vision_encoder.layers:
        layer.attn.register_forward_pre_hook(scaled, with_kwargs=True)
        layer.attn.register_full_backward_hook(lambda module, grad_input, _: tuple(2 * grad for grad in grad_input))
        layer.attn.register_forward_hook(lambda module, args, output: (3 * output[0], output[1]))
    return plain(model, inputs)


def other_windows(model: nn.Module, inputs: Tensors) -> Tensors:
    """A windowed layer made global, a global one windowed, and windows of another side."""
    for layer, side in zip(model.vision_encoder.layers, (0, 5, 4), strict=True):
        layer.window_size = side
    return plain(model, inputs)


def pruned_projections(model: nn.Module, inputs: Tensors) -> Tensors:
    """The same weights as zeros, in three masks or in one."""
    for layer in model.vision_encoder.layers:
        mask = torch.arange(84 * 28).view(84, 28) % 3 > 0
        names = ["qkv"] if hasattr(layer.attn, "qkv") else ["q", "k", "v"]
        for name, part in zip(names, mask.chunk(len(names)), strict=True):
            prune.custom_from_mask(layer.attn.get_submodule(name), "weight", part)
    results = plain(model, inputs)
    model.load_state_dict(model.state_dict())
    return joined({name.replace("weight_orig", "weight"): tensor for name, tensor in results.items()})


def tied_layers(model: nn.Module, inputs: Tensors) -> Tensors:
    layers = model.vision_encoder.layers
    layers[2].attn = layers[0].attn
    layers[2].mlp.lin1.weight = layers[1].mlp.lin1.weight
    return plain(model, inputs)


def from_threads(model: nn.Module, inputs: Tensors) -> Tensors:
    """Two at once on the same weights, as `DataParallel` and Hogwild run them."""
    grads_of: dict[int, Tensors] = {}

    def run(index: int) -> None:
        parameters = parameters_of(model)
        outputs = model(**{name: tensor[index : index + 1] for name, tensor in inputs.items()})
        grads = torch.autograd.grad(loss(outputs), list(parameters.values()), allow_unused=True)
        named = dict(zip(parameters, grads, strict=True)).items()
        grads_of[index] = joined({name: grad for name, grad in named if grad is not None})

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {f"{name} of {index}": tensor for index, tensors in grads_of.items() for name, tensor in tensors.items()}


def replicas(model: nn.Module, inputs: Tensors) -> Tensors:
    """As `torch.nn.parallel.replicate` makes them, which itself asks for GPUs: copies whose weights are no leaves."""

    def replicate(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
        return replica

    total = sum(
        loss(replicate(model)(**{name: tensor[index : index + 1] for name, tensor in inputs.items()}))
        for index in range(2)
    )
    total.backward()
    return gradients(parameters_of(model))


@contextlib.contextmanager
def normed_weights(model: nn.Module) -> Iterator[None]:
    """Parametrizations, kept in a cache during the step."""
    for layer in model.vision_encoder.layers:
        parametrizations.weight_norm(layer.mlp.lin1)
        parametrizations.weight_norm(layer.attn.proj)
    with parametrize.cached():
        yield


@contextlib.contextmanager
def saved_elsewhere(model: nn.Module) -> Iterator[None]:
    """All that backward needs goes through hooks, as with `save_on_cpu`."""
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    assert packed


LOOPS: dict[str, Loop] = {
    "plain": plain,
    "functional_call": functional,
    "accumulation": accumulation,
    "backward twice": backward_twice,
    "some gradients": some_gradients,
    "frozen but for tables": frozen,
    "checkpoint around the encoder": whole_encoder_checkpointed,
    "reentrant checkpoint around the encoder": whole_encoder_checkpointed_reentrant,
    "backward hooks": backward_hooks,
    "hooks on attention": attention_hooks,
    "other windows": other_windows,
    "pruned projections": pruned_projections,
    "tied layers": tied_layers,
    "threads": from_threads,
    "replicas": replicas,
    "weight_norm, cached": around(normed_weights),
    "saved_tensors_hooks": around(saved_elsewhere),
    "save_on_cpu": around(lambda model: torch.autograd.graph.save_on_cpu()),
    "detect_anomaly": around(lambda model: torch.autograd.detect_anomaly(check_nan=True)),
}
# Torch's own operators keep what stock's do.
FOLDED = ["plain", "functional_call", "accumulation", "frozen but for tables", "replicas"]


@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled:UserWarning", "ignore:Full backward hook is firing"
)
@pytest.mark.parametrize(
    "path, name",
    [("tiled", name) for name in LOOPS] + [("folded", name) for name in FOLDED],
    indirect=["path"],
)
def test_equals_stock(name, split, stock_twin, path, inputs):
    expected = LOOPS[name](stock_twin, inputs)
    assert_same_outputs(LOOPS[name](split, inputs), expected, EXACT)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, split, stock_twin, path, inputs):
    expected = frozen(stock_twin, inputs)
    split.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    split.vision_encoder.layers[0].attn.register_forward_hook(lambda *_: calls.append(0))
    assert_same_outputs(frozen(split, inputs), expected, EXACT)
    assert len(calls) == 2, "it was not on"


def test_built_in_inference_mode(models, path, inputs):
    """In training mode. Such weights cannot be trained, on stock neither."""
    expected = models[0](**inputs).pred_masks.detach()
    for model in models:
        with torch.inference_mode():
            built = type(model)(model.config).double().train()
            built.load_state_dict(model.state_dict())
        assert all(parameter.is_inference() for parameter in built.parameters())
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                torch.testing.assert_close(built(**inputs).pred_masks.clone(), expected)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            built(**inputs)
        torch.testing.assert_close(built.requires_grad_(False)(**inputs).pred_masks, expected)


@pytest.mark.parametrize("forward, backward", [(False, True), (True, False), (True, True)])
def test_autocast_around_forward_or_backward_alone(forward, backward, models, path, inputs):
    """No worse than stock, against double precision, in which autocast has no part."""
    reference = plain(copy.deepcopy(models[0]), inputs)
    errors = []
    for model in models:
        model = copy.deepcopy(model).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            total = loss(model(**{name: tensor.float() for name, tensor in inputs.items()}))
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            total.backward()
        actual = gradients(parameters_of(model))
        assert actual.keys() == reference.keys() - {"output", "after"}
        relative = [(actual[n] - reference[n]).norm() / reference[n].norm() for n in actual if reference[n].any()]
        errors.append(torch.stack(relative).mean().item())
    stock, split = errors
    assert 0 < split <= 1.25 * stock


def test_dropout_of_attention(split, stock_eager, inputs, monkeypatch):
    """With `eager`, whose draws can be made the same. Stock's sdpa drops nothing."""

    def dropout(tensor: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(7)) >= p
        return tensor * mask / (1 - p) if training else tensor

    results = []
    split.set_attn_implementation("eager")
    for model in (stock_eager, split):
        without = plain(model, inputs)["output"]
        model.zero_grad()
        for layer in model.vision_encoder.layers:
            layer.attn.dropout = 0.3
        with monkeypatch.context() as context:
            context.setattr(nn.functional, "dropout", dropout)
            results.append(plain(model, inputs))
        assert not torch.allclose(results[-1]["output"], without, rtol=1e-3)
    assert_same_outputs(results[1], results[0], 1e-5)
