"""The interface of Meta's own export, which samexporter, AnyLabeling, X-AnyLabeling and others expect.

https://github.com/facebookresearch/segment-anything/blob/dca509f/scripts/export_onnx_model.py
https://github.com/vietanhdev/samexporter/blob/main/samexporter/sam_onnx.py
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from transformers import PreTrainedModel, SamProcessor

from .graphs import Graph, decode, embed_image, embed_masks, embed_points
from .interface import Interface, Tensors
from .prompts import Prompts


ASSUMED_SIZE = 1024  # of the longer side of images in samexporter and others


class Encoder(Graph):
    """From an image, resized so that its longer side is the model's, to `image_embeddings`, as samexporter exports it.

    An image that is larger fails in the graph.
    """

    inputs = {"input_image": {0: "height", 1: "width"}}
    outputs = ["image_embeddings"]
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: PreTrainedModel, mean: torch.Tensor, std: torch.Tensor):
        super().__init__(model)
        self.side = model.config.vision_config.image_size
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, input_image: torch.Tensor) -> torch.Tensor:
        """From RGB (height, width, 3), float32 of 0 to 255, to (1, C, g, g)."""
        pixels = (input_image - self.mean) / self.std
        pixels = torch.cat([pixels, pixels.new_zeros(self.side - pixels.shape[0], pixels.shape[1], 3)], dim=0)
        pixels = torch.cat([pixels, pixels.new_zeros(self.side, self.side - pixels.shape[1], 3)], dim=1)
        return embed_image(self.model, pixels.permute(2, 0, 1)[None])


class Decoder(Graph):
    """From embeddings and prompts of one object to masks in the size of the image."""

    inputs = {
        "image_embeddings": {},
        "point_coords": {1: "num_points"},
        "point_labels": {1: "num_points"},
        "mask_input": {},
        "has_mask_input": {},
        "orig_im_size": {},
    }
    outputs = ["masks", "iou_predictions", "low_res_masks"]

    def __init__(self, model: PreTrainedModel, all_masks: bool):
        super().__init__(model)
        self.side = model.config.vision_config.image_size
        self.all_masks = all_masks

    def forward(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor,
        has_mask_input: torch.Tensor,
        orig_im_size: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Meta's `SamOnnxModel`.

        Args:
            image_embeddings: (1, C, g, g).
            point_coords: (1, points, 2), in pixels of the resized image.
            point_labels: (1, points), float32.
            mask_input: (1, 1, 4g, 4g), logits.
            has_mask_input: (1), float32: 0 where `mask_input` is to be ignored.
            orig_im_size: (2), float32: height and width.

        Returns:
            Logits of masks (1, 1 or 4, height, width), scores (1, 1 or 4), and logits (1, 1 or 4, 4g, 4g).
        """
        masks, scores = decode(
            self.model,
            image_embeddings,
            self.model.get_image_wide_positional_embeddings(),
            embed_points(self.model, point_coords, point_labels),
            embed_masks(self.model, mask_input, has_mask_input),
        )
        if not self.all_masks:  # the best of the three for two points, padding included, otherwise the single mask
            points = torch.ones_like(point_labels).sum()
            is_single = torch.arange(scores.shape[1]) == 0
            best = (scores + 1000 * (points - 2.5) * is_single).argmax(dim=1)
            masks, scores = masks.index_select(1, best), scores.index_select(1, best)
        return self.resize(masks, orig_im_size), scores, masks

    def resize(self, masks: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Resizes masks (1, masks, 4g, 4g) to the `size` of the image, without the padding."""
        size = size.double()  # like Python's numbers, with which images are resized
        resized = torch.floor(size * (self.side / size.max()) + 0.5)
        height, width, resized_height, resized_width = torch.cat([size, resized]).long().tolist()
        for length in (height, width, resized_height, resized_width):
            torch._check_is_size(length)  # without it, torch 2.7 exports the lengths of the example as constants
            torch._check(length >= 1)
        torch._check(resized_height <= self.side)
        torch._check(resized_width <= self.side)
        masks = interpolate(masks, (self.side, self.side), mode="bilinear", align_corners=False)
        masks = masks[..., :resized_height, :resized_width]
        return interpolate(masks, (height, width), mode="bilinear", align_corners=False)


def image_size(prompts: Prompts) -> tuple[int, int]:
    """Returns height and width of an image: another for each number of points, so that no example is compared with."""
    points = prompts.points.shape[2]
    return 90 + 10 * points, 135 - 20 * points


class Sam(Interface):
    """Meta's names, for one object. The encoder includes the processor's normalization.

    The decoder returns the mask that Meta's `return_single_mask` selects, or all four.
    """

    example = {"points": 4, "mask": True}
    cases = {
        "point": {},
        "box": {"points": 0, "box": True},
        "points, box and mask": {"points": 2, "box": True, "mask": True},
    }

    def __init__(self, processor: SamProcessor, dtype: torch.dtype = torch.float32, all_masks: bool = False):
        super().__init__(processor, dtype, all_masks)
        if dtype == torch.float16 and not all_masks:  # rounding may make another of the three masks the best one
            self.cases = {name: case for name, case in self.cases.items() if "mask" in case}

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Returns what is wrong with the size, if it is another than the tools assume."""
        side = model.config.vision_config.image_size
        if side == ASSUMED_SIZE:
            return []
        return [
            f"The model's image_size is {side}. samexporter, AnyLabeling and X-AnyLabeling assume {ASSUMED_SIZE}, and "
            "cannot use these files. Code that resizes images and coordinates to the model's size can."
        ]

    def graphs(self, model: PreTrainedModel) -> tuple[Graph, Graph]:
        """Returns the encoder and the decoder."""
        settings = self.processor.image_processor
        factor = settings.rescale_factor if settings.do_rescale else 1
        mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else ((0, 0, 0), (1, 1, 1))
        encoder = Encoder(model, torch.tensor(mean) / factor, torch.tensor(std) / factor)
        return encoder, Decoder(model, self.all_masks)

    def example_images(self, model: PreTrainedModel) -> tuple[Tensors, torch.Tensor]:
        """Returns an image, and what the processor makes of it."""
        side = model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (side * 3 // 4, side, 3), generator=generator, dtype=torch.uint8)
        pixel_values = self.processor(image.numpy(), return_tensors="pt")["pixel_values"]
        return {"input_image": image.float()}, pixel_values

    def encoder_example(self, model: PreTrainedModel) -> Tensors:
        """Returns an image that needs padding below and beside it: torch 2.7 exports a side without as a constant."""
        side = model.config.vision_config.image_size
        return {"input_image": torch.zeros(side * 3 // 4, side * 7 // 8, 3)}

    def decoder_inputs(self, embeddings: Tensors, prompts: Prompts) -> Tensors:
        """Returns the prompts of the one object."""
        points, labels = prompts.as_points()
        side = 4 * embeddings["image_embeddings"].shape[-1]
        no_mask = torch.zeros(1, 1, side, side)
        return embeddings | {
            "point_coords": points[0],
            "point_labels": labels[0].float(),
            "mask_input": no_mask if prompts.masks is None else prompts.masks,
            "has_mask_input": torch.tensor([float(prompts.masks is not None)]),
            "orig_im_size": torch.tensor(image_size(prompts), dtype=torch.float32),
        }

    def expected(self, model: PreTrainedModel, embeddings: torch.Tensor, prompts: Prompts) -> Tensors:
        """Returns what the decoder must give, from `model`'s own forward."""
        outputs = [replace(prompts, multimask_output=value).outputs(model, embeddings) for value in (False, True)]
        low_res_masks, scores = (torch.cat(tensors, dim=2)[0] for tensors in zip(*outputs, strict=True))
        if not self.all_masks:
            best = 1 + scores[0, 1:].argmax() if prompts.as_points()[0].shape[2] <= 2 else 0
            low_res_masks, scores = low_res_masks[:, best, None], scores[:, best, None]
        side = model.config.vision_config.image_size
        size = image_size(prompts)
        height, width = (int(length * side / max(size) + 0.5) for length in size)
        masks = interpolate(low_res_masks, (side, side), mode="bilinear")[..., :height, :width]
        masks = interpolate(masks, size, mode="bilinear")
        return {"masks": masks, "iou_predictions": scores, "low_res_masks": low_res_masks}

    def write_settings(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes nothing: the tools read the two files alone."""
