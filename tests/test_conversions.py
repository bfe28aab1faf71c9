"""Whole checkpoints in other layouts: Meta's own code is the oracle of Meta's, stock SAM of the rest."""

import functools
import re
import subprocess
import sys

import pytest
import torch
from conftest import assert_holds_weights_of, assert_same_outputs, randomize, stock_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, PreTrainedModel, SamConfig, SamModel

from checkpoint_tools import conversions, meta_layout
from checkpoint_tools.checkout import ROOT, SAM_TINY, split_class


META = {"hidden_size": 32, "mlp_dim": 48, "num_layers": 2, "heads": 8}  # of the decoder; 8 heads as all of Meta's


def meta_model(segment_anything, hidden_size=24, depth=4, heads=2, grid=9, window=4, global_layers=(1, 3)):
    """Built as Meta's `build_sam` does, but small, and with noise everywhere."""
    modeling = segment_anything.modeling
    model = modeling.Sam(
        modeling.ImageEncoderViT(
            img_size=8 * grid,
            patch_size=8,
            embed_dim=hidden_size,
            depth=depth,
            num_heads=heads,
            mlp_ratio=1.5,
            out_chans=META["hidden_size"],
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            global_attn_indexes=global_layers,
        ),
        modeling.PromptEncoder(META["hidden_size"], (grid, grid), (8 * grid, 8 * grid), mask_in_chans=8),
        modeling.MaskDecoder(
            transformer_dim=META["hidden_size"],
            transformer=modeling.TwoWayTransformer(
                META["num_layers"], META["hidden_size"], META["heads"], META["mlp_dim"]
            ),
            iou_head_depth=4,
            iou_head_hidden_dim=40,
        ),
    )
    return randomize(model).eval()


SIZES = {
    "windows and global": {},
    "wider and deeper": {"hidden_size": 40, "depth": 5, "heads": 4, "grid": 8, "window": 3, "global_layers": (4,)},
    "global only": {"depth": 2, "global_layers": (0, 1)},
    "windows only": {"depth": 2, "global_layers": ()},
    "window of the whole image": {"window": 9},
}

PROMPTS = {
    "points": ("points",),
    "boxes": ("boxes",),
    "points and boxes": ("points", "boxes"),
    "mask": ("masks",),
    "points and mask": ("points", "masks"),
    "box and mask": ("boxes", "masks"),
}


