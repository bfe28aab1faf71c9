"""Attention is exact on each of its paths, bounded, and takes the path that fits the device."""

import copy
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_outputs, stock_model
from encoders import attention_module, models, outputs_and_gradients
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.kernels import count
from checkpoint_tools.checkout import split_class


@pytest.fixture(params=["tiled", "folded"])
def path(request, monkeypatch) -> str:
    """Both paths, whatever the device."""
    monkeypatch.setattr(attention_module(), "attention_path", lambda query: request.param)
    return request.param


TILE_BYTES = [1, 8_000, 100_000, 2**30]  # a row of queries, some rows, some windows, all
DTYPES = [torch.float16, torch.bfloat16]


UNUSUAL = [
    {},
    {"window_size": 0},
    {"window_size": 5, "num_attention_heads": 4},
    {"window_size": 8},  # as large as the image
    {"hidden_size": 40, "num_attention_heads": 1},
    {"qkv_bias": False},
    {"use_rel_pos": False},
    {"patch_size": 4, "window_size": 6},
]


@pytest.mark.parametrize("vision", UNUSUAL, ids=str)
def test_exact_on_both_paths(path, vision, inputs):
    stock, split = (model.double() for model in models(**vision))
    pixel_values = inputs["pixel_values"].double()
    assert_same_outputs(
        outputs_and_gradients(split, pixel_values), outputs_and_gradients(stock, pixel_values), tolerance=1e-10
    )


@pytest.mark.parametrize("tile_bytes", TILE_BYTES)
def test_exact_with_tiles_of_any_size(tile_bytes, inputs):
    stock, split = (model.double() for model in models(attention_tile_bytes=tile_bytes))
    pixel_values = inputs["pixel_values"].double()
    assert_same_outputs(
        outputs_and_gradients(split, pixel_values), outputs_and_gradients(stock, pixel_values), tolerance=1e-10
    )


def test_exact_in_single_precision(path, inputs):
    stock, split = models()
    actual, expected = (outputs_and_gradients(model, inputs["pixel_values"]) for model in (split, stock))
    assert_same_outputs(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (4, 2)], ids=str)
@pytest.mark.parametrize("layer", [0, 1], ids=["windowed", "global"])
def test_grids_that_are_not_square(path, layer, grid, inputs):
    stock, split = (model.layers[layer].double() for model in models())
    hidden_states = torch.randn(2, *grid, 28, dtype=torch.float64)
    torch.testing.assert_close(split(hidden_states), stock(hidden_states), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_gradcheck():
    qkv = torch.randn(3, 2, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(size, size, 4, dtype=torch.float64, requires_grad=True) for size in (2, 3)]
    for tile_bytes in (1, 200, 2**20):
        inputs = (qkv.flatten(1, 2), *tables, 0.5, tile_bytes)
        assert torch.autograd.gradcheck(attention_module().TiledAttention.apply, inputs)
    assert torch.autograd.gradcheck(attention_module().folded_attention, (qkv, *tables, 0.5))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "hip", "side", "path"),
    [
        ("cpu", torch.float32, None, None, 64, "tiled"),
        ("cpu", torch.bfloat16, None, None, 14, "tiled"),
        ("mps", torch.float16, None, None, 64, "tiled"),
        ("xpu", torch.bfloat16, None, None, 64, "tiled"),
        ("meta", torch.bfloat16, None, None, 64, "tiled"),
        ("cuda", torch.bfloat16, (9, 0), None, 64, "folded"),
        ("cuda", torch.float16, (8, 6), None, 14, "folded"),
        ("cuda", torch.bfloat16, (8, 0), None, 96, "folded"),
        ("cuda", torch.bfloat16, (8, 0), None, 97, "tiled"),
        ("cuda", torch.float32, (8, 0), None, 64, "tiled"),
        ("cuda", torch.float16, (7, 5), None, 64, "folded"),
        ("cuda", torch.bfloat16, (7, 5), None, 64, "tiled"),
        ("cuda", torch.float64, (9, 0), None, 64, "tiled"),
        ("cuda", torch.bfloat16, (9, 4), "6.4", 64, "folded"),
        ("cuda", torch.bfloat16, (9, 4), "6.4", 128, "tiled"),
        ("cuda", torch.float32, (9, 4), "6.4", 64, "tiled"),
    ],
    ids=str,
)
def test_path_fits_the_device(device, dtype, capability, hip, side, path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 12, side, side, 64))
    assert attention_module().attention_path(query) == path


@pytest.mark.parametrize(("channels", "size"), [(7, 136), (64, 192), (80, 256), (140, 272)])
def test_folded_channels_are_those_that_kernels_take(channels, size, monkeypatch):
    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append((a, k)) or attention(*a, **k))
    qkv = torch.randn(3, 1, 1, 64, 64, channels, dtype=torch.bfloat16)
    tables = torch.randn(2, 64, 64, channels, dtype=torch.bfloat16)
    attention_module().folded_attention(qkv, *tables, 0.1)
    ((states, options),) = calls
    assert "attn_mask" not in options
    assert [state.shape[-1] for state in states] == [size] * 3


