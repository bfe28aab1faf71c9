"""What is saved is always split and loads again by itself; `to_sam()` gives stock SAM back."""

import json
import shutil

import pytest
import torch
from conftest import assert_holds_weights_of, assert_same_outputs, stock_model
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskGeneration, SamModel, SamVisionModel

from checkpoint_tools.staging import ROOT, split_class


TIED = "prompt_encoder.shared_embedding.positional_embedding"
CODE = {path.name for path in ROOT.glob("*_sam_split.py")}


@pytest.fixture(params=["stock directory", "split repo", "fused repo", "scratch", "load_state_dict", "to bfloat16"])
def model(request, stock_dir, split_dir, stock, tmp_path):
    """The model by every road that people come."""
    if request.param == "stock directory":
        return split_class().from_pretrained(stock_dir)
    if request.param == "split repo":
        return AutoModel.from_pretrained(split_dir, trust_remote_code=True)
    if request.param == "fused repo":
        path = shutil.copytree(split_dir, tmp_path / "fused")
        shutil.copy(stock_dir / "model.safetensors", path)
        return AutoModelForMaskGeneration.from_pretrained(path, trust_remote_code=True)
    if request.param == "to bfloat16":
        return split_class().from_pretrained(stock_dir).to(torch.bfloat16)
    model = split_class()(stock.config).eval()
    if request.param == "load_state_dict":
        model.load_state_dict(stock.state_dict())
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("options", [{}, {"save_original_format": True}], ids=str)
def test_saved_layout(model, max_shard_size, options, tmp_path, logged):
    path = tmp_path / "saved"
    model.save_pretrained(path, max_shard_size=max_shard_size, **options)

    keys = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            keys |= set(weights.keys())
    assert keys == model.state_dict().keys() - {TIED}
    assert not any("qkv" in key for key in keys)
    assert sum("mask_decoder" in key for key in keys) == sum("mask_decoder" in key for key in model.state_dict())

    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "sam_split"
    assert config["architectures"] == ["SamSplitModel"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sam_split.SamSplitConfig",
        "AutoModel": "modeling_sam_split.SamSplitModel",
        "AutoModelForMaskGeneration": "modeling_sam_split.SamSplitModel",
    }
    assert {file.name for file in path.glob("*.py")} == CODE

    for auto_class in (AutoModel, AutoModelForMaskGeneration):
        reloaded = auto_class.from_pretrained(path, trust_remote_code=True)
        assert reloaded.dtype == model.dtype
        for name, tensor in model.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert logged == []


def test_vision_model(stock_dir, tmp_path, inputs, logged):
    model = split_class("SamSplitVisionModel").from_pretrained(stock_dir)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    reloaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(reloaded).__name__ == "SamSplitVisionModel"
    stock = reloaded.to_sam()
    assert type(stock) is SamVisionModel
    stock.save_pretrained(tmp_path / "stock")
    stock = SamVisionModel.from_pretrained(tmp_path / "stock")
    assert_holds_weights_of(reloaded, stock)
    with torch.no_grad():
        assert_same_outputs(stock(inputs["pixel_values"]), model(inputs["pixel_values"]))
    assert logged == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_to_stock(dtype, load, stock, inputs, tmp_path, logged):
    model = load(dtype=dtype)
    stock_again = model.to_sam()
    assert type(stock_again) is SamModel
    assert stock_again.dtype == dtype
    assert stock_again.device == model.device
    assert not stock_again.training
    assert_holds_weights_of(model, stock_again, dtype)
    tied = stock_again.prompt_encoder.shared_embedding.positional_embedding
    assert tied is stock_again.shared_image_embedding.positional_embedding

    stock_again.save_pretrained(tmp_path / "stock")
    assert {file.name for file in (tmp_path / "stock").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["model_type"] == "sam"
    assert config["architectures"] == ["SamModel"]
    assert "auto_map" not in json.dumps(config)
    assert "split" not in json.dumps(config)
    for auto_class in (SamModel, AutoModel):
        reloaded, info = auto_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
        assert type(reloaded) is SamModel
        assert not any(info.values())
        for name, tensor in stock.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor.to(dtype)), name
    assert logged == []


def test_back_to_stock_is_a_copy(load, stock):
    model = load()
    stock_again = model.to_sam()
    with torch.no_grad():
        for parameter in stock_again.parameters():
            parameter.zero_()
    assert_holds_weights_of(model, stock)


@pytest.mark.parametrize("vision", [{"qkv_bias": False}, {"use_rel_pos": False}, {"use_abs_pos": False}], ids=str)
def test_back_to_stock_of_unusual_shapes(vision, tmp_path):
    stock = stock_model(**vision)
    stock.save_pretrained(tmp_path)
    model = split_class().from_pretrained(tmp_path)
    assert_holds_weights_of(model, model.to_sam())


def test_offloaded_model_is_not_converted(load, tmp_path):
    names = [name for name, _ in load().named_children() if name != "vision_encoder"]
    model = load(device_map=dict.fromkeys(names, "cpu") | {"vision_encoder": "disk"}, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="without device_map"):
        model.to_sam()


def test_saving_does_not_touch_other_models(split_dir, stock, tmp_path):
    """Our conversion must not leak into stock SAM, in a process that uses both."""
    AutoModel.from_pretrained(split_dir, trust_remote_code=True)
    stock.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stock.state_dict().keys() - {TIED}
    reloaded, info = SamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in reloaded.state_dict().items())


@pytest.mark.parametrize("source", ["stock_dir", "split_dir"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_saving_over_the_folder_of_live_models(source, max_shard_size, request, inputs, tmp_path):
    """They are memory-mapped on its files, which must not change under them."""
    path = shutil.copytree(request.getfixturevalue(source), tmp_path / "model")
    model, other = (split_class().from_pretrained(path) for _ in range(2))
    expected = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with torch.no_grad():
        model.vision_encoder.layers[0].attn.q.weight.add_(1)
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(path, max_shard_size=max_shard_size)
    for live, weights in ((model, changed), (other, expected)):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in live.state_dict().items())
    reloaded = AutoModel.from_pretrained(path, trust_remote_code=True)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in reloaded.state_dict().items())
    assert not [*path.glob(".*")]


def test_saving_that_writes_no_weights_keeps_those_there(load, split_dir, stock, inputs, tmp_path, monkeypatch):
    path = shutil.copytree(split_dir, tmp_path / "model")
    model = load(path)
    monkeypatch.setattr(type(model), "state_dict", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(path)
    monkeypatch.undo()
    model.add_adapter(LoraConfig(target_modules=["q", "v"]))
    model.save_pretrained(path)
    assert (path / "adapter_model.safetensors").exists()
    (path / "adapter_config.json").unlink()
    assert_holds_weights_of(load(path), stock)
