"""Every way of loading gives the checkpoint's weights and stock's outputs without warnings, or a clear error."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_holds_weights_of, assert_same_outputs, rewrite, run_python, stock_model, tiny_config
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    SamModel,
    SamVisionModel,
    pipeline,
)

from checkpoint_tools.checkout import SAM_TINY, split_class


@pytest.fixture
def fused_repo(split_dir: Path, stock_dir: Path, tmp_path: Path) -> Path:
    """A model repo of ours into which stock, fused weights were put."""
    path = tmp_path / "fused-repo"
    shutil.copytree(split_dir, path)
    shutil.copy(stock_dir / "model.safetensors", path)
    return path


def check(model, stock, inputs, logged, tolerance: float = 1e-5) -> None:
    assert type(model).__name__ == "SamSplitModel"
    assert_holds_weights_of(model, stock, model.dtype)
    with torch.no_grad():
        assert_same_outputs(model(**inputs), stock(**inputs), tolerance)
    assert logged == []


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskGeneration])
@pytest.mark.parametrize("repo", ["split_dir", "fused_repo"])
def test_model_repo(auto_class, repo, request, stock, inputs, logged):
    path = request.getfixturevalue(repo)
    model, info = auto_class.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    check(model, stock, inputs, logged)


def test_auto_config(split_dir, logged):
    config = AutoConfig.from_pretrained(split_dir, trust_remote_code=True)
    assert (config.model_type, config.vision_config.model_type) == ("sam_split", "sam_split_vision_model")
    assert logged == []


def test_stock_directory(stock_dir, stock, inputs, logged):
    model = split_class().from_pretrained(stock_dir)
    assert model.config.model_type == "sam_split"
    check(model, stock, inputs, logged)


def test_stock_configuration_object(stock_dir, stock, inputs, logged):
    check(split_class().from_pretrained(stock_dir, config=stock.config), stock, inputs, logged)
    assert type(stock.config).__name__ == "SamConfig"


@pytest.mark.parametrize("source", ["stock_dir", "split_dir"])
def test_vision_model_from_full_checkpoint(source, request, stock_dir, inputs, logged):
    path = request.getfixturevalue(source)
    model, info = split_class("SamSplitVisionModel").from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    assert logged == []
    stock = SamVisionModel.from_pretrained(stock_dir)
    assert_holds_weights_of(model, stock)
    with torch.no_grad():
        assert_same_outputs(model(inputs["pixel_values"]), stock(inputs["pixel_values"]))


def test_vision_only_checkpoint(stock_dir, tmp_path, inputs, logged):
    stock = SamVisionModel.from_pretrained(stock_dir)
    stock.save_pretrained(tmp_path)
    logged.clear()
    model = split_class("SamSplitVisionModel").from_pretrained(tmp_path)
    assert logged == []
    assert_holds_weights_of(model, stock)


def test_sharded(stock, tmp_path, inputs, logged):
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check(split_class().from_pretrained(tmp_path), stock, inputs, logged)


def test_pytorch_bin(stock, stock_dir, tmp_path, inputs, logged):
    shutil.copy(stock_dir / "config.json", tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    SamModel.from_pretrained(tmp_path)
    logged_by_stock = [logged.pop() for _ in list(logged)]  # transformers 5.0 has a word on the tied embedding
    model = split_class().from_pretrained(tmp_path)
    assert logged == logged_by_stock
    check(model, stock, inputs, logged=[])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("repo", ["split_dir", "fused_repo"])
def test_half_precision(dtype, repo, request, stock_dir, inputs, logged):
    path = request.getfixturevalue(repo)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=dtype)
    stock = SamModel.from_pretrained(stock_dir, dtype=dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    check(model, stock, inputs, logged, tolerance=0.05)


def test_half_precision_checkpoint(stock_dir, tmp_path, logged):
    stock = SamModel.from_pretrained(stock_dir, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path)
    model = split_class().from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert_holds_weights_of(model, stock, torch.bfloat16)
    assert logged == []


@pytest.mark.parametrize("repo", ["split_dir", "fused_repo"])
def test_device_map_auto(repo, request, stock, inputs, logged):
    path = request.getfixturevalue(repo)
    check(AutoModel.from_pretrained(path, trust_remote_code=True, device_map="auto"), stock, inputs, logged)


@pytest.mark.parametrize("repo", ["split_dir", "fused_repo"])
def test_disk_offload(repo, request, stock, inputs, tmp_path):
    path = request.getfixturevalue(repo)
    offloaded = {"vision_encoder.layers.0": "disk", "vision_encoder.layers.1": "disk"}
    rest = [f"vision_encoder.{name}" for name in ("patch_embed", "pos_embed", "layers.2", "neck")]
    rest += ["shared_image_embedding", "prompt_encoder", "mask_decoder"]
    model = AutoModel.from_pretrained(
        path,
        trust_remote_code=True,
        device_map=offloaded | dict.fromkeys(rest, "cpu"),
        offload_folder=tmp_path / "offload",
    )
    assert model.vision_encoder.layers[0].attn.q.weight.is_meta
    with torch.no_grad():
        assert_same_outputs(model(**inputs), stock(**inputs))


@pytest.mark.parametrize("repo", ["split_dir", "fused_repo"])
def test_4bit(repo, request, inputs, tmp_path):
    """The peer is the same model quantized layer by layer with bitsandbytes itself."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    path = request.getfixturevalue(repo)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModel.from_pretrained(path, trust_remote_code=True, quantization_config=quantization)
    plain = AutoModel.from_pretrained(path, trust_remote_code=True)
    for plain_layer, layer in zip(plain.vision_encoder.layers, model.vision_encoder.layers, strict=True):
        for name in "qkv":
            projection, quantized = plain_layer.attn.get_submodule(name), layer.attn.get_submodule(name)
            assert isinstance(quantized, bitsandbytes.nn.Linear4bit)
            expected = bitsandbytes.functional.quantize_4bit(projection.weight.data, quant_type="fp4")
            dequantized = bitsandbytes.functional.dequantize_4bit(*expected)
            actual = bitsandbytes.functional.dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
            assert torch.equal(actual, dequantized)
            assert torch.equal(projection.bias, quantized.bias)


