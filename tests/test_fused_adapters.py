"""A LoRA of q, k, v and the LoRA of the fused qkv that it is converted to are one function, and so on the way back."""

import re

import pytest
import torch
from adapter_files import lora, rewrite, stored, write
from conftest import stock_model
from peft import PeftModel
from transformers import PreTrainedModel, SamModel, SamVisionModel

from checkpoint_tools.adapter_conversions import adapter_to_fused, adapter_to_split
from checkpoint_tools.checkout import split_class
from checkpoint_tools.output_comparison import relative_error
from segmentation.adapted_model import load_adapted


def assert_same_function(
    first: PeftModel, second: PeftModel, stock: SamModel, inputs: dict[str, torch.Tensor]
) -> None:
    """To a thousandth of what the adapter changes, in all outputs and in what the encoder gives the decoder."""

    def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
        result = model.eval()(**inputs)
        return [model.get_image_embeddings(inputs["pixel_values"]), result.pred_masks, result.iou_scores]

    with torch.no_grad():
        for one, other, plain in zip(*map(outputs, (first, second, stock)), strict=True):
            effect = relative_error(one, plain)
            assert effect > 1e-5
            assert relative_error(other, one) <= max(1e-3 * effect, 1e-6)


CASES = {
    "q and v": {"target_modules": ["q", "v"]},
    "k alone": {"target_modules": ["k"], "lora_alpha": 160},
    "rsLoRA with dropout": {"target_modules": ["q", "v"], "use_rslora": True, "r": 6, "lora_dropout": 0.3},
    "ranks by pattern": {"target_modules": ["q", "v"], "rank_pattern": {"layers.1.attn.q": 2, "v": 5}},
    "alphas by pattern": {"target_modules": ["q", "v"], "alpha_pattern": {r".*\.2\.attn\.v": 5, "q": 3}},
    "both by pattern": {
        "target_modules": ["q", "k", "v"],
        "rank_pattern": {"k": 1},
        "alpha_pattern": {"k": 5},
        "use_rslora": True,
    },
    "some layers": {"target_modules": ["q", "v"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "regular expression": {"target_modules": r"vision_encoder\.layers\.(0\.attn\.q|1\.attn\.v|2\.mlp\.lin1)"},
    "excluded": {"target_modules": ["q", "v"], "exclude_modules": ["vision_encoder.layers.1.attn.q"]},
    "and proj, MLP, decoder, whole modules": {
        "target_modules": ["q", "v", "proj", "lin2", "q_proj"],
        "rank_pattern": {"lin2": 3},
        "modules_to_save": ["iou_prediction_head", "neck"],
    },
    "biases": {"target_modules": ["q", "k", "v"], "bias": "all"},
    "biases of LoRA, odd scaling": {"target_modules": ["q", "k", "v"], "bias": "lora_only", "lora_alpha": 7, "r": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_to_fused_and_back(case, load, stock, stock_dir, inputs, tmp_path, capsys):
    """The way back gives the very tensors again, under the same names."""
    config = lora(**CASES[case])
    write(load(), config, tmp_path / "split")
    adapted = PeftModel.from_pretrained(load(), tmp_path / "split")
    assert adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir)) < 1e-5
    fused = PeftModel.from_pretrained(SamModel.from_pretrained(stock_dir), tmp_path / "fused")
    assert_same_function(adapted, fused, stock, inputs)
    assert not any(re.search(r"\.attn\.[qkv]\.", name) for name in stored(tmp_path / "fused")[1])

    assert adapter_to_split(str(tmp_path / "fused"), tmp_path / "back", str(stock_dir)) < 1e-5
    assert_same_function(adapted, PeftModel.from_pretrained(load(), tmp_path / "back"), stock, inputs)
    weights, back = (stored(tmp_path / folder)[1] for folder in ("split", "back"))
    if "pattern" in case:  # one factor is folded into B
        return
    assert weights.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in weights.items())
    assert ("lora_dropout=0.3" in capsys.readouterr().out) == ("dropout" in case)


FUSED_CASES = {
    "rsLoRA": {"target_modules": ["qkv"], "use_rslora": True, "r": 6},
    "patterns": {
        "target_modules": ["qkv"],
        "rank_pattern": {"layers.1.attn.qkv": 2},
        "alpha_pattern": {"0.attn.qkv": 3},
    },
    "some layers": {"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "and more": {"target_modules": ["qkv", "lin1", "v_proj"], "modules_to_save": ["iou_prediction_head"]},
    "biases": {"target_modules": ["qkv"], "bias": "all"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FUSED_CASES)
def test_to_split_and_back(case, load, stock, stock_dir, inputs, tmp_path):
    config = lora(**FUSED_CASES[case])
    write(SamModel.from_pretrained(stock_dir), config, tmp_path / "fused")
    adapted = PeftModel.from_pretrained(SamModel.from_pretrained(stock_dir), tmp_path / "fused")
    assert adapter_to_split(str(tmp_path / "fused"), tmp_path / "split", str(stock_dir)) < 1e-5
    assert_same_function(adapted, PeftModel.from_pretrained(load(), tmp_path / "split"), stock, inputs)
    assert adapter_to_fused(str(tmp_path / "split"), tmp_path / "back", str(stock_dir)) < 1e-5
    (config, weights), (config_back, weights_back) = (stored(tmp_path / folder) for folder in ("fused", "back"))
    assert weights.keys() == weights_back.keys()
    assert all(torch.equal(tensor, weights_back[name]) for name, tensor in weights.items())
    if case != "patterns":
        settings = ("r", "lora_alpha", "use_rslora", "modules_to_save", "bias")
        assert {name: config[name] for name in settings} == {name: config_back[name] for name in settings}


def test_the_weights_that_are_added_are_the_same(load, stock, stock_dir, tmp_path):
    """Layer by layer, in float64."""
    write(load(), lora(target_modules=["q", "v"], use_rslora=True), tmp_path / "split")
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir))
    adapted = PeftModel.from_pretrained(load(), tmp_path / "split").double().get_base_model()
    fused = PeftModel.from_pretrained(SamModel.from_pretrained(stock_dir), tmp_path / "fused").double()
    for layer, fused_layer in zip(
        adapted.vision_encoder.layers, fused.get_base_model().vision_encoder.layers, strict=True
    ):
        q, k, v = fused_layer.attn.qkv.get_delta_weight("default").chunk(3)
        torch.testing.assert_close(q, layer.attn.q.get_delta_weight("default"), rtol=1e-14, atol=0)
        torch.testing.assert_close(v, layer.attn.v.get_delta_weight("default"), rtol=1e-14, atol=0)
        assert not k.any()


def test_configuration_is_plain(load, split_dir, stock_dir, tmp_path, capsys):
    """The names that people would write, twice the rank, and the base where it can be named."""
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "split")
    assert stored(tmp_path / "split")[0]["base_model_name_or_path"] == str(split_dir)
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused")
    config, _ = stored(tmp_path / "fused")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 24, ["qkv"])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] is None
    assert "base_model_name_or_path is left out" in capsys.readouterr().out
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir), force=True)
    assert stored(tmp_path / "fused")[0]["base_model_name_or_path"] == str(stock_dir)


