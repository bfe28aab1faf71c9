"""Conversion between SAM's fused `qkv` and separate `q`, `k`, `v`, and of position tables to another image size.

`from_pretrained`, also that of a model which contains ours, splits by the mapping that is registered below;
`load_state_dict` and `save_pretrained` split by `split_state_dict`.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig


PROJECTIONS = ("q", "k", "v")


def split_q_k_v(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Splits `qkv.weight` (3C, C) or `qkv.bias` (3C,) into copies for `q`, `k` and `v`, and leaves all else as it is.

    Args:
        key: Name of the tensor within the attention layer, or within a model, where the layer is called `attn`.
        tensor: The tensor.

    Raises:
        ValueError: If the first dimension is not a multiple of three.
    """
    fused = re.fullmatch(r"(|.*\.attn\.)qkv\.(weight|bias)", key)
    if not fused:
        return {key: tensor}
    layer, kind = fused.groups()
    if tensor.ndim == 0 or tensor.shape[0] % 3:
        raise ValueError(f"A fused qkv has 3 * hidden_size rows, but {key} has shape {tuple(tensor.shape)}.")
    # Copies, because many tools, accelerate's save_model among them, take views of one storage for one tensor.
    return {f"{layer}{name}.{kind}": part.clone() for name, part in zip(PROJECTIONS, tensor.chunk(3), strict=True)}


def split_state_dict(*state_dicts: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Merges state dicts, and splits all that is fused.

    Returns:
        The tensors by name, and the names that came twice: from two state dicts, or fused and separate.
    """
    entries: dict[str, torch.Tensor] = {}
    twice: set[str] = set()
    for key, tensor in itertools.chain.from_iterable(state_dict.items() for state_dict in state_dicts):
        parts = split_q_k_v(key, tensor)
        twice |= parts.keys() & entries.keys()
        entries |= parts
    return entries, twice


def split_layer(
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
    try:
        entries, twice = split_state_dict(state_dict)
    except ValueError as error:
        return dict(state_dict), [str(error)]
    problems = []
    if twice:
        problems.append(f"It holds {', '.join(sorted(twice))} twice, fused and separate: remove one of them.")
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


def fuse_split(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `split_state_dict`, for a whole model.

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
    model: PreTrainedModel, loading_info: Any, ignore_mismatched_sizes: bool, twice: Collection[str]
) -> None:
    """Checks that each weight of the model has the checkpoint's value, but those that its class ignores on load.

    Args:
        model: The model after loading, before missing weights are initialised and tied ones tied.
        loading_info: The report of transformers' loader.
        ignore_mismatched_sizes: Whether the caller asked for new weights where shapes differ. It does not apply to
            vision attention.
        twice: The names that the checkpoint has two tensors for.

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
    problems = {
        "missing: ": missing,
        "not in the model: ": {key for key in unexpected if ".attn." in key},
        "of another shape: ": {
            f"{key} {tuple(theirs)}, in the model {tuple(ours)}" for key, theirs, ours in mismatched
        },
        "not to be split in three: ": loading_info.conversion_errors.keys(),
        "there twice, in two files, or both fused and separate: ": twice,
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


def interpolate_positions(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the tables of absolute (1, H, W, C) and relative positions (L, d), in the shapes that are expected.

    Bicubic, as `interpolate_pos_encoding` of transformers' ViT, and linear, as `SamVisionAttention.get_rel_pos`.
    """
    tables = {}
    for key in state_dict.keys() & expected.keys():
        table, shape = state_dict[key], expected[key].shape
        if table.shape == shape:
            continue
        if key.endswith("pos_embed"):
            table = F.interpolate(table.permute(0, 3, 1, 2).float(), shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
        elif key.endswith(("rel_pos_h", "rel_pos_w")):
            table = F.interpolate(table.T[None].float(), shape[:1], mode="linear")[0].T
        tables[key] = table.to(state_dict[key].dtype).contiguous()
    return tables


class SplitQKV(Chunk):
    """`Chunk` into copies, see `split_q_k_v`."""

    def convert(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """Returns one tensor per target pattern."""
        return {name: part.clone() for name, part in super().convert(*args, **kwargs).items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: `.attn.q.` would become a pattern, which fits names of the mask decoder, too."""
        raise NotImplementedError(
            "Split checkpoints are saved split: save what contains such a model with save_original_format=False, or "
            "use to_sam() for a stock, fused checkpoint."
        )


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
        # ".attn." is the vision encoder's alone; the mask decoder has "self_attn." and "cross_attn_..."
        [SplitQKVConverter(r"\.attn\.qkv\.", [f".attn.{name}." for name in PROJECTIONS], operations=[SplitQKV()])],
        overwrite=True,
    )
