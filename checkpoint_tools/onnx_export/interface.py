"""What an interface is, and the one with the names of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, SamProcessor

from .graphs import Graph, decode, embed_image, embed_masks, embed_points, per_object
from .prompts import Prompts


Tensors = dict[str, torch.Tensor]


class Encoder(Graph):
    """From `pixel_values` (images, 3, H, W) to `image_embeddings` (images, C, g, g)."""

    inputs = {"pixel_values": {0: "images"}}
    outputs = ["image_embeddings"]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `SamModel.get_image_embeddings`."""
        return embed_image(self.model, pixel_values)


class Decoder(Graph):
    """From embeddings and prompts of any kinds to masks, with a switch between three masks and one."""

    inputs = {
        "image_embeddings": {0: "images"},
        "input_points": {0: "images", 1: "objects", 2: "points"},
        "input_labels": {0: "images", 1: "objects", 2: "points"},
        "input_masks": {0: "images", 1: "objects"},
        "has_input_masks": {0: "images", 1: "objects"},
        "multimask_output": {},
    }
    outputs = ["pred_masks", "iou_scores"]

    def forward(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor,
        input_labels: torch.Tensor,
        input_masks: torch.Tensor,
        has_input_masks: torch.Tensor,
        multimask_output: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SamModel`, but boxes are points with the labels 2 and 3, and each object has an input mask.

        Args:
            image_embeddings: (images, C, g, g).
            input_points: (images, objects, points, 2).
            input_labels: (images, objects, points).
            input_masks: (images, objects, 4g, 4g), logits.
            has_input_masks: (images, objects), bool: false where `input_masks` is to be ignored.
            multimask_output: (), bool.

        Returns:
            Masks (images, objects, 3 or 1, 4g, 4g), logits, and scores (images, objects, 3 or 1).
        """
        images, objects = image_embeddings.shape[0], input_points.shape[1]
        masks, scores = decode(
            self.model,
            per_object(image_embeddings, objects),
            self.model.get_image_wide_positional_embeddings(),
            embed_points(self.model, input_points.flatten(0, 1), input_labels.flatten(0, 1)),
            embed_masks(self.model, input_masks.flatten(0, 1)[:, None], has_input_masks.flatten()),
        )
        selected = ((torch.arange(masks.shape[1]) > 0) == multimask_output).nonzero()[:, 0]
        torch._check_is_size(selected.shape[0])  # for torch 2.7
        torch._check(selected.shape[0] >= 1)
        masks, scores = masks.index_select(1, selected), scores.index_select(1, selected)
        return masks.reshape(images, objects, *masks.shape[1:]), scores.reshape(images, objects, -1)


class Interface:
    """Names and meanings of files, inputs and outputs that some tools expect. These are the names of transformers.

    Args:
        processor: Of the model.
        dtype: In which the encoder and the decoder compute.
        all_masks: Whether the decoder returns all masks, where it would otherwise select one.
    """

    encoder_file = "encoder.onnx"
    decoder_file = "decoder.onnx"
    example: Mapping[str, Any] = {"images": 2, "objects": 3, "points": 4, "mask": True}  # to export with
    cases: Mapping[str, Mapping[str, Any]] = {  # to compare with: arguments of Prompts.random(), too
        "points": {"objects": 2, "points": 1},
        "boxes": {"objects": 2, "points": 0, "box": True},
        "points, box and mask": {"points": 2, "box": True, "mask": True, "multimask_output": False},
    }

    def __init__(self, processor: SamProcessor, dtype: torch.dtype = torch.float32, all_masks: bool = False):
        self.processor = processor
        self.dtype = dtype
        self.all_masks = all_masks

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Returns what users of the files must know about this model."""
        return []

    def graphs(self, model: PreTrainedModel) -> tuple[Graph, Graph]:
        """Returns the encoder and the decoder."""
        return Encoder(model), Decoder(model)

    def example_images(self, model: PreTrainedModel) -> tuple[Tensors, torch.Tensor]:
        """Returns random inputs of the encoder, and their `pixel_values`."""
        vision = model.config.vision_config
        shape = (2, vision.num_channels, vision.image_size, vision.image_size)
        pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixel_values}, pixel_values

    def encoder_example(self, model: PreTrainedModel) -> Tensors:
        """Returns inputs of the encoder to export it with."""
        return self.example_images(model)[0]

    def decoder_inputs(self, embeddings: Tensors, prompts: Prompts) -> Tensors:
        """Returns what the decoder is given for outputs of the encoder and prompts."""
        points, labels = prompts.as_points()
        images, objects = labels.shape[:2]
        side = 4 * embeddings["image_embeddings"].shape[-1]
        masks = torch.zeros(images, 1, side, side) if prompts.masks is None else prompts.masks
        return embeddings | {
            "input_points": points,
            "input_labels": labels,
            "input_masks": masks.expand(-1, objects, -1, -1),
            "has_input_masks": torch.full((images, objects), prompts.masks is not None),
            "multimask_output": torch.tensor(prompts.multimask_output),
        }

    def expected(self, model: PreTrainedModel, embeddings: torch.Tensor, prompts: Prompts) -> Tensors:
        """Returns what the decoder must give, from `model`'s own forward."""
        return dict(zip(Decoder.outputs, prompts.outputs(model, embeddings), strict=True))

    def write_settings(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes the other files that the tools read."""
        self.processor.save_pretrained(folder)
