"""On a GPU, the numbers are stock's, fused kernels run, and no matrix of all scores is made.

TEST_CUDA_DEVICES=0 pytest tests/test_cuda.py
"""

import re
from collections.abc import Iterator

import pytest
import torch
from conftest import assert_same_outputs
from encoders import attention_module, models, outputs_and_gradients
from torch import nn


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs TEST_CUDA_DEVICES and a CUDA device")
DEVICE = "cuda"
CHANNELS = [64, 80]  # of a head in ViT-B and ViT-L, and in ViT-H
HALF = [torch.float16, torch.bfloat16]


def encoders(channels: int = 64) -> tuple[nn.Module, nn.Module]:
    """Stock's and ours: a windowed and a global layer for images of 1024 x 1024 pixels, as in the real models."""
    size = {
        "image_size": 1024,
        "patch_size": 16,
        "window_size": 14,
        "num_hidden_layers": 2,
        "global_attn_indexes": [1],
    }
    heads = {"num_attention_heads": 2, "hidden_size": 2 * channels, "attention_tile_bytes": None}
    stock, split = models(**size, **heads)
    return stock.to(DEVICE), split.to(DEVICE)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 1024, 1024, device=DEVICE)


def errors(model: nn.Module, image: torch.Tensor, exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """Relative errors of the output and of all gradients but the last bias's, which is the same for all models."""
    results = outputs_and_gradients(model, image)
    names = exact.keys() - {"neck.layer_norm2.bias"}
    return torch.stack([(results[name] - exact[name]).norm() / exact[name].norm() for name in names])


def assert_as_exact(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """As the geometric mean over all tensors."""
    assert (ours / theirs).log().mean().exp() <= 1.15, (ours, theirs)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_as_exact_as_stock(dtype, channels, image, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions, on by default
    stock, split = encoders(channels)
    exact = outputs_and_gradients(stock.double(), image.double())
    ours, theirs = (errors(model.to(dtype), image.to(dtype), exact) for model in (split, stock))
    assert dtype != torch.float32 or ours.max() < 1e-4, ours
    assert_as_exact(ours, theirs)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_as_exact_as_stock_under_autocast(dtype, image):
    stock, split = encoders()
    exact = {name: value.double() for name, value in outputs_and_gradients(stock, image).items()}
    with torch.autocast(DEVICE, dtype):
        ours, theirs = (errors(model, image, exact) for model in (split, stock))
    assert_as_exact(ours, theirs)


def test_as_exact_as_stock_with_tf32(image, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    stock, split = encoders()
    exact = outputs_and_gradients(stock.double(), image.double())
    ours, theirs = (errors(model.float(), image, exact) for model in (split, stock))
    assert_as_exact(ours, theirs)


def test_double_precision_by_tiles(image):
    stock, split = (model.double() for model in encoders())
    image = image.double()
    assert attention_module().attention_path(image[:, :, None]) == "tiled"
    assert_same_outputs(outputs_and_gradients(split, image), outputs_and_gradients(stock, image), tolerance=1e-10)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fused_kernels_run(dtype, channels, image):
    _, split = encoders(channels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs_and_gradients(split.to(dtype), image.to(dtype))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" not in calls
    fused = re.compile(r"aten::_scaled_dot_product_(flash|efficient|cudnn)_attention(_backward)?")
    assert sum(count for name, count in calls.items() if fused.fullmatch(name)) == 4  # two layers, there and back


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_matrix_of_all_scores(dtype, image):
    _, split = encoders()
    split, image = split.to(dtype), image.to(dtype)
    outputs_and_gradients(split, image)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs_and_gradients(split, image)
    assert torch.cuda.max_memory_allocated() - before < 2 * 4096**2 * dtype.itemsize  # of both heads


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its successor is not in 5.0
def test_gradient_checkpointing(image):
    _, split = encoders()
    expected = outputs_and_gradients(split, image)
    split.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_outputs(outputs_and_gradients(split, image), expected)


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms(dtype, image, deterministic):
    _, split = encoders()
    split, image = split.to(dtype), image.to(dtype)
    first, second = (outputs_and_gradients(split, image) for _ in range(2))
    assert_same_outputs(first, second, tolerance=0)


def test_cuda_graph(image):
    _, split = encoders()
    split, image = split.bfloat16(), image.bfloat16()
    with torch.no_grad():
        expected = split(image).last_hidden_state
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = split(image).last_hidden_state
        output.zero_()
        graph.replay()
    torch.testing.assert_close(output, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*`?torch.jit.*` is (deprecated|not supported)"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype, image):
    stock, split = encoders()
    exact = outputs_and_gradients(stock.double(), image.double())
    split, image = split.to(dtype), image.to(dtype)
    before = errors(split, image, exact)
    split.compile()
    assert_as_exact(errors(split, image, exact), before)
