"""Whatever a training loop does around the model, gradients are those of stock SAM, or there is an error.

A loop is a function of a model and inputs that returns tensors, and runs with stock SAM and with ours. What LoRA does
on q and v, which stock cannot have, is compared with the chain rule on stock, or with the same step undisturbed.
"""

import contextlib
import copy
import itertools
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import assert_same_outputs, randomize, stock_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, SamModel


Tensors = dict[str, torch.Tensor]
Loop = Callable[[nn.Module, Tensors], Tensors]
EXACT = 1e-10  # in double precision, where all loops run
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "task_type": "FEATURE_EXTRACTION"}


@pytest.fixture(scope="module")
def models(stock, split_dir) -> tuple[SamModel, nn.Module]:
    """Stock SAM and ours with the same weights, in training mode. Shared: tests take copies."""
    split = AutoModel.from_pretrained(split_dir, trust_remote_code=True)
    return copy.deepcopy(stock).double().train(), split.double().train()


@pytest.fixture(params=["tiled", "folded"])
def path(request, monkeypatch, models) -> str:
    """The path that attention takes, on this device or another."""
    module = sys.modules[type(models[1]).__module__.replace("modeling_sam_split", "attention_sam_split")]
    monkeypatch.setattr(module, "attention_path", lambda query: request.param)
    return request.param


@pytest.fixture
def stock_twin(models) -> SamModel:
    return copy.deepcopy(models[0])


@pytest.fixture
def stock_eager(stock_dir) -> SamModel:
    """Stock SAM cannot be switched afterwards."""
    return SamModel.from_pretrained(stock_dir, attn_implementation="eager").double().train()


@pytest.fixture
def split(models) -> nn.Module:
    return copy.deepcopy(models[1])


@pytest.fixture
def inputs(inputs) -> Tensors:
    return {name: tensor.double() for name, tensor in inputs.items()}


def loss(outputs) -> torch.Tensor:
    """Weighs all outputs differently."""
    return sum(
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()
        for output in (outputs.pred_masks, outputs.iou_scores)
    )


def joined(tensors: Tensors, dim: int = 0) -> Tensors:
    """Those of q, k and v as one, as stock's qkv has them. A bias of keys alone has none but noise."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("k_proj.bias")}
    for name in [name for name in found if ".attn.q." in name]:
        parts = [found.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        found[name.replace(".q.", ".qkv.")] = torch.cat(parts, dim)
    return found


def gradients(parameters: dict[str, nn.Parameter]) -> Tensors:
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert any(".attn." in name or ".mlp." in name for name in found)
    return joined(found)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def other_weights(model: nn.Module, seed: int = 5) -> Tensors:
    """A state dict for `model`, the same for stock and ours."""
    stock = randomize(SamModel(model.config if isinstance(model, SamModel) else stock_model().config), seed).double()
    weights = stock.state_dict()
    if "vision_encoder.layers.0.attn.q.weight" in model.state_dict():
        for name in [name for name in weights if ".qkv." in name]:
            parts = weights.pop(name).chunk(3)
            weights.update({name.replace(".qkv.", f".{p}."): w.clone() for p, w in zip("qkv", parts, strict=True)})
    return weights


def disturbed(between: Callable[[nn.Module], object]) -> Loop:
    """A loop that calls `between` with the model, between forward and backward, and then looks at the model again."""

    def loop(model: nn.Module, inputs: Tensors) -> Tensors:
        parameters = parameters_of(model)
        outputs = model(**inputs)
        between(model)
        loss(outputs).backward()
        with torch.no_grad():
            after = model(**inputs).pred_masks
        return {"output": outputs.pred_masks.detach(), "after": after, **gradients(parameters)}

    return loop


def around(context: Callable[[nn.Module], contextlib.AbstractContextManager]) -> Loop:
    """A loop with forward and backward within a context."""

    def loop(model: nn.Module, inputs: Tensors) -> Tensors:
        with context(model):
            return plain(model, inputs)

    return loop


plain = disturbed(lambda model: None)


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


def add_hooks(model: nn.Module) -> None:
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_forward_hook(lambda module, args, output: None)


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


def copied(model: nn.Module) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize(other)
        other.zero_grad()


def other_forward(model: nn.Module) -> None:
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        model(pixel_values=image)
    model.eval()
    loss(model(pixel_values=image))
    model.train()


def functional(model: nn.Module, inputs: Tensors) -> Tensors:
    """Other weights than the model's own, through `functional_call`."""
    others = other_weights(model)
    weights = {name: nn.Parameter(others[name]) for name in parameters_of(model)}
    outputs = functional_call(model, weights, kwargs=inputs)
    loss(outputs).backward()
    return {"output": outputs.pred_masks.detach(), **gradients(weights)}


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
    found = torch.autograd.grad(loss(model(**{**inputs, "pixel_values": image})), [image, *chosen.values()])
    return dict(zip(["image", *chosen], found, strict=True))


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
    found = plain(model, inputs)
    assert len(seen) == 2 * (3 + 1 + 3 + 3)
    # stock projects the windows one by one, and with their padding
    return found | {name: tensor for name, tensor in seen.items() if ".attn.proj" not in name}


