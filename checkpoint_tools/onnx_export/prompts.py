"""Prompts to export and to compare with, in the terms of `SamModel`."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, SamConfig


@dataclass
class Prompts:
    """Prompts for the objects of some images, all of the same kinds.

    Attributes:
        points: (images, objects, points, 2); without points, if there are boxes.
        labels: (images, objects, points), 1 and 0.
        boxes: (images, objects, 4).
        masks: (images, 1, 4g, 4g).
        multimask_output: As for `SamModel`.
    """

    points: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    multimask_output: bool = True

    @classmethod
    def random(
        cls,
        config: SamConfig,
        images: int = 1,
        objects: int = 1,
        points: int = 1,
        box: bool = False,
        mask: bool = False,
        multimask_output: bool = True,
    ) -> "Prompts":
        """Returns reproducible prompts."""
        generator = torch.Generator().manual_seed(0)
        side, grid = config.vision_config.image_size, config.prompt_encoder_config.image_embedding_size
        corners = (side * torch.rand(images, objects, 2, 2, generator=generator)).sort(dim=2).values
        return cls(
            side * torch.rand(images, objects, points, 2, generator=generator),
            torch.randint(0, 2, (images, objects, points), generator=generator),
            corners.flatten(2) if box else None,
            torch.randn(images, 1, 4 * grid, 4 * grid, generator=generator) if mask else None,
            multimask_output,
        )

    def as_points(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns points and labels, with boxes as corners of labels 2 and 3, and without boxes one point of label -1.

        Like `SamModel` does it.
        """
        images, objects = self.points.shape[:2]
        if self.boxes is None:
            more, labels = torch.zeros(images, objects, 1, 2), torch.tensor([-1])
        else:
            more, labels = self.boxes.reshape(images, objects, 2, 2), torch.tensor([2, 3])
        return torch.cat([self.points, more], 2), torch.cat([self.labels, labels.expand(images, objects, -1)], 2)

    @torch.no_grad()
    def outputs(self, model: PreTrainedModel, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the masks (images, objects, masks, 4g, 4g) and scores of `SamModel`'s own forward."""
        has_points = self.points.shape[2] > 0
        outputs = model(
            image_embeddings=embeddings[: len(self.points)],
            input_points=self.points if has_points else None,
            input_labels=self.labels if has_points else None,
            input_boxes=self.boxes,
            input_masks=self.masks,
            multimask_output=self.multimask_output,
        )
        return outputs.pred_masks, outputs.iou_scores
