"""What is recorded from the model, by whichever tracer, gives what the model gives, also for other images."""

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import TINY, assert_same_outputs, randomize
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModel, SamConfig, SamModel

from checkpoint_tools.checkout import split_class


IMPLEMENTATIONS = ["sdpa", "eager"]
# with a limit, as torch 2.7 refuses a named dimension without one
FREE_BATCH = torch.export.Dim("batch", max=64)
PATHS = ["tiled", "folded", "eager"]  # the implementation, or what sdpa does on some device if nothing is exported

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",  # of stock SAM's own checks of shapes
    "ignore:.*`?torch.jit.*` is (deprecated|not supported)",
    "ignore:.*should not be instantiated:DeprecationWarning",  # torch.compile does it
)


class Masks(nn.Module):
    """SAM with plain tensors in and out, as the older tracers need them."""

    def __init__(self, sam: nn.Module):
        super().__init__()
        self.sam = sam

    def forward(self, pixel_values: torch.Tensor, input_points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.sam(pixel_values=pixel_values, input_points=input_points)
        return output.pred_masks, output.iou_scores


class Embeddings(nn.Module):
    """The vision encoder alone."""

    def __init__(self, sam: nn.Module):
        super().__init__()
        self.encoder = sam.vision_encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values).last_hidden_state


def layers(sam: nn.Module) -> nn.Module:
    """A windowed and a global layer, for those tracers that take long."""
    return nn.Sequential(*sam.vision_encoder.layers)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory) -> str:
    """A windowed layer that pads and a global one, and a decoder as small as can be."""
    vision = {**TINY["vision_config"], "num_hidden_layers": 2, "global_attn_indexes": [1], "image_size": 32}
    decoder = {**TINY["mask_decoder_config"], "num_hidden_layers": 1, "num_multimask_outputs": 1}
    prompts = {**TINY["prompt_encoder_config"], "image_size": 32}
    config = SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts)
    paths = [str(tmp_path_factory.mktemp("small") / name) for name in ("stock", "split")]
    randomize(SamModel(config)).save_pretrained(paths[0])
    split_class().from_pretrained(paths[0]).save_pretrained(paths[1])
    return paths[1]


@pytest.fixture
def small(small_dir, monkeypatch) -> Callable[..., nn.Module]:
    """The small model on one of `PATHS`, or with an implementation."""

    def load(path: str, tile_bytes: int | None = 4_000) -> nn.Module:
        implementation = path if path in IMPLEMENTATIONS else "sdpa"
        model = AutoModel.from_pretrained(
            small_dir, trust_remote_code=True, attn_implementation=implementation, attention_tile_bytes=tile_bytes
        )
        if path not in IMPLEMENTATIONS:
            module = sys.modules[type(model).__module__.replace("modeling_sam_split", "attention_sam_split")]
            monkeypatch.setattr(module, "attention_path", lambda query: path)
        return model.eval()

    return load


