"""The interface of transformers.js: what its `SamModel` and `AutoProcessor` load from a repo.

https://github.com/huggingface/transformers.js/blob/main/packages/transformers/src/models/sam/modeling_sam.js
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, SamProcessor

from .graphs import Graph, decode, embed_image, embed_points, per_object
from .interface import Interface, Tensors
from .prompts import Prompts


class Encoder(Graph):
    """From `pixel_values` (B, 3, H, W) to embeddings and positional embeddings, both (B, C, g, g)."""

    inputs = {"pixel_values": {0: "batch_size"}}
    outputs = ["image_embeddings", "image_positional_embeddings"]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers.js asks for it: embeddings of places, although all images have the same."""
        embeddings = embed_image(self.model, pixel_values)
        positions = self.model.get_image_wide_positional_embeddings()
        return embeddings, positions.repeat(embeddings.shape[0], 1, 1, 1)


class Decoder(Graph):
    """From embeddings and points to three masks of each object."""

    inputs = {
        "image_embeddings": {0: "batch_size"},
        "image_positional_embeddings": {0: "batch_size"},
        "input_points": {0: "batch_size", 1: "point_batch_size", 2: "nb_points_per_image"},
        "input_labels": {0: "batch_size", 1: "point_batch_size", 2: "nb_points_per_image"},
    }
    outputs = ["iou_scores", "pred_masks"]

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        input_points: torch.Tensor,
        input_labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SamModel` for points; it appends the point of label -1. The labels 2 and 3 are corners of a box.

        Returns:
            Scores (images, objects, 3) and masks (images, objects, 3, 4g, 4g), logits.
        """
        images, objects = input_points.shape[:2]
        points, labels = input_points.flatten(0, 1), input_labels.flatten(0, 1)
        points = torch.cat([points, torch.zeros_like(points[:, :1])], dim=1)
        labels = torch.cat([labels, torch.full_like(labels[:, :1], -1)], dim=1)
        masks, scores = decode(
            self.model,
            per_object(image_embeddings, objects),
            per_object(image_positional_embeddings, objects),
            embed_points(self.model, points, labels),
            self.model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
            multimask_outputs=(True,),
        )
        return scores.unflatten(0, (images, objects)), masks.unflatten(0, (images, objects))


class TransformersJs(Interface):
    """A folder that `SamModel.from_pretrained` of transformers.js loads."""

    example = {"images": 2, "objects": 3, "points": 4}
    cases = {"points": {"objects": 2, "points": 1}}

    def __init__(self, processor: SamProcessor, dtype: torch.dtype = torch.float32, all_masks: bool = False):
        super().__init__(processor, dtype, all_masks)
        suffix = "_fp16" if dtype == torch.float16 else ""
        self.encoder_file = f"onnx/vision_encoder{suffix}.onnx"
        self.decoder_file = f"onnx/prompt_encoder_mask_decoder{suffix}.onnx"

    def graphs(self, model: PreTrainedModel) -> tuple[Graph, Graph]:
        """Returns the encoder and the decoder."""
        return Encoder(model), Decoder(model)

    def decoder_inputs(self, embeddings: Tensors, prompts: Prompts) -> Tensors:
        """Returns the points alone, as the graph appends one."""
        return embeddings | {"input_points": prompts.points, "input_labels": prompts.labels}

    def expected(self, model: PreTrainedModel, embeddings: torch.Tensor, prompts: Prompts) -> Tensors:
        """Returns what the decoder must give, from `model`'s own forward."""
        masks, scores = prompts.outputs(model, embeddings)
        return {"iou_scores": scores, "pred_masks": masks}

    def write_settings(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes the configurations of a stock model and its image processor, flat, as transformers < 5 did."""
        config = model.config.to_sam()
        config.architectures = ["SamModel"]
        if external := {path.name.removesuffix("_data"): 1 for path in sorted(folder.glob("onnx/*.onnx_data"))}:
            setattr(config, "transformers.js_config", {"use_external_data_format": external})
        config.save_pretrained(folder)
        image_processor = json.loads(self.processor.image_processor.to_json_string())
        names = {"image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor"}
        text = json.dumps(image_processor | names, indent=2, sort_keys=True)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
