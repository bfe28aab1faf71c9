"""One rule for splitting SAM's fused `qkv`, and its use by `from_pretrained`."""

import re
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig


PROJECTIONS = ("q", "k", "v")


def split_q_k_v(fused: torch.Tensor) -> dict[str, torch.Tensor]:
    """Splits a fused weight (3C, C) or bias (3C,) into those of `q`, `k` and `v`, each (C, C) or (C,), by copy.

    Raises:
        ValueError: If the first dimension is not a multiple of three.
    """
    if fused.shape[0] % 3:
        raise ValueError(f"A fused qkv tensor has 3 * hidden_size rows, but this one has shape {tuple(fused.shape)}.")
    # Copies, because views of one storage cannot be saved or freed apart.
    return {name: part.clone() for name, part in zip(PROJECTIONS, fused.chunk(3), strict=True)}


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
        """There is none: what is saved is always split."""
        raise NotImplementedError(
            "Split checkpoints are saved split: save what contains such a model with save_original_format=False, or "
            "use to_sam() for a stock, fused checkpoint."
        )


class SplitQKVConverter(WeightConverter):
    """The conversion of fused checkpoints, strict about mixed ones, and quantizing each of its results."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forms: dict[str, str] = {}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As in `WeightConverter`.

        Raises:
            ValueError: If the checkpoint holds an attention layer both fused and split, of which one would be lost.
        """
        if match := re.search(r"(.*\.attn)\.(qkv|[qkv])\.", source_key):
            layer, form = match[1], "fused" if match[2] == "qkv" else "split"
            if self.forms.setdefault(layer, form) != form:
                raise ValueError(
                    f"The checkpoint holds both a fused qkv and separate q, k, v for {layer}: remove one."
                )
        return super().rename_source_key(source_key)

    def convert(self, layer_name: str, **kwargs):
        """As in `WeightConverter`, but transformers 5.0 would quantize the first result only."""
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
            )
        ],
        overwrite=True,
    )
