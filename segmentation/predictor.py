"""Encodes an image once, and answers as many prompts as you like about it.

predictor = Predictor(model, processor)
encoded = predictor.encode(image)                        # slow: the vision encoder, (H, W, 3) uint8
prompts = ObjectPrompts(points=[[[120, 80], [40, 60]]], labels=[[1, 0]])  # one object: a point in it, one beside it
masks, ratings, logits = predictor.predict(encoded, prompts, multimask=False)  # fast: the mask decoder
prompts = replace(prompts, masks=logits)                 # refine: the last mask is a prompt, too
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, SamProcessor

from .predicted_masks import best_rated


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What the vision encoder makes of an image.

    Args:
        embedding: (1, channels, h, w).
        size: Height and width of the image, in pixels.
        resized: Height and width to which the processor has resized it, before padding.
    """

    embedding: torch.Tensor
    size: tuple[int, int]
    resized: tuple[int, int]


@dataclass(frozen=True, eq=False)
class ObjectPrompts:
    """Prompts for n objects, in pixels of the image. All objects have the same kinds.

    Args:
        points: (x, y) of the points of each object. Objects may have different numbers of points.
        labels: Of each point: 1 inside of the object, 0 outside. All are inside if there are no labels.
        boxes: (left, top, right, bottom) of each object.
        masks: Logits (n, h, w) at the resolution of the mask decoder, as `Predictor.predict` returns them.
    """

    points: Sequence[Sequence[Sequence[float]]] | None = None
    labels: Sequence[Sequence[int]] | None = None
    boxes: Sequence[Sequence[float]] | None = None
    masks: torch.Tensor | None = None

    @property
    def is_single_point(self) -> bool:
        """Whether every object has one point and nothing else: a prompt that may mean several objects."""
        only_points = self.points is not None and self.boxes is None and self.masks is None
        return only_points and all(len(points) == 1 for points in self.points or ())


class Predictor:
    """A model and its processor, for one image at a time.

    Args:
        model: Stock or split SAM, or a `PeftModel` of one (whose adapter `disable_adapter()` switches off).
        processor: The model's.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, processor: SamProcessor):
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.processor = processor

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> EncodedImage:
        """Runs the vision encoder on an image (H, W, 3) uint8.

        Raises:
            ValueError: If the image is so narrow that nothing of it would be left.
        """
        (height, width), side = image.shape[:2], self.processor.image_processor.size["longest_edge"]
        if round(side * min(height, width) / max(height, width)) < 1:
            raise ValueError(
                f"{width} x {height} pixels are too narrow for a model that sees {side} x {side}: cut it into shorter "
                "pieces, or use --tile."
            )
        inputs = self.processor(images=[image], input_data_format="channels_last", return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        height, width = inputs["reshaped_input_sizes"][0].tolist()
        return EncodedImage(self.model.get_image_embeddings(pixel_values), image.shape[:2], (height, width))

    @torch.no_grad()
    def decode(
        self, encoded: EncodedImage, prompts: ObjectPrompts, multimask: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the mask decoder.

        Returns:
            Ratings (n, masks), and logits (n, masks, h, w) of one mask or three. Their lower or right part lies
            outside of an image that is not square.
        """
        inputs = self.prompt_inputs(encoded, prompts)
        embedding = encoded.embedding
        if prompts.masks is not None:  # the decoder takes one mask for each image of a batch
            number = len(prompts.masks)
            inputs = {name: tensor.transpose(0, 1) for name, tensor in inputs.items()}
            inputs["input_masks"] = prompts.masks.unsqueeze(1).to(embedding)
            embedding = embedding.expand(number, -1, -1, -1)
        outputs = self.model(image_embeddings=embedding, multimask_output=multimask, **inputs)
        return outputs.iou_scores.flatten(0, 1).float(), outputs.pred_masks.flatten(0, 1).float()

    def prompt_inputs(self, encoded: EncodedImage, prompts: ObjectPrompts) -> dict[str, torch.Tensor]:
        """Returns points, labels and boxes as the model takes them: for one image, in pixels of the resized image."""
        (height, width), (new_height, new_width) = encoded.size, encoded.resized
        scale = np.array([new_width / width, new_height / height])
        options: dict[str, Any] = {"device": encoded.embedding.device}
        inputs = {}
        if prompts.points is not None:
            most = max(map(len, prompts.points), default=1)
            points = np.zeros((1, len(prompts.points), most, 2))
            labels = np.full(points.shape[:-1], -10)  # SAM's label for padding points
            for index, ours in enumerate(prompts.points):
                points[0, index, : len(ours)] = np.asarray(ours, dtype=float) * scale
                labels[0, index, : len(ours)] = 1 if prompts.labels is None else prompts.labels[index]
            inputs["input_points"] = torch.tensor(points, dtype=torch.float32, **options)
            inputs["input_labels"] = torch.tensor(labels, **options)
        if prompts.boxes is not None:
            boxes = np.reshape(np.asarray(prompts.boxes, dtype=float), (1, -1, 4)) * np.tile(scale, 2)
            inputs["input_boxes"] = torch.tensor(boxes, dtype=torch.float32, **options)
        return inputs

    def predict(
        self, encoded: EncodedImage, prompts: ObjectPrompts, multimask: bool
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Returns the best rated mask of each object.

        Returns:
            Masks (n, H, W) bool in the image, ratings (n,), and logits (n, h, w), which may serve as the next prompt.
        """
        ratings, logits = best_rated(*(part[None] for part in self.decode(encoded, prompts, multimask)))
        return self.full_size(encoded, logits[0]), ratings[0].cpu().numpy(), logits[0]

    def full_size(self, encoded: EncodedImage, logits: torch.Tensor) -> np.ndarray:
        """Returns masks (n, H, W) bool at the size of the image, from logits (n, h, w)."""
        if not len(logits):
            return np.zeros((0, *encoded.size), dtype=bool)
        (masks,) = self.processor.post_process_masks(
            logits[None, :, None], [list(encoded.size)], [list(encoded.resized)]
        )
        return masks[:, 0].cpu().numpy()

    def without_padding(self, encoded: EncodedImage, logits: torch.Tensor) -> torch.Tensor:
        """Returns the part of logits (..., h, w) that lies in the image."""
        padded = self.processor.image_processor.pad_size
        rows = math.ceil(encoded.resized[0] * logits.shape[-2] / padded["height"])
        columns = math.ceil(encoded.resized[1] * logits.shape[-1] / padded["width"])
        return logits[..., :rows, :columns]
