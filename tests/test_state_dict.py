"""`load_state_dict` splits fused weights, on the attention or any parent of it, and never half of them."""

import copy
import pickle

import pytest
import torch
from conftest import assert_holds_weights_of, assert_same_outputs, stock_model
from peft import LoraConfig, get_peft_model
from torch import nn

from checkpoint_tools.checkout import split_class


@pytest.fixture
def split(stock):
    return split_class()(stock.config).eval()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_model(assign, fused, split, stock, load, inputs):
    state_dict = stock.state_dict() if fused else load().state_dict()
    keys = list(state_dict)
    result = split.load_state_dict(state_dict, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(state_dict) == keys, "the caller's dict was changed"
    assert_holds_weights_of(split, stock)
    with torch.no_grad():
        assert_same_outputs(split(**inputs), stock(**inputs))


def test_any_parent_and_prefix(split, stock):
    attention, stock_attention = split.vision_encoder.layers[1].attn, stock.vision_encoder.layers[1].attn
    attention.load_state_dict(stock_attention.state_dict())
    assert torch.equal(torch.cat([attention.q.bias, attention.k.bias, attention.v.bias]), stock_attention.qkv.bias)
    split.vision_encoder.load_state_dict(stock.vision_encoder.state_dict())
    wrapped = nn.ModuleDict({"some": nn.ModuleDict({"where": split})})
    wrapped.load_state_dict({f"some.where.{name}": tensor for name, tensor in stock.state_dict().items()})
    assert_holds_weights_of(split, stock)


def test_touches_only_its_own_prefix(split, stock):
    pair = nn.ModuleDict({"ours": split, "other": nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(2, 6)})})})
    state_dict = {f"ours.{name}": tensor for name, tensor in stock.state_dict().items()}
    state_dict |= {"other.attn.qkv.weight": torch.ones(6, 2), "other.attn.qkv.bias": torch.ones(6)}
    pair.load_state_dict(state_dict)
    assert_holds_weights_of(split, stock)
    assert pair["other"]["attn"]["qkv"].weight.eq(1).all()


def test_parts_are_independent(split, stock):
    split.load_state_dict(stock.state_dict(), assign=True)
    attention = split.vision_encoder.layers[0].attn
    storages = {
        projection.weight.untyped_storage().data_ptr() for projection in (attention.q, attention.k, attention.v)
    }
    assert len(storages) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_hook(copied, split, stock):
    twin = copied(split)
    twin.load_state_dict(stock.state_dict())
    assert_holds_weights_of(twin, stock)


PREFIX = "vision_encoder.layers.1.attn."


def without(state_dict, *names):
    return {name: tensor for name, tensor in state_dict.items() if name not in {PREFIX + lost for lost in names}}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fused, split: fused | {PREFIX + "q.weight": split[PREFIX + "q.weight"]}, "holds q.weight twice"),
        (lambda fused, split: {**fused, **split}, "holds .*k.weight.*q.weight.*v.weight twice"),
        (lambda fused, split: without(fused, "qkv.bias"), "lacks .*k.bias.*q.bias.*v.bias"),
        (lambda fused, split: without(fused, "qkv.weight"), "lacks .*k.weight.*q.weight.*v.weight"),
        (lambda fused, split: without(split, "v.weight"), "lacks .*v.weight"),
        (lambda fused, split: without(split, "q.bias", "k.bias"), "lacks .*k.bias.*q.bias"),
        (lambda fused, split: fused | {PREFIX + "qkv.weight": torch.zeros(83, 28)}, r"shape \(83, 28\)"),
        (lambda fused, split: fused | {PREFIX + "qkv.weight": torch.zeros(84, 27)}, "size mismatch"),
        (lambda fused, split: fused | {PREFIX + "qkv.weight": torch.zeros(81, 28)}, "size mismatch"),
    ],
    ids=["both", "all of both", "no bias", "no weight", "no v", "half of bias", "rows", "columns", "divisible rows"],
)
def test_half_or_wrong_weights_raise(change, message, strict, split, stock, load):
    state_dict = change(dict(stock.state_dict()), dict(load().state_dict()))
    with pytest.raises(RuntimeError, match=message):
        split.load_state_dict(state_dict, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_bias_without_a_place_raises(strict, stock):
    split = split_class()(stock_model(qkv_bias=False).config)
    with pytest.raises(RuntimeError, match="qkv_bias in the configuration"):
        split.load_state_dict(stock.state_dict(), strict=strict)


def test_other_weights_alone_are_left_to_the_caller(split, stock):
    decoder = {name: tensor for name, tensor in stock.state_dict().items() if name.startswith("mask_decoder.")}
    assert len(split.load_state_dict(decoder, strict=False).unexpected_keys) == 0


@pytest.mark.parametrize("strict", [True, False])
def test_split_weights_that_the_layer_lacks_raise(strict, load):
    without_bias = split_class()(stock_model(qkv_bias=False).config)
    with pytest.raises(RuntimeError, match=r"The layer has no .*q\.bias"):
        without_bias.load_state_dict(load().state_dict(), strict=strict)
    adapted = get_peft_model(load(), LoraConfig(target_modules=["q", "v"], task_type="FEATURE_EXTRACTION"))
    with pytest.raises(RuntimeError, match=r"The layer has no .*q\.weight"):
        adapted.base_model.model.load_state_dict(load().state_dict(), strict=strict)
