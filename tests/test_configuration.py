"""Stock configurations are converted without warnings; invalid settings raise."""

import json
import shutil

import pytest
from conftest import tiny_config
from transformers import AutoConfig, SamConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from checkpoint_tools.checkout import ROOT, split_class


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
    ("implementation", "message"),
    [
        ("flash_attention_2", "does not support Flash Attention 2"),
        ("flex_attention", "does not support an attention implementation through torch's flex_attention"),
        ("nonsense", 'Specified `attn_implementation="nonsense"` is not supported'),
    ],
)
@pytest.mark.parametrize("part", ["", "vision_config"])
def test_unknown_attention_raises(implementation, message, part, load):
    with pytest.raises(ValueError, match=message):
        load(attn_implementation={part: implementation})
    model = load()
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation({part: implementation})
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_each_part_keeps_its_attention(split_dir, load, stock, inputs):
    config = AutoConfig.from_pretrained(split_dir, trust_remote_code=True)
    implementations = {"": "sdpa", "vision_config": "eager"}
    model = load(attn_implementation=implementations)
    assert model.vision_encoder.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    config.vision_config._attn_implementation = "eager"
    assert type(model)(config).vision_encoder.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        ("vision_config", "image_size", [9]),
        ("vision_config", "image_size", 64.0),
        ("vision_config", "hidden_size", "28"),
        ("vision_config", "hidden_size", 0),
        ("vision_config", "patch_size", 0),
        ("vision_config", "num_hidden_layers", -1),
        ("vision_config", "num_attention_heads", True),
        ("vision_config", "num_attention_heads", None),
        ("vision_config", "qkv_bias", 1),
        ("vision_config", "global_attn_indexes", 1),
        ("vision_config", "global_attn_indexes", ["1"]),
        ("vision_config", "mlp_dim", "32"),
        ("vision_config", "layer_norm_eps", "1e-6"),
        ("vision_config", "attention_tile_bytes", "8MB"),
        ("vision_config", "attention_tile_bytes", 0),
        ("prompt_encoder_config", "patch_size", "8"),
        ("mask_decoder_config", "num_multimask_outputs", [3]),
    ],
    ids=str,
)
def test_wrongly_typed_settings_are_named(part, setting, value, config_class):
    settings = tiny_config().to_dict()
    settings[part][setting] = value
    with pytest.raises(ValueError, match=f"{setting}="):
        config_class(**settings)


@pytest.mark.parametrize("part", ["vision_config", "prompt_encoder_config", "mask_decoder_config"])
def test_parts_that_are_no_dictionaries_are_named(part, config_class):
    with pytest.raises(ValueError, match=f"{part}="):
        config_class(**{**tiny_config().to_dict(), part: ["no", "dictionary"]})


def test_file_that_is_no_configuration(config_class, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("vision_only", [False, True])
def test_tile_bytes_are_given_on_load_and_not_saved(vision_only, split_dir, load, tmp_path):
    if vision_only:
        split_class("SamSplitVisionModel").from_pretrained(split_dir).save_pretrained(tmp_path / "vision")
    source = tmp_path / "vision" if vision_only else split_dir
    assert load(source).config.attention_tile_bytes is None
    model = load(source, attention_tile_bytes=2**20)
    assert model.config.attention_tile_bytes == model.vision_encoder.config.attention_tile_bytes == 2**20
    model.save_pretrained(tmp_path / "saved")
    assert "tile_bytes" not in (tmp_path / "saved" / "config.json").read_text()
    assert load(tmp_path / "saved").config.attention_tile_bytes is None
    with pytest.raises(ValueError, match="attention_tile_bytes='8MB'"):
        load(source, attention_tile_bytes="8MB")


def test_old_files_that_hold_tile_bytes_still_load(split_dir, load, tmp_path):
    """As version 0.1 saved them: they say nothing of the machine that they are loaded on."""
    path = shutil.copytree(split_dir, tmp_path / "old")
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["attention_tile_bytes"] = 8 * 2**20
    (path / "config.json").write_text(json.dumps(config))
    assert load(path).config.vision_config.attention_tile_bytes is None


def test_sub_configs_name_our_class(config_class):
    assert config_class.sub_configs["vision_config"].__name__ == "SamSplitVisionConfig"
    assert type(config_class().vision_config) is config_class.sub_configs["vision_config"]


def test_saved_configuration_names_the_version_of_the_code(config_class, split_dir):
    code = (ROOT / "configuration_sam_split.py").read_text()
    version = json.loads((split_dir / "config.json").read_text())["sam_split_version"]
    assert f'SAM_SPLIT_VERSION = "{version}"' in code
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text().replace("[", "").replace("]", "")


def test_configuration_saved_alone_names_the_code_beside_it(config_class, tmp_path):
    """And not in the repo on the Hub that it was loaded from, as transformers notes it."""
    config = config_class(**tiny_config().to_dict())
    config.auto_map = {"AutoConfig": "user/repo--configuration_sam_split.SamSplitConfig"}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_sam_split.SamSplitConfig"
    }
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "SamSplitConfig"
