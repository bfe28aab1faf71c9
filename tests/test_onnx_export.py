"""ONNX files work as the field's tools use them. Oracles: stock SAM, and Meta's own code for the interface `sam`."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

from checkpoint_tools.comparison import relative_error
from checkpoint_tools.loading import processor_for
from checkpoint_tools.meta_layout import meta_from_sam
from checkpoint_tools.meta_model import build
from checkpoint_tools.onnx_export import to_onnx
from checkpoint_tools.staging import split_class


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIDE, GRID = 64, 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> SamModel:
    """As small as a SAM with windows, a global layer and three masks can be; its folder is its `name_or_path`."""
    vision = {**TINY["vision_config"], "num_hidden_layers": 2, "global_attn_indexes": [1]}
    decoder = {**TINY["mask_decoder_config"], "num_hidden_layers": 1}
    model = randomize(SamModel(SamConfig(**{**TINY, "vision_config": vision, "mask_decoder_config": decoder})))
    folder = tmp_path_factory.mktemp("stock")
    model.save_pretrained(folder)
    processor_for(model.config).save_pretrained(folder)
    return SamModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def exported(stock: SamModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports once for each set of options."""
    folders: dict[str, Path] = {}

    def folder_of(interface: str, **options: str | bool) -> Path:
        key = json.dumps([interface, options])
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("onnx") / interface
            error = to_onnx(stock.name_or_path, folders[key], interface=interface, **options)
            assert error < (2e-2 if options.get("dtype") == "float16" else 1e-5)
        return folders[key]

    return folder_of


def run(file: Path, **inputs: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert {each.name for each in session.get_inputs()} == inputs.keys()
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: np.asarray(value) for name, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, arrays), strict=True))


@pytest.mark.parametrize("interface", ["transformers", "sam", "transformers-js"])
def test_each_graph_is_one_file(interface, exported):
    folder = exported(interface)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    assert (
        names
        == {
            "transformers": {"encoder.onnx", "decoder.onnx", "processor_config.json"},
            "sam": {"encoder.onnx", "decoder.onnx"},
            "transformers-js": {
                *("config.json", "preprocessor_config.json"),
                *("onnx/vision_encoder.onnx", "onnx/prompt_encoder_mask_decoder.onnx"),
            },
        }[interface]
    )


@pytest.mark.parametrize(
    ("images", "objects", "points", "box", "mask", "multimask"),
    [
        (1, 1, 1, False, False, True),
        (3, 2, 5, False, False, False),
        (1, 3, 2, True, False, True),
        (1, 1, 0, True, True, False),
    ],
)
@torch.no_grad()
def test_own_interface(images, objects, points, box, mask, multimask, exported, stock):
    folder = exported("transformers")
    pixel_values = torch.randn(images, 3, SIDE, SIDE)
    coordinates, labels = SIDE * torch.rand(images, objects, points, 2), torch.randint(0, 2, (images, objects, points))
    boxes = (SIDE * torch.rand(images, objects, 2, 2)).sort(2).values if box else None
    masks = torch.randn(images, 1, 4 * GRID, 4 * GRID) if mask else None
    expected = stock(
        pixel_values=pixel_values,
        input_points=coordinates if points else None,
        input_labels=labels if points else None,
        input_boxes=None if boxes is None else boxes.flatten(2),
        input_masks=masks,
        multimask_output=multimask,
    )
    corners = torch.zeros(images, objects, 1, 2) if boxes is None else boxes
    corner_labels = torch.tensor([-1] if boxes is None else [2, 3]).expand(images, objects, -1)
    embeddings = run(folder / "encoder.onnx", pixel_values=pixel_values)["image_embeddings"]
    actual = run(
        folder / "decoder.onnx",
        image_embeddings=embeddings,
        input_points=torch.cat([coordinates, corners], 2),
        input_labels=torch.cat([labels, corner_labels], 2),
        input_masks=torch.zeros(images, objects, 4 * GRID, 4 * GRID)
        if masks is None
        else masks.expand(-1, objects, -1, -1),
        has_input_masks=torch.full((images, objects), mask),
        multimask_output=torch.tensor(multimask),
    )
    for name in ("pred_masks", "iou_scores"):
        assert relative_error(actual[name], expected[name]) < 1e-5