def test_an_untrained_adapter_can_be_trained_in_the_other_form(load, stock_dir, tmp_path):
    """Its B is zero, and no rank of it may get lost for that."""
    write(SamModel.from_pretrained(stock_dir), lora(target_modules=["qkv"]), tmp_path / "fused", trained=False)
    adapter_to_split(str(tmp_path / "fused"), tmp_path / "split", str(stock_dir))
    config, weights = stored(tmp_path / "split")
    assert config["target_modules"] == ["k", "q", "v"]
    assert len(weights) == 3 * 3 * 2
    assert {min(tensor.shape) for tensor in weights.values()} == {4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, load, stock, stock_dir, inputs, tmp_path):
    """Nothing is rounded, and what would have to be is refused."""
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "split", dtype=dtype)
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir))
    assert {tensor.dtype for tensor in stored(tmp_path / "fused")[1].values()} == {dtype}
    fused = PeftModel.from_pretrained(SamModel.from_pretrained(stock_dir), tmp_path / "fused")
    assert_same_function(PeftModel.from_pretrained(load(), tmp_path / "split"), fused, stock, inputs)
    write(load(), lora(target_modules=["q", "v"], alpha_pattern={"v": 5}), tmp_path / "uneven", dtype=dtype)
    with pytest.raises(ValueError, match="without rounding"):
        adapter_to_fused(str(tmp_path / "uneven"), tmp_path / "out", str(stock_dir))


def of_the_encoder(model: PreTrainedModel) -> torch.nn.Module:
    return model.vision_encoder


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "lin2"]])
def test_an_adapter_of_the_encoder_alone(targets, load, stock_dir, tmp_path):
    """PEFT was given `model.vision_encoder`, and gets that of the other model."""
    write(of_the_encoder(load()), lora(target_modules=targets), tmp_path / "split")
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir))
    pixels = torch.randn(1, 3, 64, 64)
    split, fused = load(), SamModel.from_pretrained(stock_dir)
    plain = split.get_image_embeddings(pixels)
    PeftModel.from_pretrained(of_the_encoder(split), tmp_path / "split")
    PeftModel.from_pretrained(of_the_encoder(fused), tmp_path / "fused")
    expected = split.get_image_embeddings(pixels)
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(fused.get_image_embeddings(pixels), expected) < 1e-5
    adapter_to_split(str(tmp_path / "fused"), tmp_path / "back", str(stock_dir))
    (config, weights), (config_back, back) = stored(tmp_path / "split"), stored(tmp_path / "back")
    assert weights.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in weights.items())
    assert set(config["target_modules"]) == set(config_back["target_modules"])


