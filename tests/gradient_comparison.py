"""What tests of training loops share: models in double precision on both paths, steps, and how gradients compare."""

import contextlib
import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import randomize, stock_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
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
    grads = {name: tensor for name, tensor in tensors.items() if not name.endswith("k_proj.bias")}
    for name in [name for name in grads if ".attn.q." in name]:
        parts = [grads.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        grads[name.replace(".q.", ".qkv.")] = torch.cat(parts, dim)
    return grads


def gradients(parameters: dict[str, nn.Parameter]) -> Tensors:
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    assert any(".attn." in name or ".mlp." in name for name in grads)
    return joined(grads)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def other_weights(model: nn.Module) -> Tensors:
    """A state dict for `model`, the same for stock and ours."""
    stock = randomize(SamModel(model.config if isinstance(model, SamModel) else stock_model().config), seed=5).double()
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


plain = disturbed(lambda model: None)


def add_hooks(model: nn.Module) -> None:
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_forward_hook(lambda module, args, output: None)


def copied(model: nn.Module) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize(other)
        other.zero_grad()


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
        grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        assert grads and all(tensor.any() for tensor in grads.values())
        return {"output": outputs.pred_masks.detach(), **grads}

    return step
