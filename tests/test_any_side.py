"""A model tuned at another image side than its base's goes back to stock SAM and to ONNX, by the commands alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_outputs
from onnx_files import make_checkpoint, run, run_convert
from peft import PeftModel
from PIL import Image
from transformers import SamModel, SamProcessor

import finetune
from checkpoint_tools.checkout import split_class


SIDE = 96  # of a base of 64


@pytest.mark.slow
def test_tuned_at_another_side_it_leaves_as_stock_sam_and_as_onnx(photos, tmp_path):
    make_checkpoint(tmp_path)
    run_convert(tmp_path, "to-split", "stock", "split")
    tiny = ["--steps", "2", "--eval-every", "2", "--objects", "2", "--batch-size", "1", "--grid", "4"]
    tiny += ["--learning-rate", "0.1"]
    options = ["--base", str(tmp_path / "split"), "--image-size", str(SIDE), "--output", str(tmp_path / "run")]
    finetune.main([*photos, *tiny, *options])
    run_convert(tmp_path, "to-sam", "split", "tuned", "--adapter", "run/adapter")
    run_convert(tmp_path, "to-onnx", "split", "onnx", "--adapter", "run/adapter")

    base = split_class().from_pretrained(tmp_path / "split", image_size=SIDE)
    tuned = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    stock, processor = (each.from_pretrained(tmp_path / "tuned") for each in (SamModel, SamProcessor))
    image = Image.open(Path(photos[1], "photo1.png"))
    inputs = processor(image, input_points=[[[30, 10]]], return_tensors="pt").to(torch.float32)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    with torch.no_grad():
        expected, actual = tuned(**inputs), stock.eval()(**inputs)
    assert_same_outputs(expected, actual)
    masks = [processor.post_process_masks(outputs.pred_masks, *sizes)[0] for outputs in (expected, actual)]
    assert masks[0].shape[-2:] == image.size[::-1]
    assert masks[0].any() and not masks[0].all()
    np.testing.assert_array_equal(*masks)

    embeddings = run(tmp_path / "onnx" / "encoder.onnx", pixel_values=inputs["pixel_values"])["image_embeddings"]
    outputs = run(
        tmp_path / "onnx" / "decoder.onnx",
        image_embeddings=embeddings,
        input_points=torch.cat([inputs["input_points"], torch.zeros(1, 1, 1, 2)], dim=2),
        input_labels=torch.tensor([[[1, -1]]]),
        input_masks=torch.zeros(1, 1, SIDE // 2, SIDE // 2),
        has_input_masks=torch.zeros(1, 1, dtype=torch.bool),
        multimask_output=torch.tensor(True),
    )
    names = ("pred_masks", "iou_scores")
    assert_same_outputs({name: expected[name] for name in names}, {name: outputs[name] for name in names}, 1e-4)
