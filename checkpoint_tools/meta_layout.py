"""The layout of Meta's original `segment_anything` checkpoints (https://github.com/facebookresearch/segment-anything)."""

import re
from collections.abc import Callable, Collection

import torch
from transformers import SamConfig, SamModel

from .messages import listing


# One tensor in Meta's layout (prompt_encoder.pe_layer…); two tied copies in transformers.
TIED = {"prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"}

# Meta's decoder, the same for all encoders.
DECODER_SIZE, DECODER_HEADS, DECODER_LAYER_NORM_EPS = 256, 8, 1e-5

# Settings that are constants in Meta's code.
FIXED_SETTINGS: dict[str, dict[str, object]] = {
    "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_abs_pos": True, "use_rel_pos": True},
    "prompt_encoder_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "mask_decoder_config": {"hidden_act": "relu"},
}

# What the names of weights tell, for messages.
KNOWN = {
    r"w_[ab]_\d+$": "SAMed's LoRA: use from-samed",
    r"\.attn\.qkv\.(qkv_proj|w_[ab]_linear_)": "micro-sam's LoRA: use from-micro-sam",
    r"\.FacT[uv]|_FacTs": "FacT: use from-micro-sam",
    r"\.mlp\.(mlp_proj|down_proj|up_proj|alpha)": "AdaptFormer, a network beside each MLP",
    r"\.(scale|shift)$": "SSF, which scales and shifts the output of each layer",
    r"\.(absmax|quant_map|nested_absmax|quant_state)": "4-bit weights of QLoRA: export them as LoRA in its own tool",
    r"\.attn\.mlp\.": "an MLP LoRA that the version of micro-sam which wrote it does not use",
    r"[aA]dapter": "adapter layers between SAM's own",
    r"^vision_encoder\.layers\.": "the layout of transformers: give its folder to to-split",
    r"^base_model\.model\.": "an adapter of PEFT: see adapter-to-split",
    r"image_encoder\.trunk\.": "SAM 2, which is another architecture",
    r"image_encoder\.layers\.\d+\.blocks\.": "the TinyViT of MobileSAM, which is another architecture",
    r"\.hf_token|hf_mlp": "HQ-SAM, whose decoder has more layers",
    r"^fc_\d+in_": "a layer of Sam_LoRA, whose LoRA also has biases that no file holds",
}

# Renaming rules from transformers to Meta, applied in this order.
RENAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^image_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^image_encoder\.layers\.(\d+)\.", r"image_encoder.blocks.\1."),
    (r"^image_encoder\.blocks\.(\d+)\.layer_norm", r"image_encoder.blocks.\1.norm"),
    (r"^image_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^image_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^image_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^image_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.layer_norm", r"mask_decoder.transformer.layers.\1.norm"),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    # The MLPs: Meta counts the first and the last layer with the others.
    (r"(_head|mlps\.\d+)\.layers\.(\d+)\.", lambda match: f"{match[1]}.layers.{int(match[2]) + 1}."),
    (r"(_head|mlps\.\d+)\.proj_in\.", r"\1.layers.0."),
    (r"(mlps\.\d+)\.proj_out\.", r"\1.layers.2."),
]


def hint(names: Collection[str]) -> str:
    """Returns what the names of unknown weights tell, as the end of a sentence."""
    known = [text for pattern, text in KNOWN.items() if any(re.search(pattern, name) for name in names)]
    return f" ({'; '.join(known)})" if known else ""


def names(config: SamConfig) -> dict[str, str]:
    """Returns a one-to-one mapping from transformers' weight names to Meta's."""
    last = rf"\1.layers.{config.mask_decoder_config.iou_head_depth - 1}."
    with torch.device("meta"):
        model = SamModel(config)
    meta_names = {}
    for name in model.state_dict().keys() - TIED:
        meta_names[name] = name
        for pattern, replacement in [*RENAMES, (r"(_head)\.proj_out\.", last)]:
            meta_names[name] = re.sub(pattern, replacement, meta_names[name])
    return meta_names


def meta_from_sam(model: SamModel) -> dict[str, torch.Tensor]:
    """Returns the weights of `model` in Meta's layout."""
    weights = model.state_dict()
    return {meta: weights[name].detach().clone().contiguous() for name, meta in names(model.config).items()}


def sam_from_meta(weights: dict[str, torch.Tensor], decoder_heads: int | None = None) -> SamModel:
    """Returns a `SamModel` that holds `weights`, which are in Meta's layout.

    Raises:
        ValueError: If weights are missing or unknown, or their shapes are inconsistent.
    """
    config = config_of(weights, decoder_heads)
    by_name = names(config)
    with torch.device("meta"):
        model = SamModel(config)
    problems = {
        "missing": by_name.values() - weights.keys(),
        "unknown": weights.keys() - by_name.values(),
        "with a shape that does not fit the other weights": {
            meta
            for name, meta in by_name.items()
            if meta in weights and weights[meta].shape != model.get_parameter(name).shape
        },
    }
    if any(problems.values()):
        raise ValueError(
            "This is not a checkpoint of Meta's SAM. Weights "
            + "; ".join(f"{problem}: {listing(keys)}" for problem, keys in problems.items() if keys)
            + hint(problems["unknown"])
        )
    state_dict = {name: weights[meta] for name, meta in by_name.items()}
    state_dict |= {copy: state_dict[name] for copy, name in TIED.items()}
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model.eval()


def check_expressible(config: SamConfig) -> None:
    """Passes settings that Meta's code has, or that the shapes of weights tell.

    Raises:
        ValueError: If the model would be another one in Meta's code.
    """
    for part, settings in FIXED_SETTINGS.items():
        for name, value in settings.items():
            if (actual := getattr(getattr(config, part), name)) != value:
                raise ValueError(
                    f"Meta's layout cannot express {name}={actual!r} of {part}: Meta's code has {value!r}, and the "
                    "file holds weights alone."
                )


