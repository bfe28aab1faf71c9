"""Exports SAM to ONNX: an image encoder, and one mask decoder per kind of prompt."""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel


# Decoder inputs besides image_embeddings, with their dynamic dimensions. The batch size is fixed to 1: with a dynamic
# batch, the exported file fails for several objects per image.
DECODERS = {
    "points_decoder.onnx": {
        "input_points": {1: "objects", 2: "points"},
        "input_labels": {1: "objects", 2: "points"},
    },
    "boxes_decoder.onnx": {"input_boxes": {1: "objects"}},
}
ENCODER = "encoder.onnx"


class EncoderGraph(nn.Module):
    """From pixel_values (B, 3, H, W) to image_embeddings."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `SamModel.get_image_embeddings`."""
        return self.model.get_image_embeddings(pixel_values)


class DecoderGraph(nn.Module):
    """From image_embeddings of one image and prompts of one kind to masks and their scores."""

    def __init__(self, model: PreTrainedModel, prompts: list[str]):
        super().__init__()
        self.model = model
        self.prompts = prompts

    def forward(self, image_embeddings: torch.Tensor, *prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SamModel`, for the three masks of each object."""
        outputs = self.model(image_embeddings=image_embeddings, **dict(zip(self.prompts, prompts, strict=True)))
        return outputs.pred_masks, outputs.iou_scores


def example_inputs(model: PreTrainedModel, images: int, objects: int, points: int) -> dict[str, torch.Tensor]:
    """Returns random images and prompts."""
    generator = torch.Generator().manual_seed(0)
    side, channels = model.config.vision_config.image_size, model.config.vision_config.num_channels
    corners = (side * torch.rand(1, objects, 2, 2, generator=generator)).sort(dim=2).values
    return {
        "pixel_values": torch.randn(images, channels, side, side, generator=generator),
        "input_points": side * torch.rand(1, objects, points, 2, generator=generator),
        "input_labels": torch.randint(0, 2, (1, objects, points), generator=generator),
        "input_boxes": corners.flatten(2),
    }


def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes all files."""
    inputs = example_inputs(model, images=2, objects=3, points=4)
    with torch.no_grad():
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
    write(folder / ENCODER, EncoderGraph(model), {"pixel_values": inputs["pixel_values"]}, [{0: "images"}])
    for file, dimensions in DECODERS.items():
        tensors = {"image_embeddings": embeddings[:1]} | {name: inputs[name] for name in dimensions}
        write(folder / file, DecoderGraph(model, list(dimensions)), tensors, [None, tuple(dimensions.values())])


def write(file: Path, module: nn.Module, inputs: dict[str, torch.Tensor], dimensions: list) -> None:
    """Exports one module, with the dynamic `dimensions`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter emits warnings about its own internals
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            file,
            dynamo=True,
            input_names=list(inputs),
            output_names=["image_embeddings"] if len(inputs) == 1 else ["pred_masks", "iou_scores"],
            dynamic_shapes=dimensions,
            verbose=False,
        )


def onnx_outputs(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what onnxruntime gives: embeddings, and masks and scores from each decoder."""
    import onnxruntime  # which only this needs

    def run(file: str, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        arrays = session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        return [torch.from_numpy(array) for array in arrays]

    (embeddings,) = run(ENCODER, {"pixel_values": inputs["pixel_values"]})
    outputs = {ENCODER: embeddings}
    for file, names in DECODERS.items():
        masks, scores = run(file, {"image_embeddings": embeddings[:1]} | {name: inputs[name] for name in names})
        outputs |= {f"{file}: pred_masks": masks, f"{file}: iou_scores": scores}
    return outputs


@torch.no_grad()
def model_outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what `model` itself gives, by the names that `onnx_outputs` has."""
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    outputs = {ENCODER: embeddings}
    for file, names in DECODERS.items():
        masks, scores = DecoderGraph(model, list(names))(embeddings[:1], *(inputs[name] for name in names))
        outputs |= {f"{file}: pred_masks": masks, f"{file}: iou_scores": scores}
    return outputs
