"""The example that people copy to run ONNX files in their own projects."""

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamProcessor

from checkpoint_tools.checkout import ROOT


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_onnx", ROOT / "examples" / "run_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["transformers", "sam", "transformers-js"])
def test_it_gives_the_masks_of_stock_sam(interface, onnx_files, example):
    """With a point, a box and both; transformers.js adds a point to boxes, which SamModel does not."""
    model = onnx_files.adapted() if interface == "transformers" else onnx_files.stock
    processor = SamProcessor.from_pretrained(onnx_files.folder / "stock")
    noise = np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((200, 120), Image.Resampling.BICUBIC)
    point, box = [50.0, 70.0], [20.0, 30.0, 150.0, 100.0]
    for points, corners in [([point], None), ([], box), ([point], box)][: 1 if interface == "transformers-js" else 3]:
        actual = example.segment(onnx_files[interface], image, points, corners, interface, onnx_files.side)
        prompts = {"input_points": [[points]]} if points else {}
        prompts |= {"input_boxes": [[corners]]} if corners else {}
        inputs = processor(image, return_tensors="pt", **prompts)
        sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes")]
        by_meta = interface == "sam" and not (points and corners)  # Meta's rule: the best of three for few points
        with torch.no_grad():
            outputs = model(**inputs, multimask_output=by_meta or interface == "transformers-js")
        (masks,) = processor.post_process_masks(outputs.pred_masks, *sizes, binarize=False)
        expected = masks[0, outputs.iou_scores[0, 0].argmax()].numpy()
        assert actual.shape == expected.shape == (120, 200)
        np.testing.assert_allclose(actual, expected, atol=5e-3 * np.abs(expected).max())
        assert np.ptp(expected) > 0.05 * np.abs(expected).max()  # a mask that is flat would prove little


def test_it_writes_the_mask_as_a_picture(example, tmp_path, monkeypatch, capsys):
    image, output = ROOT / "docs" / "images" / "coins.png", tmp_path / "mask.png"
    words = ["folder", str(image), str(output)]
    monkeypatch.setattr(sys, "argv", ["run_onnx.py", *words, "--point", "46", "260"])
    monkeypatch.setattr(example, "segment", lambda *arguments: np.array([[1.0, -1.0], [0.0, 2.0]]))
    example.main()
    assert np.asarray(Image.open(output)).tolist() == [[True, False], [False, True]]
    assert "mask.png: 2 pixels" in capsys.readouterr().out


def test_it_asks_for_a_prompt(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_onnx.py", "folder", "image.png", "mask.png"])
    with pytest.raises(SystemExit, match="expected --point X Y or --box"):
        example.main()
