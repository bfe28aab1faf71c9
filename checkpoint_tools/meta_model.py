"""Meta's own model, from the package `segment_anything` where it is installed, as the reference for its layout.

https://github.com/facebookresearch/segment-anything/blob/dca509fe793f601edb92606367a655c15ac00fdf/segment_anything
"""

import functools
import importlib.util
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import SamConfig

from .output_comparison import ExampleInputs


MODULE_NAME = "segment_anything_modeling"


def modeling() -> ModuleType | None:
    """Returns Meta's model classes, or None. The package itself would import torchvision, which they do not use."""
    if MODULE_NAME not in sys.modules:
        package = importlib.util.find_spec("segment_anything")
        if package is None or not package.submodule_search_locations:
            return None
        file = Path(package.submodule_search_locations[0], "modeling", "__init__.py")
        spec = importlib.util.spec_from_file_location(MODULE_NAME, file)
        if spec is None or spec.loader is None or not file.exists():
            return None
        module = importlib.util.module_from_spec(spec)
        sys.modules[MODULE_NAME] = module  # its files import each other by this name
        spec.loader.exec_module(module)
    return sys.modules[MODULE_NAME]


def build(config: SamConfig, weights: Mapping[str, torch.Tensor]) -> Any:
    """Returns Meta's `Sam`, a module, of the sizes in `config`, built as `build_sam` does, with `weights` in fp32.

    Raises:
        ModuleNotFoundError: If `segment_anything` is not installed.
    """
    meta = modeling()
    if meta is None:
        raise ModuleNotFoundError("Meta's model needs the package segment-anything-py.")
    vision, decoder = config.vision_config, config.mask_decoder_config
    grid = vision.image_size // vision.patch_size
    model = meta.Sam(
        meta.ImageEncoderViT(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            in_chans=vision.num_channels,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=Fraction(vision.mlp_dim, vision.hidden_size),  # a float may be rounded down
            out_chans=vision.output_channels,
            qkv_bias=vision.qkv_bias,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=tuple(vision.global_attn_indexes),
        ),
        meta.PromptEncoder(
            decoder.hidden_size,
            (grid, grid),
            (vision.image_size, vision.image_size),
            config.prompt_encoder_config.mask_input_channels,
        ),
        meta.MaskDecoder(
            transformer_dim=decoder.hidden_size,
            transformer=meta.TwoWayTransformer(
                decoder.num_hidden_layers,
                decoder.hidden_size,
                decoder.num_attention_heads,
                decoder.mlp_dim,
                attention_downsample_rate=decoder.attention_downsample_rate,
            ),
            num_multimask_outputs=decoder.num_multimask_outputs,
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        ),
    )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


@torch.no_grad()
def example_outputs(model: Any, config: SamConfig) -> dict[str, torch.Tensor]:
    """Returns what Meta's `model`, of the sizes in `config`, gives for `comparison.ExampleInputs`, in fp32."""
    inputs = ExampleInputs.of(config.vision_config)
    embeddings = model.image_encoder(inputs.image)

    def decoded(multimask_output: bool, **prompts: object) -> tuple[torch.Tensor, torch.Tensor]:
        sparse, dense = model.prompt_encoder(**{"points": None, "boxes": None, "masks": None, **prompts})
        return model.mask_decoder(
            image_embeddings=embeddings,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )

    masks, scores = decoded(True, points=(inputs.point[0], torch.ones(1, 1)))
    box_masks, box_scores = decoded(False, boxes=inputs.box[0], masks=inputs.mask)
    return inputs.named(embeddings, masks[None], scores[None], box_masks[None], box_scores[None])
