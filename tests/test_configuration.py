"""Stock configurations are converted without warnings; invalid settings raise."""

import json

import pytest
from conftest import tiny_config
from transformers import AutoConfig, SamConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from checkpoint_tools.staging import ROOT, split_class


@pytest.fixture
def config_class():
    return get_class_from_dynamic_module("configuration_sam_split.SamSplitConfig", str(ROOT))


@pytest.mark.parametrize("road", ["directory", "keywords", "dict", "sub-config"])
def test_stock_configuration(road, config_class, tmp_path, logged):
    stock = tiny_config()
    if road == "directory":
        stock.save_pretrained(tmp_path)
        config = config_class.from_pretrained(tmp_path)
    elif road == "keywords":
        config = config_class(**stock.to_dict())
    elif road == "dict":
        config = config_class.from_dict(stock.to_dict())
    else:
        config = config_class(
            vision_config=stock.vision_config,
            prompt_encoder_config=stock.prompt_encoder_config,
            mask_decoder_config=stock.mask_decoder_config,
        )
    assert logged == []
    assert (config.model_type, config.vision_config.model_type) == ("sam_split", "sam_split_vision_model")
    config.save_pretrained(tmp_path / "saved")
    on_disk = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert on_disk["model_type"] == "sam_split"
    assert on_disk["vision_config"]["model_type"] == "sam_split_vision_model"
    reloaded = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for name, value in stock.vision_config.to_dict().items():
        if name not in ("model_type", "transformers_version"):
            assert reloaded.vision_config.to_dict()[name] == value, name


def test_back_to_stock(config_class):
    stock = config_class(**tiny_config().to_dict(), attn_implementation="eager").to_sam()
    assert type(stock) is SamConfig
    assert (stock.model_type, stock.vision_config.model_type) == ("sam", "sam_vision_model")
    assert stock._attn_implementation == stock.vision_config._attn_implementation == "eager"
    expected = tiny_config().to_dict()
    assert {name: value for name, value in stock.to_dict().items() if name in expected} == expected


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size=28 is not divisible by num_attention_heads=3"),
        ({"global_attn_indexes": [3]}, "only layers 0 to 2"),
        ({"global_attn_indexes": [-1]}, "only layers 0 to 2"),
        ({"patch_size": 7}, "image_size=64 is not a multiple of patch_size=7"),
    ],
    ids=str,
)
def test_broken_settings_raise(vision, message, config_class, tmp_path):
    broken = tiny_config(**vision)
    with pytest.raises(ValueError, match=message):
        config_class(**broken.to_dict())
    broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        split_class()(broken)


@pytest.mark.parametrize(
    ("implementation", "transformers_message"),
    [
        ("flash_attention_2", "SamSplitModel does not support Flash Attention 2"),
        (
            "flex_attention",
            "SamSplitModel does not support an attention implementation through torch's flex_attention",
        ),
        ("nonsense", 'Specified `attn_implementation="nonsense"` is not supported'),
    ],
)
def test_unknown_attention_raises(implementation, transformers_message, config_class, load):
    message = f"attn_implementation='{implementation}' is not supported: choose one of 'eager', 'sdpa'"
    with pytest.raises(ValueError, match=message):
        config_class(attn_implementation=implementation)
    with pytest.raises(ValueError, match=message):
        load(attn_implementation=implementation)
    model = load()
    with pytest.raises(ValueError, match=transformers_message):
        model.set_attn_implementation(implementation)
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_each_part_keeps_its_attention(split_dir, load, stock, inputs):
    config = AutoConfig.from_pretrained(split_dir, trust_remote_code=True)
    implementations = {"": "sdpa", "vision_config": "eager"}
    model = load(attn_implementation=implementations)
    assert model.vision_encoder.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    config.vision_config._attn_implementation = "eager"
    assert type(model)(config).vision_encoder.config._attn_implementation == "eager"