@pytest.mark.parametrize(
    "vision",
    [
        {"qkv_bias": False},
        {"use_rel_pos": False},
        {"use_abs_pos": False},
        {"window_size": 0},
        {"global_attn_indexes": [0, 1, 2]},
        {"hidden_size": 40, "num_attention_heads": 1, "mlp_dim": None},
    ],
    ids=str,
)
def test_unusual_shapes(vision, tmp_path, inputs, logged):
    stock = stock_model(**vision)
    stock.save_pretrained(tmp_path)
    check(split_class().from_pretrained(tmp_path), stock, inputs, logged)


@pytest.mark.parametrize(
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "global_attn_indexes"),
    [(1024, 24, 16, [5, 11, 17, 23]), (1280, 32, 16, [7, 15, 23, 31])],
    ids=["ViT-L", "ViT-H"],
)
def test_large_models_have_the_shapes_of_stock(
    hidden_size, num_hidden_layers, num_attention_heads, global_attn_indexes
):
    stock_config = tiny_config(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        global_attn_indexes=global_attn_indexes,
        image_size=1024,
        patch_size=16,
        window_size=14,
    )
    with torch.device("meta"):
        stock = SamModel(stock_config)
        split = split_class()(stock_config)
    assert split.num_parameters() == stock.num_parameters()
    shapes = {name: tensor.shape for name, tensor in split.to("meta").state_dict().items()}
    for name, tensor in stock.state_dict().items():
        if ".attn.qkv." in name:
            rows, *columns = tensor.shape
            for part in "qkv":
                assert shapes.pop(name.replace(".qkv.", f".{part}.")) == (rows // 3, *columns)
        else:
            assert shapes.pop(name) == tensor.shape
    assert not shapes


ATTENTION = "vision_encoder.layers.1.attn"


@pytest.mark.parametrize("lost", ["q.weight", "k.bias", "v.weight", "proj.bias", "rel_pos_h"])
def test_lost_attention_weight_raises(lost, split_dir, tmp_path, load):
    path = rewrite(shutil.copytree(split_dir, tmp_path / "repo"), lambda weights: weights.pop(f"{ATTENTION}.{lost}"))
    with pytest.raises(ValueError, match=rf"missing: {ATTENTION}\.{lost}"):
        load(path)


def test_lost_fused_weight_raises(stock_dir, tmp_path):
    path = rewrite(
        shutil.copytree(stock_dir, tmp_path / "sam"), lambda weights: weights.pop(f"{ATTENTION}.qkv.weight")
    )
    with pytest.raises(ValueError, match=rf"{ATTENTION}\.k\.weight, {ATTENTION}\.q\.weight, {ATTENTION}\.v\.weight"):
        split_class().from_pretrained(path)


@pytest.mark.parametrize("parts", ["q", "k", "v", "qkv"])
def test_both_forms_raise(parts, stock_dir, tmp_path):
    def add(weights):
        for part in parts:
            weights[f"{ATTENTION}.{part}.weight"] = torch.zeros(28, 28)

    path = rewrite(shutil.copytree(stock_dir, tmp_path / "sam"), add)
    with pytest.raises(ValueError, match=rf"both fused and separate: {ATTENTION}\.{min(parts)}\.weight"):
        split_class().from_pretrained(path)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (28, rf"{ATTENTION}\.qkv\.weight has shape \(28, 28\)"),
        (83, rf"{ATTENTION}\.qkv\.weight has shape \(83, 28\)"),
        (3, rf"of another shape: {ATTENTION}\.k\.weight \(1, 28\), in the model \(28, 28\)"),
    ],
)
@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_wrong_shape_raises(rows, problem, ignore_mismatched_sizes, stock_dir, tmp_path):
    def shorten(weights):
        weights[f"{ATTENTION}.qkv.weight"] = weights[f"{ATTENTION}.qkv.weight"][:rows].clone()

    path = rewrite(shutil.copytree(stock_dir, tmp_path / "sam"), shorten)
    with pytest.raises(ValueError, match=problem):
        split_class().from_pretrained(path, ignore_mismatched_sizes=ignore_mismatched_sizes)


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("qkv_bias", False, r"not in the model: vision_encoder\.layers\.0\.attn\.k\.bias"),
        ("num_hidden_layers", 2, r"not in the model: vision_encoder\.layers\.2\.attn\.k\.bias"),
        ("num_hidden_layers", 4, r"missing: vision_encoder\.layers\.3\.attn\.k\.bias"),
        ("use_rel_pos", False, r"not in the model: vision_encoder\.layers\.0\.attn\.rel_pos_h"),
    ],
)
def test_configuration_of_another_checkpoint_raises(setting, value, problem, stock_dir, tmp_path):
    path = shutil.copytree(stock_dir, tmp_path / "sam")
    config = json.loads((path / "config.json").read_text())
    config["vision_config"][setting] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=problem):
        split_class().from_pretrained(path)


