"""The LoRA files of SAMed and Sam_LoRA.

https://github.com/hitachinsk/SAMed/blob/main/sam_lora_image_encoder.py

`w_a_000` (r, C) and `w_b_000` (C, r) are for q of the first adapted block, `w_a_001` and `w_b_001` for its v, and so
on. `sam_lora_image_encoder_mask_decoder.py` adds LoRA of the decoder's q_proj and v_proj: `sa_`, `cti_`, `cit_` and
`fati_`. Weights of the prompt encoder and of the mask decoder lie beside them, in Meta's layout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import SamModel

from . import meta_layout
from .fused_adapters import Factors
from .meta_adapters import MetaAdapter, pairs, require_sam
from .option_checks import MOST_IMAGE_SIDE


DECODER_ATTENTION = {
    "sa": "self_attn",
    "cti": "cross_attn_token_to_image",
    "cit": "cross_attn_image_to_token",
}
FINAL_ATTENTION = "mask_decoder.transformer.final_attn_token_to_image"


def read(weights: dict[str, torch.Tensor], num_layers: int, layers: Sequence[int] | None = None) -> MetaAdapter:
    """Returns what a file of SAMed adds to a SAM of `num_layers` blocks.

    Args:
        weights: The content of the file.
        num_layers: Blocks of the image encoder.
        layers: The adapted ones, which no file records; all if not given.

    Raises:
        ValueError: If the file is of another kind, or adapts another number of blocks.
    """
    weights = dict(weights)
    factors: dict[str, Factors] = {}
    encoder = pairs(weights, r"w_(?P<factor>[ab])_(?P<index>\d+)")
    if not encoder:
        raise ValueError("The file has no w_a_000: expected what save_lora_parameters() of SAMed writes.")
    layers = range(num_layers) if layers is None else layers
    if len({*layers}) < len(layers) or not {*layers} <= {*range(num_layers)}:
        raise ValueError(
            f"--layers {' '.join(map(str, layers))}: expected different numbers of 0 to {num_layers - 1}."
        )
    if sorted(int(index) for (index,) in encoder) != list(range(2 * len(layers))):
        raise ValueError(
            f"The file adapts {len(encoder) // 2} blocks, and not {len(layers)}: give the numbers of the adapted "
            "blocks with --layers, which no file records."
        )
    for (index,), part in encoder.items():
        factors[f"vision_encoder.layers.{layers[int(index) // 2]}.attn.{'qv'[int(index) % 2]}"] = part
    for (kind, index), part in pairs(weights, r"(?P<kind>sa|cti|cit)_(?P<factor>[ab])_(?P<index>\d+)").items():
        module = f"mask_decoder.transformer.layers.{int(index) // 2}.{DECODER_ATTENTION[kind]}"
        factors[f"{module}.{'qv'[int(index) % 2]}_proj"] = part
    for (projection,), part in pairs(weights, r"fati_(?P<projection>[qv])(?P<factor>[ab])").items():
        factors[f"{FINAL_ATTENTION}.{projection}_proj"] = part
    require_sam(weights)
    return MetaAdapter(factors, weights, advice="Give --base-output to write a base with the decoder of the file.")


def base_of(stock: SamModel, weights: dict[str, torch.Tensor], image_size: int | None = None) -> SamModel:
    """Returns the model that SAMed builds from Meta's, with the decoder and the prompt encoder of the file.

    Args:
        stock: The model that training began with.
        weights: Those of the file, in Meta's layout. The decoder has one mask token for each class, and one more.
        image_size: Side of the training images in pixels, for which SAMed resizes the position tables.

    Raises:
        ValueError: If they do not fit.
    """
    base = meta_layout.meta_from_sam(stock)
    if image_size is not None:
        resize(base, image_size, stock)
    if any(name.startswith("mask_decoder.transformer.") for name in weights):
        base = {name: tensor for name, tensor in base.items() if not name.startswith("mask_decoder.")}
    return meta_layout.sam_from_meta({**base, **weights}, stock.config.mask_decoder_config.num_attention_heads)


def resize(weights: dict[str, torch.Tensor], image_size: int, stock: SamModel) -> None:
    """Interpolates the position tables in `weights`, in place, as SAMed's `load_from` does.

    https://github.com/hitachinsk/SAMed/blob/main/segment_anything/build_sam.py

    Raises:
        ValueError: If `image_size` is no multiple of the patches.
    """
    vision = stock.config.vision_config
    if image_size % vision.patch_size or not 0 < image_size <= MOST_IMAGE_SIDE:
        raise ValueError(
            f"--image-size {image_size}: expected a multiple of the {vision.patch_size} pixels of a patch, up to "
            f"{MOST_IMAGE_SIDE:,}."
        )
    grid_size = image_size // vision.patch_size
    pos_embed = weights["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    pos_embed = F.interpolate(pos_embed, (grid_size, grid_size), mode="bilinear", align_corners=False)
    weights["image_encoder.pos_embed"] = pos_embed.permute(0, 2, 3, 1)
    for layer in vision.global_attn_indexes:
        for axis in "hw":
            name = f"image_encoder.blocks.{layer}.attn.rel_pos_{axis}"
            size = (2 * grid_size - 1, weights[name].shape[1])
            weights[name] = F.interpolate(weights[name][None, None], size, mode="bilinear", align_corners=False)[0, 0]