@pytest.mark.parametrize("all_masks", [False, True])
@pytest.mark.parametrize("labels", [[1, -1], [1, 0, -1], [2, 3], [1, 0, 2, 3]], ids=str)
@pytest.mark.parametrize("has_mask", [0.0, 1.0])
@torch.no_grad()
def test_sam_is_what_meta_exports(all_masks, labels, has_mask, exported, stock, segment_anything):
    meta = build(stock.config, meta_from_sam(stock)).eval()
    oracle = segment_anything.utils.onnx.SamOnnxModel(meta, return_single_mask=not all_masks)
    inputs = {
        "image_embeddings": torch.randn(1, 16, GRID, GRID),
        "point_coords": SIDE * torch.rand(1, len(labels), 2),
        "point_labels": torch.tensor([labels], dtype=torch.float32),
        "mask_input": torch.randn(1, 1, 4 * GRID, 4 * GRID),
        "has_mask_input": torch.tensor([has_mask]),
        "orig_im_size": torch.tensor([97.0, 130.0]),
    }
    actual = run(exported("sam", all_masks=all_masks) / "decoder.onnx", **inputs)
    expected = dict(zip(("masks", "iou_predictions", "low_res_masks"), oracle(*inputs.values()), strict=True))
    assert actual["masks"].shape[-2:] == (97, 130)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < 1e-5, name


@torch.no_grad()
def test_calling_convention_of_samexporter(exported, stock):
    """It scales images to an input size, and asks for masks of that size, which it scales back.

    https://github.com/vietanhdev/samexporter/blob/main/samexporter/sam_onnx.py
    """
    folder = exported("sam")
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(54, 80, 3), dtype=np.uint8))
    rows, columns = input_size = (43, 64)  # of 1,024 x 684 pixels there
    image = np.asarray(picture.resize((columns, rows), Image.Resampling.BILINEAR)).astype(np.float32)
    embeddings = run(folder / "encoder.onnx", input_image=image)["image_embeddings"]
    point = np.array([[30.0, 20.0]])
    actual = run(
        folder / "decoder.onnx",
        image_embeddings=embeddings,
        point_coords=np.concatenate([point, [[0.0, 0.0]]])[None].astype(np.float32),
        point_labels=np.array([[1, -1]], dtype=np.float32),
        mask_input=np.zeros((1, 1, 4 * GRID, 4 * GRID), dtype=np.float32),
        has_mask_input=np.zeros(1, dtype=np.float32),
        orig_im_size=np.array(input_size, dtype=np.float32),
    )
    processor = processor_for(stock.config)
    inputs = processor(image.astype(np.uint8), input_points=[[point.tolist()]], return_tensors="pt")
    outputs = stock(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
    best = outputs.iou_scores[0, 0].argmax()
    (masks,) = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    assert relative_error(actual["masks"][0, 0], masks[0, best]) < 1e-4
    assert relative_error(actual["iou_predictions"][0, 0], outputs.iou_scores[0, 0, best]) < 1e-5


@torch.no_grad()
def test_calling_convention_of_transformers_js(exported, stock):
    """https://github.com/huggingface/transformers.js/blob/main/packages/transformers/src/models/sam/modeling_sam.js."""
    folder = exported("transformers-js")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sam"
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "SamImageProcessor" and settings["processor_class"] == "SamProcessor"
    processor = SamProcessor(SamImageProcessor(**settings))
    picture = np.random.default_rng(0).integers(256, size=(54, 80, 3), dtype=np.uint8)
    points = [[[[30, 20], [50, 40]], [[10, 10], [5, 30]]]]
    inputs = processor(picture, input_points=points, input_labels=[[[1, 0], [1, 1]]], return_tensors="pt")
    prompts = {"input_points": inputs["input_points"].float(), "input_labels": inputs["input_labels"]}
    embeddings = run(folder / "onnx/vision_encoder.onnx", pixel_values=inputs["pixel_values"])
    actual = run(folder / "onnx/prompt_encoder_mask_decoder.onnx", **embeddings, **prompts)
    expected = stock(pixel_values=inputs["pixel_values"], **prompts)
    for name in ("pred_masks", "iou_scores"):
        assert relative_error(actual[name], expected[name]) < 1e-5


def test_float16_halves_the_files(exported):
    half, full = (exported("transformers", **options) for options in ({"dtype": "float16"}, {}))
    assert (half / "encoder.onnx").stat().st_size < 0.7 * (full / "encoder.onnx").stat().st_size


@torch.no_grad()
def test_adapter_is_merged(stock, tmp_path):
    adapted = get_peft_model(
        split_class().from_pretrained(stock.name_or_path),
        LoraConfig(target_modules=["q", "v"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    to_onnx(stock.name_or_path, tmp_path / "onnx", adapter=str(tmp_path / "adapter"))
    pixel_values = torch.randn(1, 3, SIDE, SIDE)
    embeddings = run(tmp_path / "onnx" / "encoder.onnx", pixel_values=pixel_values)["image_embeddings"]
    expected = adapted.eval().get_image_embeddings(pixel_values)
    assert relative_error(embeddings, expected) < 1e-5
    assert relative_error(stock.get_image_embeddings(pixel_values), expected) > 1e-2


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_are_named_before_work_starts(name, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted))
    with pytest.raises(ModuleNotFoundError, match=f"pip install {name}$"):
        to_onnx("nowhere", tmp_path / "onnx")


def test_an_option_of_another_interface_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--all-masks is for --interface sam"):
        to_onnx("nowhere", tmp_path / "onnx", all_masks=True)