def tied_layers(model: nn.Module, inputs: Tensors) -> Tensors:
    layers = model.vision_encoder.layers
    layers[2].attn = layers[0].attn
    layers[2].mlp.lin1.weight = layers[1].mlp.lin1.weight
    return plain(model, inputs)


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


def from_threads(model: nn.Module, inputs: Tensors) -> Tensors:
    """Two at once on the same weights, as `DataParallel` and Hogwild run them."""
    found: dict[int, Tensors] = {}

    def run(index: int) -> None:
        parameters = parameters_of(model)
        outputs = model(**{name: tensor[index : index + 1] for name, tensor in inputs.items()})
        grads = torch.autograd.grad(loss(outputs), list(parameters.values()), allow_unused=True)
        named = dict(zip(parameters, grads, strict=True)).items()
        found[index] = joined({name: grad for name, grad in named if grad is not None})

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {f"{name} of {index}": tensor for index, tensors in found.items() for name, tensor in tensors.items()}


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
    "accumulation": accumulation,
    "backward twice": backward_twice,
    "some gradients": some_gradients,
    "frozen but for tables": frozen,
    "checkpoint around the encoder": whole_encoder_checkpointed,
    "reentrant checkpoint around the encoder": whole_encoder_checkpointed_reentrant,
    "backward hooks": backward_hooks,
    "tied layers": tied_layers,
    "EMA swap": ema_swap,
    "threads": from_threads,
    "replicas": replicas,
    "weight_norm, cached": around(normed_weights),
    "saved_tensors_hooks": around(saved_elsewhere),
    "save_on_cpu": around(lambda model: torch.autograd.graph.save_on_cpu()),
    "detect_anomaly": around(lambda model: torch.autograd.detect_anomaly(check_nan=True)),
}

