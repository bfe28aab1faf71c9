"""ONNX files as the tools of each interface use them, also in sizes that they were not exported with.

The oracles are stock `SamModel`, PEFT's unmerged model, Meta's `SamOnnxModel` and SAM's processor.
"""

import importlib.util
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import assert_same_outputs, randomize
from onnx_files import GRID, MEAN, SIDE, STD, run, run_convert
from PIL import Image
from torch.nn.functional import interpolate
from transformers import SamConfig, SamImageProcessor, SamProcessor

from checkpoint_tools import meta_layout, meta_model, onnx_export
from checkpoint_tools.loading import as_split, processor_for
from checkpoint_tools.onnx_export import Sam, TransformersJs, graphs, sam


def points_and_labels(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return SIDE * torch.rand(*shape, 2), torch.randint(0, 2, shape)


@pytest.mark.slow
@pytest.mark.parametrize("images, objects, points", [(1, 1, 1), (3, 2, 5)])
def test_names_of_transformers(onnx_files, images, objects, points):
    """With an adapter: points alone, boxes alone, and both with masks, for one mask and for three."""
    folder, model = onnx_files["transformers"], onnx_files.adapted()
    pixel_values = torch.randn(images, 3, SIDE, SIDE)
    embeddings = run(folder / "encoder.onnx", pixel_values=pixel_values)["image_embeddings"]
    coordinates, labels = points_and_labels(images, objects, points)
    boxes = (SIDE * torch.rand(images, objects, 2, 2)).sort(dim=2).values
    masks = torch.randn(images, objects, GRID, GRID)
    no_point = torch.zeros(images, objects, 1, 2), torch.full((images, objects, 1), -1)
    corners = boxes, torch.tensor([2, 3]).expand(images, objects, 2)
    prompts = {
        "points": ((coordinates, labels), no_point),
        "boxes": (corners,),
        "points, boxes and masks": ((coordinates, labels), corners),
    }
    for case, parts in prompts.items():
        for multimask_output in (True, False):
            actual = run(
                folder / "decoder.onnx",
                image_embeddings=embeddings,
                input_points=torch.cat([part[0] for part in parts], dim=2),
                input_labels=torch.cat([part[1] for part in parts], dim=2),
                input_masks=masks,
                has_input_masks=torch.full((images, objects), "masks" in case),
                multimask_output=torch.tensor(multimask_output),
            )
            for index in range(objects):  # SamModel takes one mask for an image
                one = slice(index, index + 1)
                with torch.no_grad():
                    expected = model(
                        pixel_values=pixel_values,
                        input_points=coordinates[:, one] if "points" in case else None,
                        input_labels=labels[:, one] if "points" in case else None,
                        input_boxes=boxes[:, one].flatten(2) if "boxes" in case else None,
                        input_masks=masks[:, one] if "masks" in case else None,
                        multimask_output=multimask_output,
                    )
                assert_same_outputs(
                    {name: tensor[:, one] for name, tensor in actual.items()},
                    {"pred_masks": expected.pred_masks, "iou_scores": expected.iou_scores},
                    tolerance=1e-4,
                )


def meta_decoder(segment_anything, stock, all_masks: bool):
    """Meta's own code with the weights of `stock`."""
    meta = meta_model.build(stock.config, meta_layout.meta_from_sam(stock))
    for module in meta.mask_decoder.transformer.layers.modules():  # transformers has another constant
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = stock.config.mask_decoder_config.layer_norm_eps
    return segment_anything.utils.onnx.SamOnnxModel(meta.eval(), return_single_mask=not all_masks)


def meta_inputs(points: int, has_mask: bool, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """With box corners among the points, and padding."""
    labels = torch.tensor([1, -1, 0, 2, 3, 1])[:points]
    return {
        "image_embeddings": torch.randn(1, 16, 8, 8),
        "point_coords": SIDE * torch.rand(1, points, 2),
        "point_labels": labels[None].float(),
        "mask_input": torch.randn(1, 1, GRID, GRID),
        "has_mask_input": torch.tensor([float(has_mask)]),
        "orig_im_size": torch.tensor(size, dtype=torch.float32),
    }


META_CASES = [(1, False, (64, 64)), (2, False, (90, 137)), (5, True, (201, 40)), (6, False, (7, 300))]


@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")  # torch 2.7 needs it
@pytest.mark.parametrize("all_masks", [True, False])
@pytest.mark.parametrize("points, has_mask, size", META_CASES)
def test_decoder_of_meta(segment_anything, stock, all_masks, points, has_mask, size):
    inputs = meta_inputs(points, has_mask, size)
    with torch.no_grad():
        actual = sam.Decoder(stock, all_masks)(*inputs.values())
    expected = meta_decoder(segment_anything, stock, all_masks)(**inputs)
    names = sam.Decoder.outputs
    assert_same_outputs(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("export, tolerance", [("sam", 1e-4), ("sam-fp16", 1e-2)])
def test_files_of_meta(onnx_files, segment_anything, export, tolerance):
    decoder = meta_decoder(segment_anything, onnx_files.stock, all_masks=export == "sam-fp16")
    for points, has_mask, size in META_CASES:
        inputs = meta_inputs(points, has_mask, size)
        expected = dict(zip(sam.Decoder.outputs, decoder(**inputs), strict=True))
        assert_same_outputs(run(onnx_files[export] / "decoder.onnx", **inputs), expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(48, 100), (100, 48), (64, 64), (31, 20)])
@pytest.mark.parametrize("prompt", ["point", "rectangle", "both"])
def test_calls_of_samexporter(onnx_files, size, prompt):
    """An image resized by Pillow, marks scaled with it, rectangles as corners, a last point of label -1."""
    height, width = size
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))
    scale = SIDE / max(size)
    resized_height, resized_width = (int(length * scale + 0.5) for length in size)
    resized = np.asarray(image.resize((resized_width, resized_height), Image.Resampling.BILINEAR))
    marks = {"point": [(9, 8, 1), (11, 19, 0)], "rectangle": [(3, 4, 2), (17, 25, 3)]}
    marks["both"] = marks["point"] + marks["rectangle"]
    to_resized = np.array([resized_width / width, resized_height / height])
    points = [(*(np.array(mark[:2]) * to_resized), mark[2]) for mark in marks[prompt]] + [(0, 0, -1)]
    points = torch.tensor(np.array(points), dtype=torch.float32)[None]

    folder = onnx_files["sam"]
    embeddings = run(folder / "encoder.onnx", input_image=torch.tensor(resized, dtype=torch.float32))
    actual = run(
        folder / "decoder.onnx",
        **embeddings,
        point_coords=points[..., :2],
        point_labels=points[..., 2],
        mask_input=torch.zeros(1, 1, GRID, GRID),
        has_mask_input=torch.zeros(1),
        orig_im_size=torch.tensor(size, dtype=torch.float32),
    )

    processor = processor_for(onnx_files.stock.config, image_mean=MEAN, image_std=STD)
    box = [label for *_, label in marks[prompt]].count(2) > 0
    others = points[:, None, [index for index, label in enumerate(points[0, :, 2]) if label < 2]]
    others = others if box else others[:, :, :-1]  # SamModel adds the last point, but not to boxes
    with torch.no_grad():
        expected = onnx_files.stock(
            pixel_values=processor(resized, return_tensors="pt")["pixel_values"],
            input_points=others[..., :2],
            input_labels=others[..., 2].int(),
            input_boxes=points[:, -3:-1, :2].flatten(1)[:, None] if box else None,
            multimask_output=False,
        )
    masks = interpolate(expected.pred_masks[0], (SIDE, SIDE), mode="bilinear")
    masks = interpolate(masks[..., :resized_height, :resized_width], size, mode="bilinear")
    expected = {"masks": masks, "iou_predictions": expected.iou_scores[0], "low_res_masks": expected.pred_masks[0]}
    assert actual["masks"].shape[-2:] == size
    assert_same_outputs(actual, expected, tolerance=1e-3)