@torch.no_grad()
def assert_same_as_meta(model: PreTrainedModel, meta: torch.nn.Module, prompts: tuple[str, ...], multimask: bool):
    """For one image, in which a mask prompt allows one object, and two objects otherwise."""
    side = meta.image_encoder.img_size
    objects = 1 if "masks" in prompts else 2
    image = torch.randn(1, 3, side, side)
    points, boxes = side * torch.rand(objects, 3, 2), side * torch.rand(objects, 4)
    labels = torch.tensor([1, 0, 1]).expand(objects, 3)
    masks = torch.randn(1, 1, side // 2, side // 2)
    sparse, dense = meta.prompt_encoder(
        points=(points, labels) if "points" in prompts else None,
        boxes=boxes if "boxes" in prompts else None,
        masks=masks if "masks" in prompts else None,
    )
    expected_masks, expected_scores = meta.mask_decoder(
        image_embeddings=meta.image_encoder(image),
        image_pe=meta.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    ours = {
        "points": {"input_points": points[None], "input_labels": labels[None]},
        "boxes": {"input_boxes": boxes[None]},
        "masks": {"input_masks": masks},
    }
    inputs = {name: tensor for prompt in prompts for name, tensor in ours[prompt].items()}
    actual = model(pixel_values=image, multimask_output=multimask, **inputs)
    assert_same_outputs(
        {"masks": actual.pred_masks[0], "scores": actual.iou_scores[0]},
        {"masks": expected_masks, "scores": expected_scores},
    )


@pytest.mark.parametrize("size", SIZES)
def test_from_meta_gives_metas_outputs(size, segment_anything, tmp_path, logged):
    meta = meta_model(segment_anything, **SIZES[size])
    torch.save(meta.state_dict(), tmp_path / "sam.pth")
    assert conversions.from_meta(tmp_path / "sam.pth", tmp_path / "split", decoder_heads=META["heads"]) < 1e-5
    model = AutoModel.from_pretrained(tmp_path / "split", trust_remote_code=True)
    assert_same_as_meta(model, meta, ("points",), multimask=True)
    assert model.config.vision_config.global_attn_indexes == list(SIZES[size].get("global_layers", (1, 3))) or (
        size == "window of the whole image"
    )
    assert all("torchvision" in message for message in logged)  # which the image processor does without


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_meta_prompts(prompts, multimask, segment_anything):
    meta = meta_model(segment_anything)
    model = meta_layout.sam_from_meta(meta.state_dict(), META["heads"])
    assert_same_as_meta(model, meta, PROMPTS[prompts], multimask)


@pytest.mark.parametrize("layout", ["split", "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_and_back(layout, dtype, segment_anything, tmp_path):
    """The very same file content, which Meta's class loads strictly."""
    meta = meta_model(segment_anything).to(dtype)
    torch.save({"model": meta.state_dict(), "epoch": 3}, tmp_path / "trained.pth")  # as training scripts do
    conversions.from_meta(tmp_path / "trained.pth", tmp_path / "model", stock=layout == "stock", decoder_heads=8)
    if layout == "stock":
        assert SamModel.from_pretrained(tmp_path / "model").dtype == dtype
    assert conversions.to_meta(str(tmp_path / "model"), tmp_path / "sam.pth") < 1e-5
    back = torch.load(tmp_path / "sam.pth", weights_only=True)
    assert back.keys() == meta.state_dict().keys()
    for name, tensor in meta.state_dict().items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
    meta.load_state_dict(back)


@pytest.mark.parametrize(
    ("size", "vision"),
    [
        ("vit_b", {}),
        ("vit_l", {"hidden_size": 1024, "num_hidden_layers": 24, "global_attn_indexes": [5, 11, 17, 23]}),
        ("vit_h", {"hidden_size": 1280, "num_hidden_layers": 32, "global_attn_indexes": [7, 15, 23, 31]}),
    ],
    ids=str,
)
def test_sizes_of_meta(size, vision, segment_anything):
    """Found from the shapes of Meta's own builders, without their memory."""
    with torch.device("meta"):
        weights = getattr(segment_anything.build_sam, f"build_sam_{size}")().state_dict()
    inferred = meta_layout.config_of(weights)
    expected = SamConfig(vision_config=vision | ({"num_attention_heads": 16} if vision else {}))
    expected.mask_decoder_config.layer_norm_eps = 1e-5  # in Meta's code; transformers has 1e-6
    inferred, expected = inferred.to_dict(), expected.to_dict()
    for config in (inferred, expected):
        config["vision_config"]["global_attn_indexes"] = list(config["vision_config"]["global_attn_indexes"])
    assert inferred == expected
    assert set(meta_layout.names(SamConfig.from_dict(expected)).values()) == weights.keys()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop("image_encoder.neck.3.bias"), "missing: image_encoder.neck.3.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda weights: weights.pop("image_encoder.pos_embed"), "expected image_encoder.pos_embed"),
        (
            lambda weights: weights.update({"image_encoder.blocks.2.attn.qkv.weight": torch.zeros(48, 24)}),
            "shape that does not fit the other weights: image_encoder.blocks.2.attn.qkv.weight",
        ),
        (
            lambda weights: weights.update({"image_encoder.pos_embed": torch.zeros(1, 6, 6, 24)}),
            "rel_pos tables are for [4, 9] tokens, but the image has 6 x 6",
        ),
        (lambda weights: weights.clear(), "does not contain a state dict"),
        (lambda weights: weights.update(extra="text"), "does not contain a state dict"),
        (lambda weights: weights.update(extra=torch.zeros(1, dtype=torch.int8)), "got other dtypes in extra"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_metas_is_refused(change, problem, segment_anything, tmp_path):
    weights = dict(meta_model(segment_anything).state_dict())
    change(weights)
    torch.save(weights, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=re.escape(problem)):
        conversions.from_meta(tmp_path / "sam.pth", tmp_path / "model", decoder_heads=8)
    assert not (tmp_path / "model").exists()


def test_heads_that_nothing_tells_are_asked_for(segment_anything):
    with pytest.raises(ValueError, match="--decoder-heads"):
        meta_layout.sam_from_meta(meta_model(segment_anything).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_to_split_and_to_sam(dtype, stock, processor, inputs, tmp_path, capsys):
    original = stock_model().to(dtype)
    original.save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    assert conversions.to_split(str(tmp_path / "stock"), tmp_path / "split") < 1e-5
    split = AutoModel.from_pretrained(tmp_path / "split", trust_remote_code=True)
    assert_holds_weights_of(split, original, dtype)
    assert AutoProcessor.from_pretrained(tmp_path / "split").image_processor.pad_size == {"height": 64, "width": 64}
    assert conversions.to_sam(str(tmp_path / "split"), tmp_path / "back") < 1e-5
    back = SamModel.from_pretrained(tmp_path / "back")
    assert back.dtype == dtype
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert AutoProcessor.from_pretrained(tmp_path / "back").image_processor.pad_size == {"height": 64, "width": 64}
    assert "Note" not in capsys.readouterr().out


def test_adapter_is_merged(split_dir, load, inputs, tmp_path):
    config = LoraConfig(target_modules=["q", "v", "lin1"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    adapted = get_peft_model(load(), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert conversions.to_sam(str(split_dir), tmp_path / "stock", adapter=str(tmp_path / "adapter")) < 1e-5
    with torch.no_grad():
        tuned, plain = SamModel.from_pretrained(tmp_path / "stock")(**inputs), load()(**inputs)
        assert_same_outputs(tuned, adapted(**inputs))
    assert not torch.allclose(tuned.pred_masks, plain.pred_masks)


def test_a_split_model_is_not_split_again(split_dir, tmp_path):
    with pytest.raises(ValueError, match=r"expected a stock SAM \(model_type 'sam'\), got 'sam_split'"):
        conversions.to_split(str(split_dir), tmp_path / "again")


def test_a_vision_encoder_alone_is_refused(split_dir, tmp_path):
    split_class("SamSplitVisionModel").from_pretrained(split_dir).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"expected a complete SAM .*, got 'sam_split_vision_model'"):
        conversions.to_sam(str(tmp_path / "vision"), tmp_path / "stock")


def test_a_wrong_result_is_not_kept(split_dir, stock, tmp_path, monkeypatch):
    """The final comparison detects any mistake."""
    wrong = type("Wrong", (split_class(),), {"to_sam": lambda self: randomize(stock_model(), seed=9)})
    monkeypatch.setattr("checkpoint_tools.loading.split_class", lambda: wrong)
    with pytest.raises(ValueError, match="Nothing was written"):
        conversions.to_sam(str(split_dir), tmp_path / "stock")
    with pytest.raises(ValueError, match="weights in the file are not those of the model"):
        monkeypatch.setattr(meta_layout, "meta_from_sam", lambda model: meta_from_sam(randomize(stock_model(), 5)))
        conversions.to_meta(str(split_dir), tmp_path / "sam.pth")
    assert not list(tmp_path.iterdir())


meta_from_sam = meta_layout.meta_from_sam


@pytest.mark.parametrize("command", ["from-meta sam.pth out --decoder-heads 2", "to-meta {stock_dir} out.pth"])
def test_a_wrong_name_for_a_weight_is_noticed(command, stock, stock_dir, refused, monkeypatch):
    """Although it is wrong both ways: Meta's own code gives other masks."""
    torch.save(meta_from_sam(stock), "sam.pth")
    exchange = (r"(blocks\.\d+\.norm)(\d)", lambda match: f"{match[1]}{3 - int(match[2])}")
    monkeypatch.setattr(meta_layout, "RENAMES", [*meta_layout.RENAMES, exchange])
    assert "its outputs differ from the source's" in refused(command.format(stock_dir=stock_dir))


def test_command_line(convert):
    """On the embedded checkpoint, there and back."""
    for command in (
        f"to-split {SAM_TINY} model",
        "to-meta model sam.pth",
        "from-meta sam.pth stock --stock --decoder-heads 4",
    ):
        output = convert(command)
        written = command.split()[2]
        assert re.search(rf"Wrote {written}\. Masks and scores .* (are equal\.|differ by \d\.\de[-+]\d\d)", output)
    back = SamModel.from_pretrained("stock").state_dict()
    for name, tensor in SamModel.from_pretrained(SAM_TINY).state_dict().items():
        assert torch.equal(back[name], tensor)


@pytest.mark.slow
def test_runs_from_anywhere_and_fails_in_one_line(tmp_path):
    """And code in a pickle is not run."""
    torch.save({"model": print}, tmp_path / "sam.pth")
    command = [sys.executable, ROOT / "convert.py", "from-meta", tmp_path / "sam.pth", tmp_path / "model"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd="/")
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith(f"convert.py: cannot convert {tmp_path}/sam.pth: ")
    assert "got 'model'. Objects are code, and are not read" in process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sam.pth"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("to-sam nowhere out", "nowhere"),
        ("to-split {stock_dir} {split_dir}", "not empty"),
        ("from-meta nowhere.pth out", "No such file"),
        ("from-meta {stock_dir}/config.json out", "is damaged, or was not written by torch.save"),
        ("to-meta {stock_dir} {split_dir}/config.json", "exists: choose another"),
    ],
)
def test_errors_are_one_line(command, message, refused, stock_dir, split_dir, tmp_path):
    assert message in refused(command.format(**locals()))
    assert not list(tmp_path.iterdir())
