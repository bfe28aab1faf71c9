"""LoRA on q and v: adapting, training, saving, merging, and the way back to stock SAM."""

import copy
import re
import shutil

import pytest
import torch
import transformers
from conftest import NEEDS_ADD_ADAPTER, assert_holds_weights_of, assert_same_outputs, randomize, stock_model
from packaging import version
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BitsAndBytesConfig, SamConfig, SamModel

from checkpoint_tools.checkout import split_class
from checkpoint_tools.loading import let_gradients_through_4bit


LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q", "v"], "lora_dropout": 0.1}


def lora_config(**changes) -> LoraConfig:
    return LoraConfig(**{**LORA, "task_type": "FEATURE_EXTRACTION", **changes})


def fill_adapters(model: torch.nn.Module, seed: int = 3) -> None:
    """B is zero at the start, which would hide mistakes."""
    randomize(torch.nn.ParameterList(p for name, p in model.named_parameters() if "lora_" in name), seed)


def train_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One optimizer step; returns the gradients."""
    model.train()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    model(**inputs).pred_masks.square().mean().backward()
    optimizer.step()
    model.eval()
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.fixture
def adapted(load) -> PeftModel:
    model = get_peft_model(load(), lora_config()).eval()
    fill_adapters(model)
    return model


def test_adapts_exactly_q_and_v_of_every_vision_layer(adapted):
    wrapped = {
        name.removesuffix(".lora_A.default") for name, _ in adapted.named_modules() if name.endswith("lora_A.default")
    }
    assert wrapped == {
        f"base_model.model.vision_encoder.layers.{layer}.attn.{part}" for layer in range(3) for part in "qv"
    }
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{factor}.default.weight" for name in wrapped for factor in "AB"}


def test_trainable_parameters_of_vit_b():
    with torch.device("meta"):
        model = get_peft_model(split_class()(SamConfig()), lora_config())
        stock = SamModel(SamConfig())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 589_824
    assert total == stock.num_parameters() + trainable


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_gradients_reach_all_lora_weights(checkpointing, adapted, inputs):
    if checkpointing is not None:
        adapted.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        adapted.enable_input_require_grads()
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    gradients = train_step(adapted, inputs)
    assert len(gradients) == 3 * 2 * 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(torch.equal(frozen[name], p) for name, p in adapted.named_parameters() if name in frozen)


def test_gradients_are_those_of_the_merged_weight(load, stock, inputs):
    """The chain rule on stock's own fused gradient gives LoRA's: dB = scale * dW A', dA = scale * B' dW."""
    model = get_peft_model(load(), lora_config(lora_dropout=0.0)).double()
    fill_adapters(model)
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    gradients = train_step(copy.deepcopy(model), inputs)
    merged = copy.deepcopy(model).merge_and_unload().to_sam().double()
    merged(**inputs).pred_masks.square().mean().backward()
    for layer in range(3):
        fused = merged.vision_encoder.layers[layer].attn.qkv.weight.grad.chunk(3)
        for part, d_weight in (("q", fused[0]), ("v", fused[2])):
            name = f"base_model.model.vision_encoder.layers.{layer}.attn.{part}"
            a, b = (model.get_parameter(f"{name}.lora_{factor}.default.weight") for factor in "AB")
            scale = 32 / 16
            torch.testing.assert_close(gradients[f"{name}.lora_B.default.weight"], scale * d_weight @ a.T)
            torch.testing.assert_close(gradients[f"{name}.lora_A.default.weight"], scale * b.T @ d_weight)


def test_save_and_reload(adapted, load, split_dir, inputs, tmp_path, logged):
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = adapted(**inputs)
        assert_same_outputs(PeftModel.from_pretrained(load(), tmp_path)(**inputs), expected)
        automatic = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path, trust_remote_code=True)
        assert_same_outputs(automatic(**inputs), expected)
    assert logged == []


def test_save_and_reload_with_biases(load, inputs, tmp_path):
    """Those of k, which no adapter wraps, included."""
    model = randomize(get_peft_model(load(), lora_config(bias="all"))).eval()
    model.save_pretrained(tmp_path)
    base = load()
    base.load_state_dict(
        {
            name: model.get_base_model().state_dict()[
                name.replace(".q.", ".q.base_layer.").replace(".v.", ".v.base_layer.")
            ]
            for name in base.state_dict()
        }
    )
    with torch.no_grad():
        assert_same_outputs(PeftModel.from_pretrained(base, tmp_path).eval()(**inputs), model(**inputs))


def test_merge(adapted, inputs, tmp_path, load):
    with torch.no_grad():
        expected = adapted(**inputs)
        merged = adapted.merge_and_unload()
        assert_same_outputs(merged(**inputs), expected)
        merged.save_pretrained(tmp_path)
        assert_same_outputs(load(tmp_path)(**inputs), expected)


@NEEDS_ADD_ADAPTER
def test_add_adapter(load, inputs, tmp_path):
    """Without a `PeftModel` around it; saved, the adapter is an ordinary one."""
    model = load()
    with torch.no_grad():
        plain = model(**inputs)
    model.add_adapter(lora_config())
    fill_adapters(model)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs)
        model.save_pretrained(tmp_path)
        assert_same_outputs(PeftModel.from_pretrained(load(), tmp_path)(**inputs), expected)
        model.disable_adapters()
        assert_same_outputs(model(**inputs), plain)


def test_base_of_an_adapter_must_be_complete(adapted, split_dir, tmp_path):
    """Of which transformers reports only the adapter's keys."""
    base = tmp_path / "base"
    shutil.copytree(split_dir, base)
    weights = load_file(base / "model.safetensors")
    del weights["vision_encoder.layers.1.attn.k.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=re.escape("layers.1.attn.k.weight")):
        AutoModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True)