def test_another_architecture_raises(tmp_path):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' model, but only SAM v1"):
        split_class().from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "header too small"), (b"not safetensors", "header too large"), (None, "file not fully covered")],
    ids=["empty", "garbage", "truncated"],
)
def test_corrupt_file_raises(content, problem, stock_dir, tmp_path):
    path = shutil.copytree(stock_dir, tmp_path / "sam")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(SafetensorError, match=problem):
        split_class().from_pretrained(path)


@pytest.mark.slow
def test_edited_code_is_picked_up_on_reload(split_dir, tmp_path):
    """By the next process as it is, by this one once it has dropped the old code (as CONTRIBUTING.md says)."""
    path = shutil.copytree(split_dir, tmp_path / "edited")
    load = f'AutoModel.from_pretrained("{path}", trust_remote_code=True)'
    code = path / "modeling_sam_split.py"
    run_python(
        f"""
        import sys
        from pathlib import Path
        from transformers import AutoModel

        assert not hasattr({load}, "edited")
        code = Path("{code}")
        code.write_text(code.read_text() + "\\nSamSplitModel.edited = True\\n")
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]
        assert {load}.edited
        """
    )
    run_python(f"from transformers import AutoModel; assert {load}.edited")


@pytest.mark.slow
def test_transformers_below_the_floor_is_named(split_dir):
    """In a new process that reports transformers 4."""
    output = run_python(
        f"""
        import importlib.metadata
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "4.57.6" if name == "transformers" else version(name)
        from transformers import AutoModel
        AutoModel.from_pretrained("{split_dir}", trust_remote_code=True)
        """,
        expect_failure=True,
    )
    assert "ImportError: transformers>=5.0.0 is required" in output
    assert "pip install -U transformers" in output


def test_no_remote_code_without_trust(split_dir):
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(split_dir, trust_remote_code=False)


@pytest.fixture(params=["split", "adapted", "merged"])
def generators(request, tmp_path) -> list:
    """The mask generation of sam-tiny, split, and of stock. Masks of random weights hardly depend on attention."""
    model = split_class().from_pretrained(SAM_TINY)
    stock = SamModel.from_pretrained(SAM_TINY)
    if request.param == "split":
        model.save_pretrained(tmp_path)
        model = str(tmp_path)
    else:
        adapted = get_peft_model(model, LoraConfig(target_modules=["q", "v"], init_lora_weights=False)).eval()
        stock = copy.deepcopy(adapted).merge_and_unload().to_sam()
        model = adapted.get_base_model() if request.param == "adapted" else adapted.merge_and_unload()
    options = {"image_processor": AutoImageProcessor.from_pretrained(SAM_TINY)}
    return [
        pipeline("mask-generation", model, trust_remote_code=True, **options),
        pipeline("mask-generation", stock, **options),
    ]


MASK_LIMITS = {"pred_iou_thresh": -100.0, "stability_score_thresh": 0.0, "stability_score_offset": 0.1}


def test_mask_generation_pipeline_up_to_duplicates(generators):
    """Without the removal of duplicate masks, which needs torchvision."""
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    actual, expected = (
        next(generator.forward(batch, **MASK_LIMITS) for batch in generator.preprocess(image, points_per_batch=8))
        for generator in generators
    )
    assert len(actual["masks"]) == len(expected["masks"]) > 0
    assert all(np.array_equal(*masks) for masks in zip(actual["masks"], expected["masks"], strict=True))
    torch.testing.assert_close(actual["iou_scores"], expected["iou_scores"])


def test_mask_generation_pipeline(generators):
    pytest.importorskip("torchvision", reason="duplicate masks are removed with torchvision")
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    actual, expected = (generator(image, points_per_crop=4, **MASK_LIMITS) for generator in generators)
    assert len(actual["masks"]) == len(expected["masks"]) > 0
    assert all(np.array_equal(*masks) for masks in zip(actual["masks"], expected["masks"], strict=True))
    torch.testing.assert_close(actual["scores"], expected["scores"])
