"""Functions of the model under torch.func and nested autograd: right as on stock, or an error that names eager."""

from collections.abc import Callable

import pytest
import torch
from conftest import assert_same_outputs
from gradient_comparison import (  # noqa: F401
    EXACT,
    Tensors,
    gradients,
    inputs,
    joined,
    models,
    parameters_of,
    path,
    split,
    stock_eager,
    stock_twin,
)
from torch import nn
from torch.func import functional_call


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
    grads = torch.autograd.grad(output, list(parameters.values()), batch, is_grads_batched=True)
    grads = dict(zip(parameters, grads, strict=True))
    return {name: tensor for name, tensor in grads.items() if "attn.rel_pos" in name or ".attn.proj" in name}


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
KERNEL = "derivative for .* is not implemented|forward AD with .* does not support it"  # of PyTorch's fused kernels
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
TRANSFORMS["folded"] |= dict.fromkeys((second_derivative, second_func, jvp, dual, hessian_vector), KERNEL)


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
