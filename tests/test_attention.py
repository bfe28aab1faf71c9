"""The tiled attention is exact, bounded, and works with what people build around a model."""

import copy
import importlib
import itertools
import pickle

import pytest
import torch
from conftest import assert_same_outputs, stock_model
from peft import LoraConfig, get_peft_model
from torch import nn

from staging import split_class


TILE_BYTES = [1, 1_000, 8_000, 2**30]  # a query, parts of a row, some rows or windows, all
DTYPES = [torch.float16, torch.bfloat16]


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
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    found = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    for name in [name for name in found if ".q." in name]:
        found[name.replace(".q.", ".qkv.")] = torch.cat([found.pop(name.replace(".q.", f".{p}.")) for p in "qkv"])
    return {"output": output.detach(), "pixel_values": leaf.grad, **found}


@pytest.mark.parametrize("tile_bytes", TILE_BYTES)
@pytest.mark.parametrize("vision", [{}, {"window_size": 0}, {"window_size": 5, "num_attention_heads": 4}], ids=str)
def test_exact_with_tiles_of_any_size(vision, tile_bytes, inputs):
    stock, split = (model.double() for model in models(**vision, attention_tile_bytes=tile_bytes))
    pixel_values = inputs["pixel_values"].double()
    assert_same_outputs(
        outputs_and_gradients(split, pixel_values), outputs_and_gradients(stock, pixel_values), tolerance=1e-10
    )


def test_exact_in_single_precision(inputs):
    stock, split = models()
    actual, expected = (outputs_and_gradients(model, inputs["pixel_values"]) for model in (split, stock))
    assert_same_outputs(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (4, 2)], ids=str)
@pytest.mark.parametrize("layer", [0, 1], ids=["windowed", "global"])
def test_grids_that_are_not_square(layer, grid, inputs):
    stock, split = (model.layers[layer].double() for model in models())
    hidden_states = torch.randn(2, *grid, 28, dtype=torch.float64)
    torch.testing.assert_close(split(hidden_states), stock(hidden_states), rtol=1e-10, atol=1e-10)


def test_gradcheck():
    tiled_attention = importlib.import_module(
        split_class().__module__.replace("modeling_sam_split", "attention_sam_split")
    ).TiledAttention
    qkv = torch.randn(3, 2, 1, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    tables = [torch.randn(size, size, 4, dtype=torch.float64, requires_grad=True) for size in (2, 3)]
    for tile_bytes in (1, 200, 2**20):
        assert torch.autograd.gradcheck(tiled_attention.apply, (qkv, *tables, 0.5, tile_bytes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_half_precision_is_no_worse_than_stock(dtype, autocast, inputs):
    """Measured against single precision, over all outputs and gradients together."""
    reference = outputs_and_gradients(models()[0], inputs["pixel_values"])
    errors = []
    for model in models():
        model, pixel_values = (model, inputs["pixel_values"])
        if not autocast:
            model, pixel_values = model.to(dtype), pixel_values.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            found = outputs_and_gradients(model, pixel_values)
        relative = [(found[name].float() - exact).norm() / exact.norm() for name, exact in reference.items()]
        errors.append(torch.stack(relative).mean().item())
    stock, split = errors
    assert 0 < split <= 1.05 * stock


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
    tiles = importlib.import_module(
        split_class().__module__.replace("modeling_sam_split", "attention_sam_split")
    ).tiles
    for shape, tile_bytes in itertools.product([(2, 3, 2, 4, 5, 1), (1, 1, 3, 7, 2, 1)], [1, 90, 700, 4_000, 10**6]):
        seen = torch.zeros(shape)
        num_keys = shape[3] * shape[4]
        for tile, (room,) in tiles(seen, tile_bytes, torch.float32):
            seen[tile] += 1
            assert room.numel() == seen[tile].numel() * num_keys
            assert room.numel() * 4 <= max(tile_bytes, num_keys * 4)
        assert (seen == 1).all()
