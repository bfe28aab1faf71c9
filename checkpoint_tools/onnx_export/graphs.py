"""What the graphs of all interfaces share: prompts become tokens, and tokens become all four masks of an object.

Objects are the batch of the decoder: with `point_batch_size`, the exported file would work for one image only.
Shapes: N objects, T tokens, C channels, g rows and columns of the embeddings.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


class Graph(nn.Module):
    """One ONNX file.

    Attributes:
        inputs: The inputs by name, with the names of their dynamic dimensions.
        outputs: The names of the outputs.
    """

    inputs: dict[str, dict[int, str]]
    outputs: list[str]

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model


def embed_image(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns the embeddings (B, C, g, g) of images (B, 3, H, W) in float32, computed in the encoder's dtype."""
    return model.get_image_embeddings(pixel_values.to(model.vision_encoder.dtype)).float()


def embed_points(model: PreTrainedModel, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Embeds points, and the corners of boxes.

    https://github.com/facebookresearch/segment-anything/blob/dca509f/segment_anything/utils/onnx.py#L52

    Args:
        model: In float32, up to its encoder and decoder.
        points: (N, T, 2): x and y in pixels of the resized image.
        labels: (N, T): 1 inside of the object, 0 outside, 2 and 3 the upper left and lower right corner of a box,
            -1 no point, -10 a token of zeros. Any other label leaves the point without a meaning.

    Returns:
        Tokens (N, 1, T, C).
    """
    encoder = model.prompt_encoder
    side = encoder.input_image_size
    labels = labels[:, None, :, None]
    tokens = encoder.shared_embedding((points + 0.5)[:, None], (side, side))
    tokens = torch.where(labels == -1, encoder.not_a_point_embed.weight, tokens)
    tokens = torch.where(labels == -10, 0.0, tokens)
    for label, embedding in enumerate(encoder.point_embed):
        tokens = torch.where(labels == label, tokens + embedding.weight, tokens)
    return tokens


def embed_masks(model: PreTrainedModel, masks: torch.Tensor, are_given: torch.Tensor) -> torch.Tensor:
    """Returns embeddings (N, C, g, g) of the masks (N, 1, 4g, 4g) that are given (N), and elsewhere of no mask."""
    encoder = model.prompt_encoder
    no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return torch.where(are_given.bool()[:, None, None, None], encoder.mask_embed(masks), no_mask)


def decode(
    model: PreTrainedModel,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    masks: torch.Tensor,
    multimask_outputs: tuple[bool, ...] = (False, True),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the masks of each object: by default four, the single one and the three.

    Args:
        model: Of which the decoder may have another dtype.
        embeddings: Of the image of each object, (N, C, g, g).
        positions: Positional embeddings of images, (N or 1, C, g, g).
        tokens: (N, 1, T, C).
        masks: Embeddings of input masks, (N or 1, C, g, g).
        multimask_outputs: As for `SamModel`, whose results are concatenated.

    Returns:
        Masks (N, M, 4g, 4g) and scores (N, M) in float32.
    """
    dtype = model.mask_decoder.iou_token.weight.dtype
    outputs = [  # the exporter computes what both have in common once
        model.mask_decoder(
            image_embeddings=embeddings.to(dtype),
            image_positional_embeddings=positions.expand_as(embeddings).to(dtype),
            sparse_prompt_embeddings=tokens.to(dtype),
            dense_prompt_embeddings=masks.to(dtype),
            multimask_output=multimask_output,
        )
        for multimask_output in multimask_outputs
    ]
    return (
        torch.cat([masks for masks, *_ in outputs], dim=2)[:, 0].float(),
        torch.cat([scores for _, scores, *_ in outputs], dim=2)[:, 0].float(),
    )


def per_object(images: torch.Tensor, objects: int) -> torch.Tensor:
    """Repeats what there is of each image, (B, ...), for each of its objects: (B * objects, ...)."""
    return images[:, None].expand(-1, objects, *images.shape[1:]).flatten(0, 1)