# Torch's own operators keep what stock's do.
FOLDED = ["plain", "functional_call", "weights replaced", "accumulation", "frozen but for tables", "replicas"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize(
    "path, name",
    [("tiled", name) for name in LOOPS] + [("folded", name) for name in FOLDED],
    indirect=["path"],
)
def test_equals_stock(name, split, stock_twin, path, inputs):
    expected = LOOPS[name](stock_twin, inputs)
    assert_same_outputs(LOOPS[name](split, inputs), expected, EXACT)


def test_weights_changed_in_place_are_noticed(split, stock_twin, path, inputs):
    for model in (stock_twin, split):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            disturbed(overwrite)(model, inputs)


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
        found = gradients(parameters_of(model))
        assert found.keys() == reference.keys() - {"output", "after"}
        relative = [(found[n] - reference[n]).norm() / reference[n].norm() for n in found if reference[n].any()]
        errors.append(torch.stack(relative).mean().item())
    stock, split = errors
    assert 0 < split <= 1.25 * stock


def test_dropout_of_attention(split, stock_eager, inputs, monkeypatch):
    """With `eager`, whose draws can be made the same. Stock's sdpa drops nothing."""

    def dropout(tensor: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(7)) >= p
        return tensor * mask / (1 - p) if training else tensor

    found = []
    split.set_attn_implementation("eager")
    for model in (stock_eager, split):
        without = plain(model, inputs)["output"]
        model.zero_grad()
        for layer in model.vision_encoder.layers:
            layer.attn.dropout = 0.3
        with monkeypatch.context() as context:
            context.setattr(nn.functional, "dropout", dropout)
            found.append(plain(model, inputs))
        assert not torch.allclose(found[-1]["output"], without, rtol=1e-3)
    assert_same_outputs(found[1], found[0], 1e-5)


# LoRA on q and v


def adapted(model: nn.Module, dropout: float = 0.0, **changes) -> PeftModel:
    """With adapters that are not the identity, in training mode."""
    model = get_peft_model(copy.deepcopy(model), LoraConfig(**{**LORA, "lora_dropout": dropout, **changes}))
    fill_adapters(model)
    return model.double().train()


def fill_adapters(model: nn.Module, seed: int = 3) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    randomize(nn.ParameterList(parameters.values()), seed)


def adapter_gradients(model: nn.Module, *, context=contextlib.nullcontext, between=lambda model: None) -> Callable:
    """A step with `context` around the forward and `between` called after it, as a function of the inputs."""

    def step(inputs: Tensors) -> Tensors:
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        torch.manual_seed(7)  # for dropout
        with context():
            outputs = model(**inputs)
        between(model)
        torch.manual_seed(8)
        loss(outputs).backward()
        found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        assert found and all(tensor.any() for tensor in found.values())
        return {"output": outputs.pred_masks.detach(), **found}

    return step


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


# Functions of the model


def scalar(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    output = model(image).last_hidden_state
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def weights_of(encoder: nn.Module) -> Tensors:
    return {name: parameter.detach() for name, parameter in encoder.named_parameters()}


def weighted(encoder: nn.Module) -> Callable[[Tensors, torch.Tensor], torch.Tensor]:
    """`scalar` as a function of weights and image."""

    def function(weights: Tensors, image: torch.Tensor) -> torch.Tensor:
        output = functional_call(encoder, weights, (image,)).last_hidden_state
        return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()

    return function


def func_grad(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    return joined(torch.func.grad(weighted(encoder))(weights_of(encoder), images))


def vjp(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    _, backward = torch.func.vjp(lambda images: encoder(images).last_hidden_state, images)
    return {"image": backward(torch.ones_like(encoder(images).last_hidden_state))[0]}


def per_sample(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    grad = torch.func.grad(lambda weights, image: weighted(encoder)(weights, image[None]))
    return joined(torch.func.vmap(grad, (None, 0))(weights_of(encoder), images), dim=1)


def ensemble(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    weights = {name: torch.stack([weight, 1.1 * weight]) for name, weight in weights_of(encoder).items()}
    return {"output": torch.func.vmap(weighted(encoder), (0, None))(weights, images)}


def grads_batched(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    output = encoder(images).last_hidden_state
    parameters = parameters_of(encoder)
    batch = torch.linspace(-1, 1, 3 * output.numel(), dtype=output.dtype).view(3, *output.shape)
    found = torch.autograd.grad(output, list(parameters.values()), batch, is_grads_batched=True)
    found = dict(zip(parameters, found, strict=True))
    return {name: tensor for name, tensor in found.items() if "attn.rel_pos" in name or ".attn.proj" in name}


def jacobian(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    def function(image: torch.Tensor) -> torch.Tensor:
        return encoder(image).last_hidden_state[:, 0, :2, :2]

    return {"image": torch.autograd.functional.jacobian(function, images, vectorize=True)}


def jacrev(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    return {"image": torch.func.jacrev(lambda image: encoder(image).last_hidden_state[:, 0, :2, :2])(images)}


def second_derivative(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(encoder, leaf), leaf, create_graph=True)
    gradient.square().sum().backward()
    return gradients(parameters_of(encoder))


def second_func(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    def first(images: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda images: scalar(encoder, images))(images).square().sum()

    return {"image": torch.func.grad(first)(images)}


def jvp(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    tangent = torch.linspace(-1, 1, images.numel(), dtype=images.dtype).view_as(images)
    return {"image": torch.func.jvp(lambda images: scalar(encoder, images), (images,), (tangent,))[1]}


def dual(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    with torch.autograd.forward_ad.dual_level():
        tangents = {name: weight.clone() for name, weight in weights_of(encoder).items()}
        make_dual = torch.autograd.forward_ad.make_dual
        weights = {name: make_dual(weight, tangents[name]) for name, weight in weights_of(encoder).items()}
        return {"output": torch.autograd.forward_ad.unpack_dual(weighted(encoder)(weights, images)).tangent}


def hessian_vector(encoder: nn.Module, images: torch.Tensor) -> Tensors:
    """Forward over reverse."""
    grad = torch.func.grad(lambda images: scalar(encoder, images))
    return {"image": torch.func.jvp(grad, (images,), (torch.ones_like(images),))[1]}


RIGHT, EAGER, FORWARD_MODE = None, 'attn_implementation="eager"', "jvp function"
TRANSFORMS = {  # what sdpa does: it is right, or raises this. Stock's has no forward mode at all
    "tiled": {
        func_grad: RIGHT,
        vjp: RIGHT,
        per_sample: EAGER,
        ensemble: EAGER,
        grads_batched: EAGER,
        jacobian: EAGER,
        jacrev: EAGER,
        second_derivative: EAGER,
        second_func: EAGER,
        jvp: f"{EAGER}|{FORWARD_MODE}",
        dual: f"{EAGER}|{FORWARD_MODE}",
        hessian_vector: f"{EAGER}|{FORWARD_MODE}",
    },
}
TRANSFORMS["folded"] = dict.fromkeys(TRANSFORMS["tiled"], RIGHT)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",  # vmap, of what it must loop over
    "ignore:`torch.jit.script` is deprecated",  # which forward mode uses itself
)
@pytest.mark.parametrize("transform", TRANSFORMS["tiled"], ids=lambda function: function.__name__)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_function_transforms(implementation, transform, split, stock_twin, stock_eager, path, inputs):
    """They are right, or say that `eager` is what works."""
    split.set_attn_implementation(implementation)
    images = inputs["pixel_values"]
    error = TRANSFORMS[path][transform] if implementation == "sdpa" else RIGHT
    if error is not RIGHT:
        with pytest.raises(RuntimeError, match=error):
            transform(split.vision_encoder, images)
        return
    is_exact = implementation == "sdpa" and transform in (func_grad, vjp)
    expected = transform((stock_twin if is_exact else stock_eager).vision_encoder, images)
    tolerance = EXACT if is_exact else 1e-5  # eager's softmax is in fp32
    assert_same_outputs(transform(split.vision_encoder, images), expected, tolerance)


# Two processes


def sharded_gradients(rank: int, folders: dict[str, str], result: str) -> None:
    """What one of two processes does: each takes one image, and both hold a part of each weight.

    Run in a process of its own.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    warnings.simplefilter("ignore")  # torch, of its own parts
    torch.distributed.init_process_group("gloo", init_method=f"file://{result}.store", rank=rank, world_size=2)
    inputs = {name: tensor[rank : rank + 1] for name, tensor in torch.load(f"{result}.inputs").items()}
    found = {}
    for name, wrapped in itertools.product(("whole", "adapted"), ("FSDP1", "FSDP2")):
        torch.manual_seed(0)
        model = AutoModel.from_pretrained(folders["split"], trust_remote_code=True).double().train()
        layer = type(model.vision_encoder.layers[0])
        if name == "adapted":
            model = adapted(model)
        if wrapped == "FSDP1":
            policy, device = ModuleWrapPolicy({layer}), torch.device("cpu")
            model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
            loss(model(**inputs)).backward()
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            for module in [module for module in model.modules() if isinstance(module, layer)]:
                fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            loss(model(**inputs)).backward()
            grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        found[f"{wrapped} {name}"] = {n.replace("_fsdp_wrapped_module.", ""): grad for n, grad in grads.items()}
    if rank == 0:
        torch.save(found, result)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded(models, split_dir, tmp_path, inputs):
    """FSDP 1 and 2, of all weights and of adapters, equal one process with both images."""
    stock, split = copy.deepcopy(models[0]), models[1]
    result = tmp_path / "gradients"
    torch.save(inputs, f"{result}.inputs")
    context = torch.multiprocessing.start_processes(
        sharded_gradients, ({"split": str(split_dir)}, str(result)), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    found = torch.load(result)

    def averaged(run: Callable[[Tensors], Tensors], model: nn.Module) -> Tensors:
        total: Tensors = {}
        for index in range(2):
            model.zero_grad()
            one = run({name: tensor[index : index + 1] for name, tensor in inputs.items()})
            for name in one.keys() - {"output", "after"}:
                total[name] = total.get(name, 0) + one[name] / 2
        return total

    model = adapted(split)
    expected = {
        "whole": averaged(lambda one: plain(stock, one), stock),
        "adapted": averaged(adapter_gradients(model), model),
    }
    assert len(found) == 4
    for name, grads in found.items():
        wanted = expected[name.split()[1]]
        grads = joined(grads) if "whole" in name else grads
        unused = grads.keys() - wanted.keys()
        assert not any(grads[name].any() for name in unused), name  # FSDP1 gives zeros
        assert_same_outputs({name: grads[name] for name in wanted}, wanted, EXACT)
