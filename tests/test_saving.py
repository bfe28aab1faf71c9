"""What is saved is always split and loads again by itself; `to_sam()` gives stock SAM back."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from conftest import NEEDS_ADD_ADAPTER, assert_holds_weights_of, assert_same_outputs, run_python, stock_model
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskGeneration, SamModel, SamVisionModel

from checkpoint_tools.checkout import ROOT, split_class


TIED = "prompt_encoder.shared_embedding.positional_embedding"
CODE = {path.name for path in ROOT.glob("*_sam_split.py")}


@pytest.fixture(params=["stock directory", "split repo", "fused repo", "scratch", "load_state_dict", "to bfloat16"])
def model(request, stock_dir, split_dir, stock, tmp_path):
    """The model, loaded in every way."""
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


@pytest.mark.slow
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


def test_accelerate_saves_all_weights(model, tmp_path):
    """It leaves out tensors that share memory with others."""
    Accelerator(cpu=True).save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() - {TIED}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())


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


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_saving_over_the_folder_of_live_models(max_shard_size, split_dir, tmp_path):
    """They are memory-mapped on its files, which must not change under them."""
    path = tmp_path / "model"
    split_class().from_pretrained(split_dir).save_pretrained(path, max_shard_size=max_shard_size)
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


SAVES = [
    ({}, {"variant": "fp16"}),
    ({"variant": "fp16"}, {}),
    ({}, {"max_shard_size": "20KB"}),
    ({"max_shard_size": "20KB"}, {}),
    ({"max_shard_size": "20KB"}, {"max_shard_size": "9KB"}),
    ({"max_shard_size": "20KB", "variant": "fp16"}, {"max_shard_size": "9KB"}),
]


@pytest.mark.parametrize("saves", SAVES, ids=str)
def test_deletes_what_stock_deletes(saves, load, stock, tmp_path):
    """That is its own shards of an earlier save, and nothing else."""
    others = {"model_best.safetensors", "model-ema.safetensors", "pytorch_model.bin"}
    sharded = []
    for name, model in (("split", load()), ("stock", stock)):
        path = tmp_path / name
        (path / "model-x.safetensors").mkdir(parents=True)
        for other in others:
            (path / other).write_bytes(b"of the user")
        model.save_pretrained(path, **saves[0])
        before = {file.name for file in path.iterdir()}
        model.save_pretrained(path, **saves[1])
        gone = before - {file.name for file in path.iterdir()}
        sharded.append({"-of-" in file for file in gone})
        assert others - gone <= {file.name for file in path.iterdir()}
        assert all(re.fullmatch(r"model(\.fp16)?-\d{5}-of-\d{5}\.(safetensors|bin)", file) for file in gone)
    assert sharded[0] == sharded[1]


def test_new_shards_beside_an_older_single_file_are_told_of(load, tmp_path, caplog):
    """Stock leaves the single file, too, which from_pretrained prefers to the new shards, but says nothing."""
    model = load()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.vision_encoder.layers[0].attn.q.weight.add_(1)
    assert not caplog.messages
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert "would load the older" in caplog.text
    assert "remove it" in caplog.text
    (tmp_path / "model.safetensors").unlink()
    assert_holds_weights_of(load(tmp_path), model.to_sam())


def test_saved_beside_outdated_pickles(load, split_dir, stock, tmp_path):
    torch.save({name: torch.zeros_like(tensor) for name, tensor in stock.state_dict().items()}, tmp_path / "p.bin")
    (tmp_path / "p.bin").rename(tmp_path / "pytorch_model.bin")
    load().save_pretrained(tmp_path)
    assert_holds_weights_of(load(tmp_path), stock)


def test_fused_state_dict_is_saved_split(load, stock, tmp_path):
    load().save_pretrained(tmp_path, state_dict=stock.state_dict())
    assert not any("qkv" in key for key in load_file(tmp_path / "model.safetensors"))
    assert_holds_weights_of(load(tmp_path), stock)


def test_names_of_a_subclass_are_kept(load, tmp_path):
    """A `qkv` outside of the vision attention is not ours to split."""
    state_dict = {**load().state_dict(), "head.qkv.weight": torch.ones(3, 1), "head.my_qkv.weight": torch.ones(3, 1)}
    load().save_pretrained(tmp_path, state_dict=state_dict)
    assert {"head.qkv.weight", "head.my_qkv.weight"} <= load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to kill many savers at little cost")
def test_killed_while_saving(load, tmp_path):
    """At 40 moments of a save over another: what lies there is the old or the new weights, and loads."""
    run_python(
        f"""
        import os, signal, time
        import torch
        from transformers import AutoModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(1)
        model = AutoModel.from_pretrained({str(load().config._name_or_path)!r}, trust_remote_code=True)
        marked = model.vision_encoder.layers[0].attn.q.bias
        original = marked.detach().unique()
        start = time.perf_counter()
        model.save_pretrained({str(tmp_path)!r})
        duration = time.perf_counter() - start
        for attempt in range(40):
            with torch.no_grad():
                marked.fill_(attempt + 1)
            child = os.fork()
            if child == 0:
                model.save_pretrained({str(tmp_path)!r})
                os._exit(0)
            time.sleep(duration * attempt / 40)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            saved = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
            value = saved.vision_encoder.layers[0].attn.q.bias.unique()
            assert torch.equal(value, original) or len(value) == 1, value
        """
    )


def test_two_savers_at_once(load, stock, tmp_path):
    models = [load() for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        for _ in range(6):
            list(pool.map(lambda model: model.save_pretrained(tmp_path), models))
            assert_holds_weights_of(load(tmp_path), stock)


@NEEDS_ADD_ADAPTER
def test_saving_an_adapter_keeps_the_weights_there(load, split_dir, stock, tmp_path):
    path = shutil.copytree(split_dir, tmp_path / "model")
    model = load(path)
    model.add_adapter(LoraConfig(target_modules=["q", "v"]))
    model.save_pretrained(path)
    assert (path / "adapter_model.safetensors").exists()
    (path / "adapter_config.json").unlink()
    assert_holds_weights_of(load(path), stock)
