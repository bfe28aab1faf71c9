"""Compares the outputs of two models by their relative error.

The relative error of a tensor is the largest absolute difference, relative to the largest absolute expected value.
"""

from collections.abc import Mapping

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, SamProcessor


Outputs = Mapping[str, torch.Tensor]


class OutputsDifferError(ValueError):
    """The outputs of two models differ by more than rounding."""


def compare(actual: Outputs, expected: Outputs, tolerance: float, reference: str = "stock SamModel") -> float:
    """Returns the largest relative error of an output.

    Args:
        actual: Outputs by name.
        expected: The outputs of `reference`, by the same names.
        tolerance: The largest relative error that is accepted.
        reference: What the error message calls the model that gave `expected`.

    Raises:
        OutputsDifferError: If the error is larger than `tolerance`, or not a number.
    """
    error = largest_relative_error(actual, expected)
    if not error <= tolerance:  # false for NaN, too
        raise OutputsDifferError(
            f"its outputs differ from {reference}'s by {error:.1e} relative to the largest, more than {tolerance:.1e}."
        )
    return error


def largest_relative_error(actual: Outputs, expected: Outputs) -> float:
    """Returns the largest relative error of an output; NaN if one is not a number.

    Raises:
        ValueError: If the outputs have other names or shapes.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"expected the outputs {', '.join(expected)}, got {', '.join(actual)}.")
    return torch.tensor([relative_error(actual[name], expected[name]) for name in expected]).max().item()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest absolute difference, relative to the largest absolute value of `expected`.

    Raises:
        ValueError: If the tensors have different shapes.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"expected the shape {tuple(expected.shape)}, got {tuple(actual.shape)}.")
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # zeros that agree have no error
    return ((actual - expected).abs().max() / scale).item()


@torch.no_grad()
def example_outputs(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Returns the embeddings of an image of noise, and masks and scores from a point, and from a box with a mask."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    vision = model.config.vision_config
    side, grid = vision.image_size, vision.image_size // vision.patch_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, vision.num_channels, side, side, generator=generator)
    mask = torch.randn(1, 1, 4 * grid, 4 * grid, generator=generator)
    embeddings = model.eval().get_image_embeddings(image)
    point = model(image_embeddings=embeddings, input_points=torch.tensor([[[[0.3 * side, 0.6 * side]]]]))
    box = model(
        image_embeddings=embeddings,
        input_boxes=torch.tensor([[[0.2 * side, 0.1 * side, 0.7 * side, 0.9 * side]]]),
        input_masks=mask,
        multimask_output=False,
    )
    return {
        "image_embeddings": embeddings,
        "pred_masks from a point": point.pred_masks,
        "iou_scores from a point": point.iou_scores,
        "pred_masks from a box and a mask": box.pred_masks,
        "iou_scores from a box and a mask": box.iou_scores,
    }


@torch.no_grad()
def processed_outputs(model: PreTrainedModel, processor: SamProcessor) -> dict[str, torch.Tensor]:
    """Returns what the processor makes of a small picture of noise, and the masks and scores for a point in it."""
    image = np.random.default_rng(0).integers(256, size=(96, 128, 3), dtype=np.uint8)
    inputs = processor(image, input_points=[[[[40, 60]]]], return_tensors="pt")
    outputs = model.eval()(**inputs)
    return {**{name: outputs[name] for name in ("pred_masks", "iou_scores")}, "pixel_values": inputs["pixel_values"]}
