"""Conversion between SAM's fused `qkv` and separate `q`, `k`, `v`, and the steps that `from_pretrained` runs."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig


PROJECTIONS = ("q", "k", "v")


def split_q_k_v(fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """Splits a fused weight (3C, C) or bias (3C,) into those of `q`, `k` and `v`, each (C, C) or (C,), by copy.

    Raises:
        ValueError: If the first dimension is not a multiple of three.
    """
    if fused.ndim == 0 or fused.shape[0] % 3:
        raise ValueError(f"A fused qkv has 3 * hidden_size rows, but this one has shape {tuple(fused.shape)}.")
    # Copies, because views of one storage cannot be saved or freed apart.
    return {name: part.clone() for name, part in zip(PROJECTIONS, fused.chunk(3), strict=True)}


def split_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Splits the fused weights in the state dict of one attention layer.

    | `state_dict` holds of q, k, v | new entries | problem |
    |---|---|---|
    | nothing | none | none: other weights are the caller's matter |
    | `qkv.weight`, and `qkv.bias` if there are biases | q, k and v of each | none |
    | all of `q`, `k`, `v` | as they are | none |
    | the biases of all three alone, as PEFT saves them with `bias="all"` | as they are | none |
    | a fused tensor and one of its parts | | one of them would be lost |
    | some of them, fused or split | | the others would keep their old values |
    | a tensor that is not expected, such as `q.weight` of an adapted `q`, or a fused adapter | | it would be lost |
    | a fused tensor whose rows are not a multiple of three | | it cannot be split |

    Args:
        state_dict: Tensors by name within the layer, such as `qkv.weight`.
        expected: The keys of the layer's own state dict.

    Returns:
        The state dict without fused tensors, and the problems, one sentence each.
    """
    entries, problems = dict(state_dict), []
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" not in state_dict:
            continue
        if both := sorted({f"{name}.{kind}" for name in PROJECTIONS} & state_dict.keys()):
            problems.append(f"It holds qkv.{kind} and also {', '.join(both)}: remove one of them.")
        try:
            parts = split_q_k_v(entries.pop(f"qkv.{kind}"))
        except ValueError as error:
            problems.append(f"qkv.{kind} cannot be split. {error}")
            continue
        entries |= {f"{name}.{kind}": part for name, part in parts.items()}

    names = {f"{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias")}
    own, present = names & set(expected), names & entries.keys()
    if unexpected := sorted(present - own) + [key for key in entries if key.startswith("qkv.")]:
        problems.append(
            f"The layer has no {', '.join(unexpected)}. If adapters wrap q, k or v, load the weights before you add "
            "them. An adapter of the fused qkv must be converted first. qkv_bias in the configuration must be the "
            "checkpoint's."
        )
    only_biases = present == {key for key in own if key.endswith(".bias")} and "qkv.bias" not in state_dict
    if present and not only_biases and (missing := sorted(own - present)):
        problems.append(f"It holds only some of q, k and v. It lacks {', '.join(missing)}.")
    return entries, problems