@pytest.mark.slow
def test_a_larger_image_fails(onnx_files):
    """Rather than being cropped."""
    with pytest.raises(Exception, match=r"(?i)negative|shape|dimension|must be|invalid"):
        run(onnx_files["sam"] / "encoder.onnx", input_image=torch.zeros(SIDE, SIDE + 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("images, objects, points", [(1, 1, 1), (2, 3, 4)])
def test_names_of_transformers_js(onnx_files, images, objects, points):
    """What its `SamModel` passes from the one file to the other."""
    folder = onnx_files["transformers-js"] / "onnx"
    pixel_values = torch.randn(images, 3, SIDE, SIDE)
    coordinates, labels = points_and_labels(images, objects, points)
    embeddings = run(folder / "vision_encoder.onnx", pixel_values=pixel_values)
    inputs = {"input_points": coordinates, "input_labels": labels}
    actual = run(folder / "prompt_encoder_mask_decoder.onnx", **embeddings, **inputs)
    with torch.no_grad():
        expected = onnx_files.stock(pixel_values=pixel_values, **inputs)
    outputs = {"iou_scores": expected.iou_scores, "pred_masks": expected.pred_masks}
    assert_same_outputs(actual, outputs, tolerance=1e-4)


@pytest.mark.slow
def test_settings_of_transformers_js(onnx_files):
    folder = onnx_files["transformers-js"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sam", ["SamModel"])
    assert "auto_map" not in config
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert (settings["image_processor_type"], settings["processor_class"]) == ("SamImageProcessor", "SamProcessor")
    assert (settings["size"], settings["image_mean"]) == ({"longest_edge": SIDE}, MEAN)
    processor = SamProcessor(SamImageProcessor(**settings))
    picture = np.zeros((30, 40, 3), dtype=np.uint8)
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, SIDE, SIDE)


@pytest.mark.slow
@pytest.mark.parametrize("export", ["transformers", "sam", "sam-fp16", "transformers-js"])
def test_files(onnx_files, export):
    """One for each graph, without paths of this machine, and the decoder is in there once."""
    files = sorted(path for path in onnx_files[export].rglob("*") if "onnx" in path.suffix)
    assert len(files) == 2
    for file in files:
        model = onnx.load(file)
        assert b"site-packages" not in file.read_bytes()
        assert sum(node.op_type == "ConvTranspose" for node in model.graph.node) == (
            2 if "decoder" in file.name else 0
        )
        half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
        assert bool(half) == (export == "sam-fp16")
        types = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        assert onnx.TensorProto.FLOAT16 not in types


class Double(graphs.Graph):
    inputs = {"x": {}}
    outputs = ["y"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


@pytest.mark.slow
def test_large_weights_go_to_a_second_file(stock, processor, tmp_path, monkeypatch):
    """Under the name that transformers.js asks for."""
    (tmp_path / "onnx").mkdir()
    file, x = tmp_path / "onnx" / "vision_encoder.onnx", torch.randn(2, 64)
    model = torch.nn.Linear(64, 64)
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    onnx_export.write(Double(model), {"x": x}, file)
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, f"{file.name}_data"]
    assert_same_outputs(run(file, x=x), {"y": model(x)})
    TransformersJs(processor).write_settings(as_split(stock), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {file.name: 1}}


def test_size_that_tools_do_not_assume(stock, processor):
    (message,) = Sam(processor).notes(stock)
    assert "image_size is 64" in message
    stock_config = SamConfig()
    assert not Sam(processor).notes(type("Model", (), {"config": stock_config}))


@pytest.mark.parametrize("package", onnx_export.PACKAGES)
def test_missing_packages_are_named_first(package, tmp_path, monkeypatch):
    """Before the source is looked for."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(SystemExit, match=f"^convert.py: cannot convert missing: .*pip install {package}$"):
        run_convert(tmp_path, "to-onnx", "missing", "out")


def test_all_masks_is_an_option_of_one_interface(tmp_path):
    with pytest.raises(SystemExit, match="--all-masks is for --interface sam, got --interface transformers"):
        run_convert(tmp_path, "to-onnx", "missing", "out", "--all-masks")


@pytest.mark.slow
def test_other_outputs_are_refused(onnx_files, tmp_path, monkeypatch):
    """As the comparison of files and model can fail."""
    folder, interface = onnx_files["sam"], Sam(processor_for(onnx_files.stock.config, image_mean=MEAN, image_std=STD))
    actual = onnx_export.onnx_outputs(onnx_files.stock, interface, folder)
    expected = onnx_export.expected_outputs(onnx_files.stock, interface)
    assert onnx_export.accepted(actual, expected) < 1e-4
    other = randomize(type(onnx_files.stock)(onnx_files.stock.config), seed=3).eval()
    with pytest.raises(ValueError, match="outputs differ"):
        onnx_export.accepted(actual, onnx_export.expected_outputs(other, interface))
    imagenet = Sam(processor_for(onnx_files.stock.config))
    with pytest.raises(ValueError, match="outputs differ"):
        onnx_export.accepted(actual, onnx_export.expected_outputs(onnx_files.stock, imagenet))