def images(seed: int, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def hidden_states(seed: int, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 4, 4, 28, generator=torch.Generator().manual_seed(seed))


def image_and_points(seed: int, number: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return images(seed, number), 32 * torch.rand(number, 2, 1, 2, generator=generator)


def assert_same(actual, expected, tolerance: float = 1e-5) -> None:
    assert_same_outputs(dict(enumerate(actual)), dict(enumerate(expected)), tolerance)


def outputs_and_gradients(model: nn.Module, module: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of `model`, run as `module`."""
    model.zero_grad()
    leaf = inputs.clone().requires_grad_()
    output = module(leaf)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum("attn.q" in name for name in grads) == 4
    return {"output": output.detach(), "inputs": leaf.grad, **but_noise(grads)}


def but_noise(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax leaves a bias of all keys without a gradient."""
    return {name: grad for name, grad in grads.items() if not name.endswith("attn.k.bias")}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_jit_trace(train, implementation, small, tmp_path, monkeypatch):
    """Saved, loaded, and run with other images."""
    model = Masks(small(implementation)).train(train)
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.startswith("transformers_modules."):  # and a commit, which often begins with a digit
            monkeypatch.setattr(kind, "__module__", "transformers_modules.sam.0123abcd.modeling_sam_split")
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, image_and_points(0), check_trace=False), tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert_same(loaded(*image_and_points(1)), model(*image_and_points(1)))


def test_jit_trace_can_be_trained(small):
    model = Embeddings(small("sdpa")).train()
    traced = torch.jit.trace(model, images(0), check_trace=False)
    expected = outputs_and_gradients(model, model, images(1))
    assert_same_outputs(outputs_and_gradients(model, traced, images(1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_export(dynamo, implementation, small, tmp_path):
    """Run without torch, with other images and more of them."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Embeddings(small(implementation))
    free = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"images": {0: "batch"}}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own parts
        file = tmp_path / "model.onnx"
        torch.onnx.export(model, (images(0),), file, dynamo=dynamo, input_names=["images"], verbose=False, **free)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for number in (2, 3):
        (array,) = session.run(None, {"images": images(1, number).numpy()})
        with torch.no_grad():
            assert_same([torch.from_numpy(array)], [model(images(1, number))], 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_onnx_export_of_the_whole_model(implementation, small, tmp_path):
    """By TorchScript; `test_onnx.py` has the other."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Masks(small(implementation))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own parts
        torch.onnx.export(model, image_and_points(0), tmp_path / "model.onnx", dynamo=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        inputs = image_and_points(1)
        arrays = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        assert_same([torch.from_numpy(array) for array in arrays], model(*inputs), 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # transformers' own
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strict_export_in_training_mode(implementation, small):
    """With a batch size that is free."""
    model = Embeddings(small(implementation)).train()
    shapes = ({0: FREE_BATCH},)
    exported = torch.export.export(model, (images(0),), dynamic_shapes=shapes, strict=True).module()
    with torch.no_grad():
        assert_same([exported(images(1, 3))], [model(images(1, 3))])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_export_takes_the_model_itself(implementation, small):
    """With keywords, and gives what it gives."""
    model = small(implementation)
    inputs, others = (
        dict(zip(("pixel_values", "input_points"), image_and_points(seed, number), strict=True))
        for seed, number in ((0, 2), (1, 3))
    )
    shapes = {name: {0: FREE_BATCH} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        assert_same_outputs(exported(**others), model(**others))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_compile(path, small):
    """In training, as one graph."""
    model = layers(small(path)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(model, model, hidden_states(1))
    assert_same_outputs(outputs_and_gradients(model, compiled, hidden_states(1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_compile_with_free_shapes(path, small):
    """In training."""
    model = layers(small(path, tile_bytes=None)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = outputs_and_gradients(model, model, hidden_states(1))
    assert_same_outputs(outputs_and_gradients(model, compiled, hidden_states(1)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_compile_of_the_encoder(path, small):
    """In inference, as most use it."""
    model = Embeddings(small(path))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same([compiled(images(1))], [model(images(1))])


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_make_fx(path, small):
    """Of output and gradients together."""
    model = layers(small(path)).train()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def function(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        output = functional_call(model, leaves, (inputs,))
        gradient = torch.linspace(-1, 1, output.numel()).view_as(output)
        grads = torch.autograd.grad(output, list(leaves.values()), gradient)
        return {"output": output.detach(), **but_noise(dict(zip(leaves, grads, strict=True)))}

    graph = make_fx(function)(weights, hidden_states(0))
    others = {name: 1.1 * weight for name, weight in weights.items()}
    assert_same_outputs(graph(others, hidden_states(1)), function(others, hidden_states(1)))


@pytest.mark.parametrize("path", PATHS)
def test_functional_call(path, small):
    """With the weights of another model."""
    model, other = Embeddings(small(path)), Embeddings(small(path))
    randomize(other, seed=5)
    with torch.no_grad():
        expected = other(images(1))
        assert_same([functional_call(model, dict(other.named_parameters()), (images(1),))], [expected])
        assert not torch.allclose(model(images(1)), expected, rtol=1e-2)


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, torch.jit.script], ids=lambda trace: trace.__name__)
def test_tracers_that_fail_say_so(trace, small):
    """As on stock SAM, whose Python neither of them understands."""
    with pytest.raises((torch.fx.proxy.TraceError, torch.jit.frontend.NotSupportedError, OSError)):
        trace(Embeddings(small("sdpa")))
