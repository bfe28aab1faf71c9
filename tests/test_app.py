"""The actions of the page, without a browser: what a user clicks on, and what comes of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from peft import LoraConfig, PeftModel, get_peft_model
from pycocotools import mask as coco_mask
from transformers import AutoProcessor, SamModel

from checkpoint_tools.staging import ROOT, SAM_TINY, split_class
from finetuning.segmentation_settings import SegmentationSettings
from webapp import session as actions
from webapp.downloads import write_files
from webapp.drawing import draw
from webapp.handlers import open_file, required, segment_file, shown_as_message, table_of
from webapp.screen import place_in_image
from webapp.segmenter import Segmenter, Source, load_segmenter
from webapp.session import ActionError, Session


COINS = ROOT / "docs" / "images" / "coins.png"
COIN = (335.5, 43.5)
SETTINGS = SegmentationSettings(min_iou=0.4, min_stability=0.6, grid=6)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """With an adapter that changes the masks."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    model = get_peft_model(split_class().from_pretrained(SAM_TINY), config).eval()
    return Segmenter(model, AutoProcessor.from_pretrained(SAM_TINY), SETTINGS)


@pytest.fixture(scope="module")
def opened(segmenter: Segmenter) -> Session:
    return open_file(segmenter, COINS)


def stock_masks(model: SamModel, **prompts) -> list[np.ndarray]:
    """SAM's three masks and the single one, as transformers' own documentation makes them."""
    processor = AutoProcessor.from_pretrained(SAM_TINY)
    inputs = processor(Image.open(COINS).convert("RGB"), return_tensors="pt", **prompts)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    masks = []
    for multimask in (True, False):
        with torch.no_grad():
            outputs = model(
                **{k: v for k, v in inputs.items() if not k.endswith("sizes")}, multimask_output=multimask
            )
        masks += [*processor.post_process_masks(outputs.pred_masks, *sizes)[0][0].numpy()]
    return masks


def assert_masks(session: Session, expected: list[np.ndarray]) -> None:
    assert len(session.masks) == len(expected) == 4
    for segment, mask in zip(session.masks, expected, strict=True):
        assert np.mean(segment.full(mask.shape) != mask) < 1e-4, "but for pixels at the threshold"


def merged_stock(segmenter: Segmenter) -> SamModel:
    state = get_state(segmenter)
    return state


def get_state(segmenter: Segmenter) -> SamModel:
    raise NotImplementedError