def config_of(weights: dict[str, torch.Tensor], decoder_heads: int | None = None) -> SamConfig:
    """Returns the configuration that `weights`, in Meta's layout, were made with.

    Args:
        weights: Weights of any size. Depth, width, windows and image size are inferred from shapes.
        decoder_heads: The decoder's attention heads, which no shape tells; those of Meta's decoder if not given.

    Raises:
        ValueError: If weights needed for the sizes are missing or inconsistent, or `decoder_heads` is needed.
    """
    patch_size = shape(weights, "image_encoder.patch_embed.proj.weight")[2]
    image = {"image_size": shape(weights, "image_encoder.pos_embed")[1] * patch_size, "patch_size": patch_size}
    return SamConfig(
        vision_config=image | vision_settings(weights),
        prompt_encoder_config=image | prompt_encoder_settings(weights),
        mask_decoder_config=mask_decoder_settings(weights, decoder_heads),
    )


def vision_settings(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Returns the settings of the vision encoder, without those of the image.

    Raises:
        ValueError: If weights are missing or inconsistent.
    """
    hidden_size, num_channels, _, _ = shape(weights, "image_encoder.patch_embed.proj.weight")
    num_layers = count(weights, r"image_encoder\.blocks\.(\d+)\.")
    if not num_layers:
        raise ValueError("This is not a checkpoint of Meta's SAM: image_encoder.blocks are missing.")
    rel_pos = [shape(weights, f"image_encoder.blocks.{layer}.attn.rel_pos_h") for layer in range(num_layers)]
    grid_size = shape(weights, "image_encoder.pos_embed")[1]
    return {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // rel_pos[0][1],
        "mlp_dim": shape(weights, "image_encoder.blocks.0.mlp.lin1.weight")[0],
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in weights,
        **window_settings([(length + 1) // 2 for length, _ in rel_pos], grid_size),
        "output_channels": shape(weights, "image_encoder.neck.0.weight")[0],
        "num_pos_feats": shape(weights, "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")[1],
    }


def window_settings(spans: list[int], grid_size: int) -> dict[str, object]:
    """Returns which layers attend to the whole image, and the window size of the others.

    Args:
        spans: For each layer, the tokens along a side that its relative positions are for.
        grid_size: Tokens along a side of the image.

    Raises:
        ValueError: If there are several window sizes, or one is larger than the image.
    """
    windows = {span for span in spans if span != grid_size}
    if len(windows) > 1 or any(window > grid_size for window in windows):
        raise ValueError(
            f"rel_pos tables are for {sorted(set(spans))} tokens, but the image has {grid_size} x {grid_size}: "
            "expected tables of that size and of one smaller window size. Interpolate rel_pos_h and rel_pos_w first."
        )
    return {
        "global_attn_indexes": [layer for layer, span in enumerate(spans) if span == grid_size],
        "window_size": windows.pop() if windows else grid_size,
    }


def prompt_encoder_settings(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Returns the settings of the prompt encoder, without those of the image.

    Raises:
        ValueError: If weights are missing.
    """
    return {
        "hidden_size": shape(weights, "mask_decoder.iou_token.weight")[1],
        "mask_input_channels": shape(weights, "prompt_encoder.mask_downscaling.3.weight")[0],
        "num_point_embeddings": count(weights, r"prompt_encoder\.point_embeddings\.(\d+)\."),
    }


def mask_decoder_settings(weights: dict[str, torch.Tensor], heads: int | None) -> dict[str, object]:
    """Returns the settings of the mask decoder.

    Raises:
        ValueError: If weights are missing, or the number of attention heads must be given.
    """
    size = shape(weights, "mask_decoder.iou_token.weight")[1]
    attention_size = shape(weights, "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight")[0]
    return {
        "hidden_size": size,
        "num_attention_heads": decoder_heads_of(size, heads),
        "num_hidden_layers": count(weights, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "mlp_dim": shape(weights, "mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
        "attention_downsample_rate": size // attention_size,
        "num_multimask_outputs": shape(weights, "mask_decoder.mask_tokens.weight")[0] - 1,
        "iou_head_depth": count(weights, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        "iou_head_hidden_dim": shape(weights, "mask_decoder.iou_prediction_head.layers.0.weight")[0],
        "layer_norm_eps": DECODER_LAYER_NORM_EPS,
    }


def shape(weights: dict[str, torch.Tensor], name: str) -> torch.Size:
    """Returns the shape of a weight.

    Raises:
        ValueError: If it is missing.
    """
    if name not in weights:
        got = f"got {listing(weights)}{hint(weights)}"
        raise ValueError(f"This is not a checkpoint of Meta's SAM: expected {name}, {got}.")
    return weights[name].shape


def count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    """Returns how many numbers, the group of `pattern`, are in the names of weights."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def decoder_heads_of(size: int, heads: int | None) -> int:
    """Returns the attention heads of a decoder of this width: `heads`, or those of Meta's if None.

    Raises:
        ValueError: If they must be given, or do not divide the width.
    """
    if heads is None:
        if size != DECODER_SIZE:
            raise ValueError(
                f"The decoder is {size} wide (Meta's: {DECODER_SIZE}). Its number of attention heads is not "
                "recorded in the file: pass --decoder-heads."
            )
        return DECODER_HEADS
    if heads < 1 or size % heads:
        raise ValueError(f"--decoder-heads {heads}: expected a divisor of the decoder's width {size}.")
    return heads
