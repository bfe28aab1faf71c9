"""Compares the outputs of two models by their relative error.

The relative error of a tensor is the largest absolute difference, relative to the largest absolute expected value.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, SamProcessor, SamVisionConfig


Outputs = Mapping[str, torch.Tensor]
EXAMPLE_OUTPUTS = (
    "image_embeddings",
    "pred_masks from a point",
    "iou_scores from a point",
    "pred_masks from a box and a mask",
    "iou_scores from a box and a mask",
)


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


@dataclasses.dataclass
class ExampleInputs:
    """An image of noise (1, C, side, side), a point (1, 1, 1, 2), and a box (1, 1, 4) with a mask (1, 1, H, W)."""

    image: torch.Tensor
    point: torch.Tensor
    box: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, vision: SamVisionConfig) -> "ExampleInputs":
        """Returns the same inputs for the same sizes, in fp32."""
        side, grid = vision.image_size, vision.image_size // vision.patch_size
        generator = torch.Generator().manual_seed(0)
        return cls(
            image=torch.randn(1, vision.num_channels, side, side, generator=generator),
            point=torch.tensor([[[[0.3 * side, 0.6 * side]]]]),
            box=torch.tensor([[[0.2 * side, 0.1 * side, 0.7 * side, 0.9 * side]]]),
            mask=torch.randn(1, 1, 4 * grid, 4 * grid, generator=generator),
        )

    @staticmethod
    def named(*outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what a model gives for these inputs by the names that error messages use."""
        return dict(zip(EXAMPLE_OUTPUTS, outputs, strict=True))


@torch.no_grad()
def example_outputs(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Returns the embeddings of an image, and masks and scores from a point, and from a box with a mask.

    Of a vision encoder alone, the embeddings.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    is_complete = hasattr(model.config, "vision_config")
    inputs = ExampleInputs.of(model.config.vision_config if is_complete else model.config)
    image = inputs.image.to(model.dtype)
    if not is_complete:
        return {EXAMPLE_OUTPUTS[0]: model.eval()(image).last_hidden_state}
    embeddings = model.eval().get_image_embeddings(image)
    point = model(image_embeddings=embeddings, input_points=inputs.point)
    box = model(
        image_embeddings=embeddings,
        input_boxes=inputs.box,
        input_masks=inputs.mask.to(model.dtype),
        multimask_output=False,
    )
    return inputs.named(embeddings, point.pred_masks, point.iou_scores, box.pred_masks, box.iou_scores)


@torch.no_grad()
def processed_outputs(model: PreTrainedModel, processor: SamProcessor) -> dict[str, torch.Tensor]:
    """Returns what the processor makes of a small picture of noise, and the masks and scores for a point in it."""
    image = np.random.default_rng(0).integers(256, size=(96, 128, 3), dtype=np.uint8)
    inputs = processor(image, input_points=[[[[40, 60]]]], return_tensors="pt")
    outputs = model.eval()(**inputs)
    return {**{name: outputs[name] for name in ("pred_masks", "iou_scores")}, "pixel_values": inputs["pixel_values"]}