@pytest.mark.slow
def test_folded_needs_few_kernels(monkeypatch):
    """Counted without a GPU; tiles of 8 MB need a hundred times as many."""
    monkeypatch.setattr(attention_module(), "attention_path", None)  # count() sets it, and this puts it back
    stock, folded = (
        [count(implementation, None, "lora", batch=batch) for batch in (1, 8)]
        for implementation in ("stock-sdpa", "folded")
    )
    assert all(ours <= 2 * theirs for ours, theirs in zip(folded, stock, strict=True))
    assert folded[1] <= 1.02 * folded[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_half_precision_is_no_worse_than_stock(path, dtype, autocast, inputs):
    """Measured against single precision, over all outputs and gradients of several inputs, as one may be unlucky."""
    errors = torch.zeros(2)
    for seed in range(4):
        pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        reference = outputs_and_gradients(models()[0], pixel_values)
        for index, model in enumerate(models()):
            if not autocast:
                model, pixel_values = model.to(dtype), pixel_values.to(dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                results = outputs_and_gradients(model, pixel_values)
            relative = [(results[name].float() - exact).norm() / exact.norm() for name, exact in reference.items()]
            errors[index] += torch.stack(relative).mean()
    stock, split = errors
    assert 0 < split <= 1.15 * stock


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["folded", "tiled"])
def test_half_precision_over_many_tokens(name, dtype):
    """Sums over 1,024 tokens and 512 tiles are where precision would be lost, and leave nothing to luck."""
    qkv, weight = torch.randn(3, 1, 2, 32, 32, 16), torch.randn(1, 2, 32, 32, 16)
    tables = 0.3 * torch.randn(2, 32, 32, 16)
    attention = attention_module()

    def dense(qkv: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor) -> torch.Tensor:
        bias = attention.relative_position_bias(qkv[0], table_h, table_w)
        query, key, value = qkv.flatten(3, 4)
        return F.scaled_dot_product_attention(query, key, value, bias, scale=0.25).view(qkv[0].shape)

    functions = {
        "dense": dense,
        "folded": lambda *tensors: attention.folded_attention(*tensors, 0.25),
        "tiled": lambda qkv, *tables: attention.TiledAttention.apply(qkv[:, 0], *tables, 0.25, 2**14)[None],
    }

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (qkv, *tables)]
        output = functions[name](*leaves)
        return [output, *torch.autograd.grad(output, leaves, weight.to(dtype))]

    exact = run("dense", torch.float64)
    errors = {
        function: torch.stack(
            [(a.double() - e).norm() / e.norm() for a, e in zip(run(function, dtype), exact, strict=True)]
        )
        for function in ("dense", name)
    }
    assert (errors[name] <= 1.1 * errors["dense"]).all(), errors


def test_frozen_tables_and_weights_get_no_gradient(inputs):
    stock, split = (model.double() for model in models())
    for model in (stock, split):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("rel_pos" not in name and "norm" not in name)
    pixel_values = inputs["pixel_values"].double()
    actual, expected = (outputs_and_gradients(model, pixel_values) for model in (split, stock))
    assert not any("rel_pos" in name for name in actual)
    assert_same_outputs(actual, expected, tolerance=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, inputs):
    stock, split = models()
    with mode():
        pixel_values = inputs["pixel_values"]
        assert_same_outputs(split(pixel_values), stock(pixel_values))


def test_second_forward_before_backward(inputs):
    _, split = models()
    expected = outputs_and_gradients(split, inputs["pixel_values"])
    leaf = inputs["pixel_values"].clone().requires_grad_()
    output = split(leaf).last_hidden_state
    split(2 * leaf)
    split.zero_grad()
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    torch.testing.assert_close(leaf.grad, expected["pixel_values"])


def test_attention_memory_does_not_grow_with_the_scores():
    """The largest tensor made in forward and backward is of the size of the tokens, not of their square."""
    _, split = models(window_size=0, image_size=256, attention_tile_bytes=2**16)
    largest = 0

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return output

    with Spy():
        outputs_and_gradients(split, torch.randn(1, 3, 256, 256))
    num_tokens = 32 * 32
    assert largest < num_tokens**2  # a quarter of one head's scores


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_padding_is_projected_exactly_by_adapters(adapter, load, inputs):
    """The adapted model's padded windows equal those of the merged model, which are tested against stock."""
    config = LoraConfig(target_modules=["q", "k", "v"], task_type="FEATURE_EXTRACTION", **adapter)
    model = get_peft_model(load(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(**inputs)
        merged = model.merge_and_unload()
        assert_same_outputs(merged(**inputs), expected, tolerance=1e-4)
        assert_same_outputs(merged.to_sam()(**inputs), expected, tolerance=1e-4)


def test_distributed_data_parallel(load, inputs, tmp_path):
    model = load().train()

    def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        module(**inputs).pred_masks.sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        actual = gradients(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))
    finally:
        torch.distributed.destroy_process_group()
    assert any("attn.q.weight" in name for name in expected)
    assert_same_outputs(actual, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied, load, inputs):
    model = load()
    with torch.no_grad():
        assert_same_outputs(copied(model)(**inputs), model(**inputs), tolerance=0)


def test_meta_device(inputs):
    with torch.device("meta"):
        model = split_class()(stock_model().config)
        output = model(inputs["pixel_values"].to("meta"), input_points=inputs["input_points"].to("meta")).pred_masks
        output.sum().backward()
    assert output.shape == (2, 2, 3, 32, 32)


def test_tiles_cover_every_query_once():
    for shape, tile_bytes in itertools.product([(12, 4, 5, 1), (3, 7, 2, 1)], [1, 90, 700, 4_000, 10**6]):
        seen = torch.zeros(shape)
        num_keys = shape[1] * shape[2]
        for groups, rows, (scores,) in attention_module().tiles(seen, tile_bytes, torch.float32):
            seen[groups, rows] += 1
            assert scores.is_contiguous()
            assert scores.numel() == seen[groups, rows].numel() * num_keys
            assert scores.numel() * 4 <= max(tile_bytes, shape[2] * num_keys * 4)
        assert (seen == 1).all()
