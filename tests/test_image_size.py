"""`image_size=` of `from_pretrained`: the position tables of a checkpoint, interpolated for another side."""

import json

import pytest
import torch
from conftest import TINY, assert_holds_weights_of, assert_same_outputs
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BitsAndBytesConfig, SamConfig, SamModel, ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings

from checkpoint_tools.checkout import split_class
from checkpoint_tools.meta_layout import meta_from_sam, sam_from_meta


NATIVE = 64  # a grid of 8 x 8 patches
SIDES = (32, 96, 120)  # grids of 4, 12 and 15: windows of 3 that divide the grid, and that do not


def interpolated_stock(stock: SamModel, side: int) -> SamModel:
    """Stock SAM for another side, whose own code interpolates the relative positions in each forward pass."""
    prompts = {**TINY["prompt_encoder_config"], "image_size": side}
    vision = {**TINY["vision_config"], "image_size": side}
    model = SamModel(SamConfig(**{**TINY, "vision_config": vision, "prompt_encoder_config": prompts})).eval()
    weights = stock.state_dict()
    # transformers' own interpolation of absolute positions, which takes those of a class token, too
    embeddings = ViTEmbeddings(ViTConfig(hidden_size=28, image_size=NATIVE, patch_size=8))
    table = weights.pop("vision_encoder.pos_embed").flatten(1, 2)
    embeddings.position_embeddings.data = torch.cat([torch.zeros(1, 1, 28), table], 1)
    tokens = torch.zeros(1, 1 + (side // 8) ** 2, 28)
    absolute = embeddings.interpolate_pos_encoding(tokens, side, side)[:, 1:]
    weights["vision_encoder.pos_embed"] = absolute.view(1, side // 8, side // 8, 28)
    for layer, attention in enumerate(model.vision_encoder.layers):
        for name in ("rel_pos_h", "rel_pos_w"):
            table = weights[f"vision_encoder.layers.{layer}.attn.{name}"]
            setattr(attention.attn, name, torch.nn.Parameter(table.clone()))
    model.load_state_dict(weights)
    return model


def inputs_of(side: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, side, side, generator=generator),
        "input_points": side * torch.rand(2, 2, 1, 2, generator=generator),
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("repo", ["split_dir", "stock_dir"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_outputs_are_those_of_interpolated_tables(side, repo, attn_implementation, request, stock):
    model = split_class().from_pretrained(
        request.getfixturevalue(repo), image_size=side, attn_implementation=attn_implementation
    )
    assert_same_outputs(model.eval()(**inputs_of(side)), interpolated_stock(stock, side)(**inputs_of(side)))


@pytest.mark.parametrize("repo", ["split_dir", "stock_dir"])
def test_native_side_changes_no_bit(repo, request, stock, logged):
    model = split_class().from_pretrained(request.getfixturevalue(repo), image_size=NATIVE)
    assert_holds_weights_of(model, stock)
    assert not logged


def test_windows_keep_their_tables(load, stock):
    actual, expected = load(image_size=96).state_dict(), stock.state_dict()
    resized = {name for name in actual.keys() & expected.keys() if actual[name].shape != expected[name].shape}
    tables = {f"vision_encoder.layers.1.attn.rel_pos_{axis}" for axis in "hw"}  # of the one global layer
    assert resized == {"vision_encoder.pos_embed", *tables}


@torch.no_grad()
def test_saved_at_the_new_side(load, tmp_path, logged):
    model = load(image_size=96).eval()
    expected = model(**inputs_of(96))
    model.save_pretrained(tmp_path / "split")
    model.to_sam().save_pretrained(tmp_path / "stock")
    config = json.loads((tmp_path / "split" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == config["prompt_encoder_config"]["image_size"] == 96
    assert config["prompt_encoder_config"]["image_embedding_size"] == 12
    assert "interpolate" not in json.dumps(config)
    assert_same_outputs(load(tmp_path / "split").eval()(**inputs_of(96)), expected, tolerance=0)
    assert_same_outputs(SamModel.from_pretrained(tmp_path / "stock").eval()(**inputs_of(96)), expected)
    assert not logged


@torch.no_grad()
def test_a_saved_side_can_change_again(load, tmp_path):
    load(image_size=96).save_pretrained(tmp_path)
    back = load(tmp_path, image_size=NATIVE)
    assert back.config.vision_config.image_size == NATIVE
    assert back(**inputs_of(NATIVE)).pred_masks.shape[-1] == 32


def test_meta_layout_at_the_new_side(load):
    stock = load(image_size=96).to_sam()
    back = sam_from_meta(meta_from_sam(stock), decoder_heads=2)
    assert back.config.vision_config.image_size == back.config.prompt_encoder_config.image_size == 96
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("source", ["stock_dir", "split_dir"])
@torch.no_grad()
def test_vision_model(source, request, stock, tmp_path, logged):
    vision = split_class("SamSplitVisionModel").from_pretrained(request.getfixturevalue(source), image_size=96)
    pixel_values = inputs_of(96)["pixel_values"]
    assert_same_outputs(vision.eval()(pixel_values), interpolated_stock(stock, 96).vision_encoder(pixel_values))
    vision.save_pretrained(tmp_path)
    by_auto = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, image_size=NATIVE)
    assert by_auto.vision_encoder.pos_embed.shape == (1, 8, 8, 28)
    assert logged == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, load):
    half, full = load(image_size=96, dtype=dtype).state_dict(), load(image_size=96).state_dict()
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, full[name].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
        assert tensor.dtype == dtype


@pytest.mark.slow
def test_4bit(load):
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    actual, expected = (load(image_size=96, **kwargs).vision_encoder for kwargs in (options, {}))
    for name in ("pos_embed", "layers.1.attn.rel_pos_h", "layers.0.attn.rel_pos_h"):
        table = actual.get_parameter(name).float()
        torch.testing.assert_close(table, expected.get_parameter(name), rtol=0.02, atol=0.02)


def test_adapters_move_between_sides(load, tmp_path):
    trained = get_peft_model(load(), LoraConfig(target_modules=["q", "v"], init_lora_weights=False))
    trained.save_pretrained(tmp_path)
    resized = load(image_size=96)
    before = resized(**inputs_of(96)).pred_masks
    resized = type(trained).from_pretrained(resized, tmp_path)
    assert not torch.equal(resized(**inputs_of(96)).pred_masks, before)


@pytest.mark.parametrize(
    ("side", "problem"),
    [
        (100, "image_size=100 is not a multiple of patch_size=8"),
        (0, "image_size=0 is too small"),
        (-64, "image_size=-64 is too small"),
        ("96", "image_size='96' should be of type int"),
        (96.0, "image_size=96.0 should be of type int"),
        (True, "image_size=True should be of type int"),
        ((64, 96), r"image_size=\(64, 96\) should be of type int"),
    ],
)
def test_bad_sides_are_refused(side, problem, load):
    with pytest.raises(ValueError, match=problem):
        load(image_size=side)


def test_nothing_is_interpolated_unasked(split_dir):
    with pytest.raises(ValueError, match="give image_size=96 to from_pretrained"):
        split_class().from_pretrained(
            split_dir, vision_config={"image_size": 96}, prompt_encoder_config={"image_size": 96}
        )


def test_the_configuration_of_a_resized_model_does_not_resize_again(load, stock_dir):
    with pytest.raises(ValueError, match="give image_size=96 to from_pretrained"):
        split_class().from_pretrained(stock_dir, config=load(image_size=96).config)