def test_load_adapter(adapted, load, inputs, tmp_path):
    adapted.save_pretrained(tmp_path)
    model = load()
    if version.parse(transformers.__version__) < version.parse("5.1"):  # whose load_adapter loses the weights
        with pytest.raises(ValueError, match=re.escape("PeftModel.from_pretrained(model, adapter)")):
            model.load_adapter(str(tmp_path))
    else:
        model.load_adapter(str(tmp_path))
        with torch.no_grad():
            assert_same_outputs(model(**inputs), adapted(**inputs))


@NEEDS_ADD_ADAPTER
@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.1"), reason="it loses weights")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_load_two_adapters(adapted, load, inputs, tmp_path):
    """Under names of which one is part of many weights' names."""
    model, expected = load(), {}
    for seed, name in enumerate(("y", "other")):
        fill_adapters(adapted, seed)
        adapted.save_pretrained(tmp_path / name)
        model.load_adapter(str(tmp_path / name), adapter_name=name)
        with torch.no_grad():
            expected[name] = adapted(**inputs)
    for name, outputs in expected.items():
        model.set_adapter(name)
        with torch.no_grad():
            assert_same_outputs(model.eval()(**inputs), outputs)


@pytest.mark.parametrize("name", ["default", "y"])
def test_load_adapter_with_a_weight_lost(name, adapted, load, tmp_path):
    adapted.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"whose adapter is now random.*lora_[AB]\.{name}\.weight"):
        load().load_adapter(str(tmp_path), adapter_name=name)


def test_two_adapters_switched(adapted, load, inputs, tmp_path):
    with torch.no_grad():
        first = adapted(**inputs)
        adapted.add_adapter("second", lora_config(r=4))
        adapted.set_adapter("second")
        fill_adapters(adapted.base_model.model.vision_encoder, seed=4)
        second = adapted.eval()(**inputs)
        assert not torch.allclose(first.pred_masks, second.pred_masks)
        adapted.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(load(), tmp_path / "second", adapter_name="second")
        assert_same_outputs(reloaded(**inputs), second)


def test_fused_weights_cannot_slip_past_adapters(adapted, stock):
    with pytest.raises(RuntimeError, match="load the weights before you add"):
        adapted.base_model.model.load_state_dict(stock.state_dict(), strict=False)


@pytest.mark.parametrize("targets", [["q", "v"], ["v"], ["proj"], ["lin1"]], ids=str)
def test_to_sam_refuses_adapters(targets, load):
    model = get_peft_model(load(), lora_config(target_modules=targets))
    with pytest.raises(ValueError, match=re.escape("merge_and_unload()")):
        model.to_sam()
    with pytest.raises(ValueError, match=re.escape("merge_and_unload()")):
        model.base_model.model.to_sam()


def test_to_sam_refuses_quantized_weights(load):
    pytest.importorskip("bitsandbytes")
    model = load(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match=re.escape("dequantize()")):
        model.to_sam()


def test_4bit_gradients_after_evaluation(tmp_path):
    pytest.importorskip("bitsandbytes")
    stock_model(hidden_size=64).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = split_class("SamSplitVisionModel").from_pretrained(tmp_path, quantization_config=quantization).eval()
    let_gradients_through_4bit(model)
    pixel_values = torch.randn(1, 3, 64, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(pixel_values).last_hidden_state.sum(), pixel_values)
    with torch.no_grad():
        model(pixel_values.detach())
    for mode in (False, True):
        (actual,) = torch.autograd.grad(model.train(mode)(pixel_values).last_hidden_state.sum(), pixel_values)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("vision", [{}, {"qkv_bias": False}], ids=str)
def test_whole_circle(vision, inputs, tmp_path, logged):
    """stock -> split -> LoRA step -> merge -> to_sam() -> save -> stock."""
    stock_model(**vision).save_pretrained(tmp_path / "stock")
    model = get_peft_model(split_class().from_pretrained(tmp_path / "stock"), lora_config())
    fill_adapters(model)
    before = SamModel.from_pretrained(tmp_path / "stock")
    train_step(model, inputs)
    with torch.no_grad():
        expected = model(**inputs)
        merged = model.merge_and_unload()
        merged.to_sam().save_pretrained(tmp_path / "tuned")
        tuned, info = SamModel.from_pretrained(tmp_path / "tuned", output_loading_info=True)
        assert not any(info.values())
        assert_holds_weights_of(merged, tuned)
        assert_same_outputs(tuned(**inputs), merged(**inputs))
        assert_same_outputs(tuned(**inputs), expected)
        assert not torch.allclose(before(**inputs).pred_masks, expected.pred_masks)
    assert logged == []


def test_adapter_of_fused_qkv_is_refused(stock, load, tmp_path):
    """Even where other targets of it do fit, and PEFT would load those alone."""
    config = LoraConfig(target_modules=["qkv", "lin1"], task_type="FEATURE_EXTRACTION")
    get_peft_model(copy.deepcopy(stock), config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="adapter of the fused qkv must be converted"):
        PeftModel.from_pretrained(load(), tmp_path)
