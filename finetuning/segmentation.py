"""Segments an image, from points, from boxes, or everything in it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, SamProcessor, pipeline

from checkpoint_tools.masks import best_rated
from checkpoint_tools.outputs import png_mark, staged_file
from checkpoint_tools.staging import SAM_TINY

from .model import load_adapted, load_base
from .pictures import overlay


PICTURE = "picture of masks"  # the kind of output
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def check_prompts(points: list[list[float]], boxes: list[list[float]], image: np.ndarray) -> None:
    """Checks that prompts lie in the image.

    Raises:
        ValueError: If one does not.
    """
    height, width = image.shape[:2]
    for x, y in (*points, *(box[:2] for box in boxes), *(box[2:] for box in boxes)):
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"({x:g}, {y:g}) is outside of the image of {width} x {height} pixels.")
    for left, top, right, bottom in boxes:
        if left >= right or top >= bottom:
            raise ValueError(f"--box {left:g} {top:g} {right:g} {bottom:g}: expected left < right and top < bottom.")


def load(base: str | None, revision: str | None, adapter: str | None) -> tuple[PreTrainedModel, SamProcessor]:
    """Returns the model, with the adapter merged, and its processor. The default base is the adapter's, or sam-tiny.

    Raises:
        ModelError: If there is none.
    """
    if adapter:
        adapted, processor = load_adapted(adapter, base, revision)
        model = adapted.merge_and_unload()
    else:
        model, processor = load_base(base or str(SAM_TINY), revision)
    return model.eval().to(DEVICE), processor


@torch.no_grad()
def prompted(
    model: PreTrainedModel,
    processor: SamProcessor,
    image: np.ndarray,
    points: list[list[float]],
    boxes: list[list[float]],
    multimask: bool,
) -> np.ndarray:
    """Returns a mask for each point or box (objects, H, W), of several the one with the highest predicted IoU."""
    prompts = {"input_boxes": [boxes]} if boxes else {"input_points": [[[point] for point in points]]}
    inputs = processor(images=[image], input_data_format="channels_last", return_tensors="pt", **prompts)
    names = [name for name in ("pixel_values", "input_points", "input_boxes") if name in inputs]
    outputs = model(**{name: inputs[name].float().to(DEVICE) for name in names}, multimask_output=multimask)
    _, logits = best_rated(outputs.iou_scores, outputs.pred_masks)
    (masks,) = processor.post_process_masks(
        logits.unsqueeze(2).cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    return masks[:, 0].numpy()


def everything(
    model: PreTrainedModel,
    processor: SamProcessor,
    image: np.ndarray,
    grid: int,
    min_iou: float,
    min_stability: float,
) -> np.ndarray:
    """Returns all masks above the thresholds (objects, H, W), largest first."""
    # Use stock SAM, because the pipeline logs an error for unknown classes.
    generate = pipeline(
        "mask-generation", model=model.to_sam().eval(), image_processor=processor.image_processor, device=DEVICE
    )
    limits = {"pred_iou_thresh": min_iou, "stability_score_thresh": min_stability}
    generated = generate(Image.fromarray(image), points_per_batch=64, points_per_crop=grid, **limits)["masks"]
    masks = np.array([np.asarray(mask) for mask in generated], dtype=bool).reshape(-1, *image.shape[:2])
    return masks[np.argsort(-masks.sum((1, 2)))]


def as_labels(masks: np.ndarray) -> np.ndarray:
    """Numbers the masks from 1 in one image (H, W); where they overlap, the last is in front."""
    labels = np.zeros(masks.shape[1:], dtype=np.uint16)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    return labels


def picture_paths(output: Path) -> tuple[Path, Path]:
    """Returns the paths of the overlay and of the label image, whose names begin with `output`."""
    return output.with_name(f"{output.name}-masks.png"), output.with_name(f"{output.name}-labels.png")


def write_pictures(image: np.ndarray, masks: np.ndarray, output: Path, force: bool = False) -> tuple[Path, Path]:
    """Writes an overlay and a label image, and returns their paths.

    Raises:
        FileExistsError: If one is there already and, with `force`, is no picture of an earlier run.
    """
    paths = picture_paths(output)
    for path, picture in zip(paths, (overlay(image, masks), as_labels(masks)), strict=True):
        with staged_file(path, PICTURE, force) as file:
            Image.fromarray(picture).save(file, pnginfo=png_mark(PICTURE))
    return paths