def split_fused(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits every `….attn.qkv.…` of a whole model into `….attn.q.…`, `….attn.k.…` and `….attn.v.…`."""
    split: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        layer, fused, kind = key.rpartition(".attn.qkv.")
        parts = split_q_k_v(tensor) if fused else {}
        split |= {f"{layer}.attn.{name}.{kind}": part for name, part in parts.items()} or {key: tensor}
    return split


def fuse_split(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `split_fused`.

    Raises:
        KeyError: If a layer lacks some of the three.
    """
    fused = {}
    for key, tensor in state_dict.items():
        layer, attn, rest = key.rpartition(".attn.")
        name, _, kind = rest.partition(".")
        if not attn or name not in PROJECTIONS:
            fused[key] = tensor
        elif name == "q":
            parts = [state_dict[f"{layer}.attn.{part}.{kind}"] for part in PROJECTIONS]
            fused[f"{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return fused


def not_ignored(keys: Iterable[str], patterns: Iterable[str] | None) -> set[str]:
    """Returns the keys in which none of the patterns is found that a class may declare for keys to ignore."""
    return {key for key in keys if not any(re.search(pattern, key) for pattern in patterns or ())}


def check_loaded(
    model: PreTrainedModel,
    loading_info: Any,
    ignore_mismatched_sizes: bool,
    state_dicts: Iterable[Mapping[str, torch.Tensor]],
) -> None:
    """Checks that each weight of the model has the checkpoint's value, but those that its class ignores on load.

    Args:
        model: The model after loading, before missing weights are initialised and tied ones tied.
        loading_info: The report of transformers' loader.
        ignore_mismatched_sizes: Whether the caller asked for new weights where shapes differ. It does not apply to
            vision attention.
        state_dicts: The tensors of each file of the checkpoint.

    Raises:
        ValueError: If weights are missing, have another shape, appear twice, or are unexpected in vision attention.
    """
    missing = not_ignored(loading_info.missing_keys, model._keys_to_ignore_on_load_missing)
    unexpected = not_ignored(loading_info.unexpected_keys, model._keys_to_ignore_on_load_unexpected)
    mismatched = set(loading_info.mismatched_keys)
    for pair in model.all_tied_weights_keys.items():
        if not missing.issuperset(pair):  # one of the two is enough
            missing -= set(pair)
    if ignore_mismatched_sizes:
        mismatched = {entry for entry in mismatched if ".attn." in entry[0]}
    keys = sorted(itertools.chain.from_iterable(state_dicts))
    layers: dict[str, set[str]] = {"qkv": set(), "q": set(), "k": set(), "v": set()}
    for match in filter(None, map(re.compile(r"(.*\.attn)\.(qkv|[qkv])\.").match, keys)):
        layers[match[2]].add(match[1])
    problems = {
        "missing: ": missing,
        "not in the model: ": {key for key in unexpected if ".attn." in key},
        "of another shape: ": {
            f"{key} {tuple(theirs)}, in the model {tuple(ours)}" for key, theirs, ours in mismatched
        },
        "not to be split in three: ": loading_info.conversion_errors.keys(),
        "in two files: ": {key for key, following in itertools.pairwise(keys) if key == following},
        "both a fused qkv and separate q, k, v for ": layers["qkv"] & (layers["q"] | layers["k"] | layers["v"]),
    }
    if not any(problems.values()):
        return
    text = "; ".join(f"{problem}{', '.join(sorted(keys))}" for problem, keys in problems.items() if keys)
    advice = "Check that it is a complete SAM v1 checkpoint, and that the settings in config.json are its own."
    config = getattr(model.config, "vision_config", model.config)
    grid_size = config.image_size // config.patch_size
    for key, theirs, ours in loading_info.mismatched_keys:
        if key.endswith("pos_embed") or (key.endswith("rel_pos_h") and ours[0] == 2 * grid_size - 1):
            side = config.patch_size * (theirs[1] if len(theirs) == 4 else (theirs[0] + 1) // 2)
            advice = (
                f"The checkpoint is for images of {side} pixels, and the configuration for {config.image_size}: give "
                f"image_size={config.image_size} to from_pretrained, which then interpolates the position tables, or "
                f"set image_size={side} in vision_config and prompt_encoder_config."
            )
    raise ValueError(f"This checkpoint does not fit {type(model).__name__}. Weights {text}. {advice}")


class SplitQKV(ConversionOps):
    """`split_q_k_v` as a step of `from_pretrained`."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        """Returns one tensor per target pattern."""
        ((fused,),) = input_dict.values()
        return dict(zip(target_patterns, split_q_k_v(fused).values(), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none, because checkpoints are always saved split."""
        raise NotImplementedError(
            "Split checkpoints are saved split: save what contains such a model with save_original_format=False, or "
            "use to_sam() for a stock, fused checkpoint."
        )


def interpolate_positions(table: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Returns a table of absolute (1, H, W, C) or relative positions (L, d) in another shape of this kind.

    Bicubic, as `interpolate_pos_encoding` of transformers' ViT, and linear, as `SamVisionAttention.get_rel_pos`.
    """
    if table.shape == shape:
        return table
    channels_first, mode = (table.permute(0, 3, 1, 2), "bicubic") if table.ndim == 4 else (table.T[None], "linear")
    size = shape[1:3] if table.ndim == 4 else shape[:1]
    resized = F.interpolate(channels_first.float(), size, mode=mode, align_corners=False).to(table.dtype)
    return resized.permute(0, 2, 3, 1).contiguous() if table.ndim == 4 else resized[0].T.contiguous()


class InterpolatePositions(ConversionOps):
    """`interpolate_positions` as a step of `from_pretrained`, where it was given an image size."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Returns the table, in the shape that the model has for it."""
        ((table,),) = input_dict.values()
        config = getattr(model.config, "vision_config", model.config)
        if getattr(config, "_interpolate_pos_encoding", False):
            table = interpolate_positions(table, model.get_parameter(full_layer_name).shape)
        return {target_patterns[0]: table}

    @property
    def reverse_op(self) -> ConversionOps:
        """None is needed: tables are saved as they are."""
        return self


# transformers < 5.12: bitsandbytes would quantize the first result only.
class SplitQKVConverter(WeightConverter):
    """The conversion of fused checkpoints, with each of its results quantized under its own name."""

    def convert(self, layer_name: str, **kwargs):
        """As in `WeightConverter`."""
        if self.quantization_operation is not None:
            self.quantization_operation = QuantizeEach(self.quantization_operation)
        return super().convert(layer_name, **kwargs)


class QuantizeEach(ConversionOps):
    """Applies a quantization to each of several tensors under its own name."""

    def __init__(self, quantize: ConversionOps):
        self.quantize = quantize

    def convert(self, input_dict: dict[str, torch.Tensor], full_layer_name: str = "", **kwargs) -> dict[str, Any]:
        """Returns the quantized parameters by full name."""
        quantized: dict[str, Any] = {}
        for name, tensor in input_dict.items():
            quantized |= self.quantize.convert({name: [tensor]}, full_layer_name=name, **kwargs)
        return quantized


# By model type: transformers < 5.12 looks up nothing else. With overwrite, because dynamic modules run more than once.
for _model_type in (SamSplitConfig.model_type, SamSplitVisionConfig.model_type):
    register_checkpoint_conversion_mapping(
        _model_type,
        [
            SplitQKVConverter(
                # ".attn." is the vision encoder's alone; the mask decoder has "self_attn." and "cross_attn_..."
                source_patterns=r"\.attn\.qkv\.",
                target_patterns=[f".attn.{name}." for name in PROJECTIONS],
                operations=[SplitQKV()],
            ),
            *(
                WeightConverter(rf"\.{name}$", f".{name}", operations=[InterpolatePositions()])
                for name in ("pos_embed", "rel_pos_h", "rel_pos_w")
            ),
        ],
        overwrite=True,
    )
