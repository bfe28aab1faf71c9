"""Segment Anything with separate query, key and value projections in its vision encoder.

Stock `SamModel` computes the three with one fused `qkv` Linear, which PEFT can only adapt as a whole. Here they are
three Linears, `q`, `k` and `v`, so that LoRA can target two of them; everything else is SAM's own code. A checkpoint's
fused weights are split on the way in, by `from_pretrained` and by `load_state_dict` alike, and `to_sam()` fuses them
again.

Shapes: B images (or windows), H x W tokens, N = H * W, C channels, h heads of d channels.
"""

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, SamModel, SamVisionConfig, SamVisionModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamMLPBlock,
    SamPatchEmbeddings,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionAttention,
    SamVisionEncoder,
    SamVisionLayer,
    SamVisionNeck,
)

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
        raise NotImplementedError("Split checkpoints are saved split. Use to_sam() for a stock, fused checkpoint.")


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


class SamVisionAttentionSplit(SamVisionAttention):
    """Multi-head attention with decomposed relative positions and separate `q`, `k` and `v` projections.

    Args:
        config: The vision encoder's configuration.
        window_size: Side of the window in tokens, 0 for global attention over the whole image.
    """

    def __init__(self, config: SamVisionConfig, window_size: int):
        nn.Module.__init__(self)  # SamVisionAttention's own would allocate the fused qkv
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        head_dim = config.hidden_size // config.num_attention_heads
        self.scale = head_dim**-0.5
        self.dropout = config.attention_dropout

        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

        self.use_rel_pos = config.use_rel_pos
        if self.use_rel_pos:
            grid_size = window_size or config.image_size // config.patch_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid_size - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid_size - 1, head_dim))

        self.register_load_state_dict_pre_hook(self.split_q_k_v_load_hook)

    @staticmethod
    def split_q_k_v_load_hook(
        module: "SamVisionAttentionSplit",
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Splits the fused `qkv` that a plain `load_state_dict` brings under `prefix`; split keys pass through.

        What would leave the projections half loaded goes to `error_msgs`, on which `load_state_dict` raises even with
        `strict=False`.
        """
        own_keys = {f"{prefix}{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias")} & {
            prefix + key for key in module.state_dict()
        }
        for kind in ("weight", "bias"):
            fused_key = f"{prefix}qkv.{kind}"
            if fused_key not in state_dict:
                continue
            try:
                split = split_q_k_v(state_dict.pop(fused_key))
            except ValueError as error:
                error_msgs.append(f"{fused_key}: {error}")
                return
            parts = {f"{prefix}{name}.{kind}": part for name, part in split.items()}
            if both := sorted(parts.keys() & state_dict.keys()):
                error_msgs.append(f"The state dict holds {fused_key} and also {', '.join(both)}: remove one of them.")
                return
            if not parts.keys() <= own_keys:
                error_msgs.append(
                    f"There is no place for {fused_key}: if adapters wrap q, k or v, load the weights before adding "
                    "them; if not, qkv_bias in the configuration is not the checkpoint's."
                )
                return
            state_dict.update(parts)
        missing = sorted(own_keys - state_dict.keys())
        if missing and len(missing) < len(own_keys):
            error_msgs.append(f"The state dict holds a part of {prefix}q, k, v, but lacks {', '.join(missing)}.")

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the attended `hidden_states` (B, H, W, C) and, from `eager` only, the weights (B * h, N, N)."""
        batch_size, height, width, _ = hidden_states.shape
        # (B, N, C) -> (B, h, N, d)
        query, key, value = (
            projection(hidden_states).reshape(batch_size, height * width, self.num_attention_heads, -1).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        attention = ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attn_output, attn_weights = attention(
            self, query, key, value, self.relative_position_bias(query, height, width)
        )
        attn_output = attn_output.transpose(1, 2).reshape(
            batch_size, height, width, -1
        )  # (B, h, N, d) -> (B, H, W, C)
        return self.proj(attn_output), attn_weights

    def relative_position_bias(self, query: torch.Tensor, height: int, width: int) -> torch.Tensor | None:
        """The bias (B, h, N, N) that decomposed relative positions add to the scores of `query` (B, h, N, d)."""
        if not self.use_rel_pos:
            return None
        num_tokens = height * width
        bias = self.get_decomposed_rel_pos(
            query.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, (height, width), (height, width)
        )
        return bias.reshape(*query.shape[:2], num_tokens, num_tokens)


def eager_attention(
    module: SamVisionAttentionSplit,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, h, N, d) with every step spelt out, and its weights (B * h, N, N) before dropout."""
    attn_weights = (query * module.scale) @ key.transpose(-2, -1)
    if bias is not None:
        attn_weights = attn_weights + bias
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_probs = F.dropout(attn_weights, p=module.dropout, training=module.training)
    return attn_probs @ value, attn_weights.flatten(0, 1)


def sdpa_attention(
    module: SamVisionAttentionSplit,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Attention (B, h, N, d) by PyTorch's fused kernels, which keep no weights."""
    dropout = module.dropout if module.training else 0.0
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=module.scale
    ), None


ATTENTION_FUNCTIONS: dict[str, Callable] = {"eager": eager_attention, "sdpa": sdpa_attention}


class SamVisionLayerSplit(SamVisionLayer):
    """A `SamVisionLayer` with `SamVisionAttentionSplit`."""

    def __init__(self, config: SamVisionConfig, window_size: int):
        GradientCheckpointingLayer.__init__(self)  # SamVisionLayer's own would allocate the fused qkv
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamVisionAttentionSplit(config, window_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamMLPBlock(config)
        self.window_size = window_size


class SamSplitPreTrainedModel(SamPreTrainedModel):
    """Loading, saving and the way back to stock SAM, shared by all models here."""

    _no_split_modules = ["SamVisionLayerSplit"]
    _auto_class = "AutoModel"  # lets the code files travel with every saved model
    _auto_map: dict[str, str]
    _stock_class: type[PreTrainedModel]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in `PreTrainedModel`, for the implementations that the vision encoder has.

        Raises:
            ValueError: If `requested_attention` is none of them.
        """
        implementation = super().get_correct_attn_implementation(requested_attention, is_init_check)
        if implementation not in ATTENTION_FUNCTIONS:
            raise ValueError(
                f"attn_implementation={implementation!r} is not supported: choose one of "
                f"{', '.join(map(repr, ATTENTION_FUNCTIONS))}."
            )
        return implementation

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in `PreTrainedModel`, from split or stock checkpoints, but never with random attention weights.

        Raises:
            ValueError: If vision attention weights of the checkpoint are missing, superfluous or of a wrong shape.
        """
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = [
            f"{problem}: {', '.join(keys)}"
            for problem, keys in {
                "missing": _attention_keys(loading_info["missing_keys"]),
                "not in the model": _attention_keys(loading_info["unexpected_keys"]),
                "of another shape": _attention_keys(key for key, *_ in loading_info["mismatched_keys"]),
            }.items()
            if keys
        ]
        if problems:
            raise ValueError(
                f"{cls.__name__} would not hold the checkpoint's vision attention weights. Expected were, in every "
                "layer, a fused `attn.qkv` or all of `attn.q`, `attn.k`, `attn.v`, plus `attn.proj` and "
                "`attn.rel_pos_*`, as the configuration says. Check that it is a complete SAM v1 checkpoint and that "
                "num_hidden_layers, qkv_bias, use_rel_pos and the sizes in its config.json are its own. Weights "
                f"{'; '.join(problems)}."
            )
        return (model, loading_info) if output_loading_info else model

    def load_adapter(self, *args, **kwargs):
        """As in `PreTrainedModel`, but never with random adapter weights, as transformers 5.0 leaves them.

        Raises:
            ValueError: If weights of the adapter do not reach the model, which must then be loaded anew.
        """
        loading_info = super().load_adapter(*args, **kwargs)
        if missing := sorted(getattr(loading_info, "missing_keys", ())):  # some releases return None
            raise ValueError(
                "The adapter's weights did not reach the model, which now holds random ones: load the model anew, and "
                "the adapter with peft's PeftModel.from_pretrained(model, adapter), or upgrade transformers. Not "
                f"found: {', '.join(missing)}."
            )
        return loading_info

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in `PreTrainedModel`: always split weights, with the code that loads them."""
        self.config.auto_map = dict(self._auto_map)
        kwargs["save_original_format"] = False
        return super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def to_sam(self) -> PreTrainedModel:
        """Returns the stock model with a copy of these weights, fused, in the same dtypes and on the same devices.

        Raises:
            ValueError: If adapters, quantization or offloading stand between the weights and a plain copy.
        """
        if getattr(self, "is_quantized", False):
            raise ValueError("The weights are quantized: call dequantize() first, then to_sam().")
        state_dict = self.state_dict()
        if any(tensor.is_meta for tensor in state_dict.values()):
            raise ValueError("Some weights are offloaded: load the model without device_map, then call to_sam().")
        with torch.device("meta"):
            model = self._stock_class(self.config.to_sam())
        sources = {
            key: [key.replace(".attn.qkv.", f".attn.{name}.") for name in PROJECTIONS]
            if ".attn.qkv." in key
            else [key]
            for key in model.state_dict()
        }
        foreign = sorted(state_dict.keys() ^ set(chain.from_iterable(sources.values())))
        if foreign:
            raise ValueError(
                "Adapters are still in place: fold them in with merge_and_unload() (or drop them with unload()), then "
                f"call to_sam() on the model it returns. A plain SAM differs in: {', '.join(foreign)}."
            )
        fused = {key: torch.cat([state_dict[source] for source in keys]) for key, keys in sources.items()}
        model.load_state_dict(fused, assign=True)
        model.tie_weights()
        return model.train(self.training)


class SamVisionEncoderSplit(SamSplitPreTrainedModel, SamVisionEncoder):
    """A `SamVisionEncoder` of `SamVisionLayerSplit`s."""

    config: SamSplitVisionConfig
    _stock_class = SamVisionEncoder

    def __init__(self, config: SamSplitVisionConfig):
        PreTrainedModel.__init__(self, config)  # SamVisionEncoder's own would allocate the fused qkv
        self.config = config
        self.image_size = config.image_size
        self.patch_embed = SamPatchEmbeddings(config)

        self.pos_embed = None
        if config.use_abs_pos:
            grid_size = config.image_size // config.patch_size
            self.pos_embed = nn.Parameter(torch.zeros(1, grid_size, grid_size, config.hidden_size))

        self.layers = nn.ModuleList(
            SamVisionLayerSplit(config, window_size=0 if index in config.global_attn_indexes else config.window_size)
            for index in range(config.num_hidden_layers)
        )
        self.neck = SamVisionNeck(config)

        self.gradient_checkpointing = False
        self.post_init()


class SamSplitVisionModel(SamSplitPreTrainedModel, SamVisionModel):
    """SAM's vision encoder alone, as `SamVisionModel`; loads from vision-only and from full SAM checkpoints."""

    config: SamSplitVisionConfig
    _stock_class = SamVisionModel
    _auto_map = {
        "AutoConfig": "configuration_sam_split.SamSplitVisionConfig",
        "AutoModel": "modeling_sam_split.SamSplitVisionModel",
    }
    # the rest of a full SAM checkpoint
    _keys_to_ignore_on_load_unexpected = [r"^shared_image_embedding\.", r"^prompt_encoder\.", r"^mask_decoder\."]

    def __init__(self, config: SamSplitVisionConfig):
        config = SamSplitVisionConfig.from_sam(config)
        PreTrainedModel.__init__(self, config)  # SamVisionModel's own would build the stock encoder
        self.vision_encoder = SamVisionEncoderSplit(config)
        self.post_init()


class SamSplitModel(SamSplitPreTrainedModel, SamModel):
    """Segment Anything, as `SamModel`, with separate `q`, `k` and `v` projections in the vision encoder."""

    config: SamSplitConfig
    _stock_class = SamModel
    _auto_map = {
        "AutoConfig": "configuration_sam_split.SamSplitConfig",
        "AutoModel": "modeling_sam_split.SamSplitModel",
        "AutoModelForMaskGeneration": "modeling_sam_split.SamSplitModel",
    }

    def __init__(self, config: SamSplitConfig):
        config = SamSplitConfig.from_sam(config)
        PreTrainedModel.__init__(self, config)  # SamModel's own would build the stock encoder
        self.shared_image_embedding = SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = SamVisionEncoderSplit(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config)
        # The decoder's modules read the setting from their own config, which no PreTrainedModel fills in.
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)
        self.post_init()


def _attention_keys(keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if ".attn." in key)


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


__all__ = ["SamSplitModel", "SamSplitPreTrainedModel", "SamSplitVisionModel", "SamVisionAttentionSplit"]