def test_an_adapter_of_a_vision_model(split_dir, stock_dir, tmp_path):
    """On the vision model, saved alone, as base."""
    model = split_class("SamSplitVisionModel").from_pretrained(split_dir)
    model.save_pretrained(tmp_path / "vision")
    write(model, lora(target_modules=["q", "v"]), tmp_path / "split")
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(tmp_path / "vision"))
    stock = SamVisionModel.from_pretrained(stock_dir)
    pixels = torch.randn(1, 3, 64, 64)
    plain = stock(pixels).last_hidden_state
    model = split_class("SamSplitVisionModel").from_pretrained(split_dir)
    expected = PeftModel.from_pretrained(model, tmp_path / "split")(pixel_values=pixels).last_hidden_state
    actual = PeftModel.from_pretrained(stock, tmp_path / "fused")(pixel_values=pixels).last_hidden_state
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(actual, expected) < 1e-5
    adapter_to_split(str(tmp_path / "fused"), tmp_path / "back", str(tmp_path / "vision"))
    assert stored(tmp_path / "split")[1].keys() == stored(tmp_path / "back")[1].keys()


def test_lora_of_an_embedding_is_copied(load, stock, stock_dir, inputs, tmp_path):
    write(load(), lora(target_modules=["q", "v", "iou_token", "no_mask_embed"]), tmp_path / "split")
    adapted = PeftModel.from_pretrained(load(), tmp_path / "split")
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir))
    fused = PeftModel.from_pretrained(SamModel.from_pretrained(stock_dir), tmp_path / "fused")
    assert_same_function(adapted, fused, stock, inputs)
    name = "base_model.model.mask_decoder.iou_token.lora_embedding_A"
    assert torch.equal(stored(tmp_path / "split")[1][name], stored(tmp_path / "fused")[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_biases_of_lora_alone_come_back_as_they_were(dtype, load, stock_dir, tmp_path):
    """Those of q and v, in their dtype, and none of k, which is not adapted."""
    write(load(), lora(target_modules=["q", "v"], bias="lora_only"), tmp_path / "split", dtype=dtype)
    adapter_to_fused(str(tmp_path / "split"), tmp_path / "fused", str(stock_dir))
    adapter_to_split(str(tmp_path / "fused"), tmp_path / "back", str(stock_dir))
    weights, back = stored(tmp_path / "split")[1], stored(tmp_path / "back")[1]
    assert weights.keys() == back.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(tensor, back[name])


def test_the_revision_is_that_of_the_base(load, hub, stock_dir, split_dir, tmp_path):
    """A base on the Hub is loaded at the adapter's revision; another base has none."""
    repo = hub.add("someone/sam", stock_dir)
    first = repo.refs["main"]
    stock_model(hidden_size=14, num_attention_heads=1).save_pretrained(tmp_path / "narrow")
    other = hub.add("someone/narrow", tmp_path / "narrow")
    repo.commit("main", next(iter(other.commits.values())))
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", {"base_model_name_or_path": "someone/sam", "revision": first})

    def bases(folder: str) -> tuple:
        config, _ = stored(tmp_path / folder)
        return config["base_model_name_or_path"], config["revision"]

    adapter_to_fused(str(tmp_path / "adapter"), tmp_path / "same")
    assert bases("same") == ("someone/sam", first)
    adapter_to_fused(str(tmp_path / "adapter"), tmp_path / "other", str(stock_dir))
    assert bases("other") == (str(stock_dir), None)
    rewrite(tmp_path / "adapter", {"base_model_name_or_path": str(split_dir)})
    adapter_to_fused(str(tmp_path / "adapter"), tmp_path / "none")
    assert bases("none") == (None, None)


def test_another_base_is_not_loaded_at_the_revision_of_the_first(load, hub, base_dir, tmp_path):
    hub.add("someone/other", base_dir)
    write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", {"base_model_name_or_path": "someone/sam", "revision": "a" * 40})
    model, _ = load_adapted(str(tmp_path / "adapter"), base="someone/other")
    assert model.peft_config["default"].target_modules == {"q", "v"}


def test_one_of_several_adapters(load, split_dir, tmp_path, convert):
    adapted = write(load(), lora(target_modules=["q", "v"]), tmp_path / "adapter")
    adapted.add_adapter("other", lora(target_modules=["k"]))
    adapted.save_pretrained(tmp_path / "adapter")
    for command in (f"to-sam {split_dir} sam --adapter adapter", f"adapter-to-fused adapter out --base {split_dir}"):
        assert "Left out: other, which lies in adapter as an adapter of its own" in convert(command)
    assert "Left out" not in convert(f"to-sam {split_dir} other --adapter adapter/other")
