"""Segment Anything with separate query, key and value projections in its vision encoder.

Stock `SamModel` computes the three with one fused `qkv` Linear, which PEFT can only adapt as a whole. Here they are
three Linears, `q`, `k` and `v`, so that LoRA can target two of them; everything else is SAM's own code. A checkpoint's
fused weights are split on the way in, by `from_pretrained` and by `load_state_dict` alike, and `to_sam()` fuses them
again.

Shapes: B images, H x W tokens, C channels; h heads of d channels; G = B x windows x h groups of N tokens each.
"""

import re
import tempfile
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, SamModel, SamVisionConfig, SamVisionModel
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

from .attention_sam_split import ATTENTION_FUNCTIONS, merge_windows_and_heads, pad_to_windows, split_windows_and_heads
from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig, check_attention_implementation
from .conversion_sam_split import PROJECTIONS, split_q_k_v


class SamVisionAttentionSplit(SamVisionAttention):
    """Multi-head attention with decomposed relative positions and separate `q`, `k` and `v` projections.

    Args:
        config: The vision encoder's configuration.
        window_size: Side of the window in tokens, 0 for global attention over the whole image.
    """

    gradient_checkpointing = False  # switched with that of the layers

    def __init__(self, config: SamVisionConfig, window_size: int):
        nn.Module.__init__(self)  # SamVisionAttention's own would allocate the fused qkv
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        head_dim = config.hidden_size // config.num_attention_heads
        self.window_size = window_size
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
        places = {f"{prefix}{name}.{kind}" for name in PROJECTIONS for kind in ("weight", "bias")}
        own_keys = places & {prefix + key for key in module.state_dict()}
        is_fused = False
        for kind in ("weight", "bias"):
            fused_key = f"{prefix}qkv.{kind}"
            if fused_key not in state_dict:
                continue
            is_fused = True
            try:
                split = split_q_k_v(state_dict.pop(fused_key))
            except ValueError as error:
                error_msgs.append(f"{fused_key}: {error}")
                return
            parts = {f"{prefix}{name}.{kind}": part for name, part in split.items()}
            if both := sorted(parts.keys() & state_dict.keys()):
                error_msgs.append(f"The state dict holds {fused_key} and also {', '.join(both)}: remove one of them.")
                return
            state_dict.update(parts)
        if displaced := [key for key in state_dict if key in places - own_keys or key.startswith(f"{prefix}qkv.")]:
            error_msgs.append(
                f"There is no place for {', '.join(displaced)}: if adapters wrap q, k or v, load the weights before "
                "adding them; an adapter of the fused qkv does not fit them at all; and qkv_bias in the configuration "
                "must be the checkpoint's."
            )
            return
        missing, found = sorted(own_keys - state_dict.keys()), own_keys & state_dict.keys()
        biases = {key for key in own_keys if key.endswith(".bias")}
        only_biases = found == biases and not is_fused  # as PEFT saves them with bias="all"
        if missing and found and not only_biases:
            error_msgs.append(f"The state dict holds a part of {prefix}q, k, v, but lacks {', '.join(missing)}.")

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the attended `hidden_states` (B, H, W, C) and, from `eager` only, the weights (G, N, N)."""
        batch_size, height, width, _ = hidden_states.shape
        window = (self.window_size, self.window_size) if self.window_size else (height, width)
        qkv = split_windows_and_heads(self.project(hidden_states, window), window, self.num_attention_heads)
        rel_pos = None
        if self.use_rel_pos:
            rel_pos = tuple(
                self.get_rel_pos(size, size, table)
                for size, table in zip(window, (self.rel_pos_h, self.rel_pos_w), strict=True)
            )
        attention = ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attn_output, attn_weights = attention(self, qkv, rel_pos)
        attn_output = merge_windows_and_heads(attn_output, batch_size)[:, :height, :width]
        return self.proj(attn_output.contiguous()), attn_weights  # a slice would make Linear slow

    def project(self, hidden_states: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        """Returns queries, keys and values (3, B, H', W', C) of `hidden_states` (B, H, W, C) and its padding."""

        def apply(linear: nn.Module) -> torch.Tensor:
            # Dropout in an adapter would keep two tensors as large as its input.
            has_dropout = any(isinstance(module, nn.Dropout) for module in linear.modules())
            return recompute(self, linear, hidden_states) if has_dropout else linear(hidden_states)

        linears = (self.q, self.k, self.v)
        qkv = torch.stack([apply(linear) for linear in linears])
        if all(tokens % size == 0 for tokens, size in zip(hidden_states.shape[1:3], window, strict=True)):
            return qkv
        # The padding is of zeros before the projection. It attends and is attended to, so it is projected too.
        zeros = torch.zeros_like(hidden_states[:1, :1, :1])
        return pad_to_windows(qkv, torch.stack([linear(zeros) for linear in linears]), window)

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: torch.Tensor) -> torch.Tensor:
        """As in `SamVisionAttention`, without interpolating a table (2 * size - 1, d) that has the right length."""
        if q_size != k_size or len(rel_pos) != 2 * q_size - 1:
            return super().get_rel_pos(q_size, k_size, rel_pos)
        positions = torch.arange(q_size, device=rel_pos.device)
        return rel_pos[positions[:, None] - positions + q_size - 1]


class SamVisionLayerSplit(SamVisionLayer):
    """A `SamVisionLayer` with `SamVisionAttentionSplit`."""

    def __init__(self, config: SamVisionConfig, window_size: int):
        GradientCheckpointingLayer.__init__(self)  # SamVisionLayer's own would allocate the fused qkv
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamVisionAttentionSplit(config, window_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SamMLPBlock(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns `hidden_states` (B, H, W, C) after attention, which cuts its windows itself, and MLP."""
        attn_output, _ = self.attn(self.layer_norm1(hidden_states))
        hidden_states = hidden_states + attn_output
        return hidden_states + recompute(self, self.feed_forward, hidden_states)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's second half without its residual, whose activations are four times as wide as its input."""
        return self.mlp(self.layer_norm2(hidden_states))


def recompute(
    module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
) -> torch.Tensor:
    """Calls `function`, and in training once more in backward, rather than keep what it computes on the way.

    With gradient checkpointing all of `module` is computed again, so that this would only add a third time.

    Raises:
        RuntimeError: In backward, if the second call would not compute what the first did.
    """
    if not module.training or module.gradient_checkpointing:
        return function(hidden_states)
    if torch.compiler.is_compiling():  # which keeps the first call's weights itself
        return checkpoint(function, hidden_states, use_reentrant=False)

    def fingerprint() -> list:
        modules = [(m.training, getattr(m, "active_adapters", None), len(m._forward_hooks)) for m in module.modules()]
        disabled = [m.disable_adapters for m in module.modules() if hasattr(m, "disable_adapters")]
        return [modules, disabled, [parameter._version for parameter in module.parameters()]]

    before = fingerprint()

    def unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
        if fingerprint() != before:
            raise RuntimeError(
                "Weights, adapters, hooks or the mode of a vision layer were changed between forward and backward. "
                "Backward computes parts of the layer again and would get other values: call it before the change."
            )
        return function(hidden_states)

    return checkpoint(unchanged, hidden_states, use_reentrant=False)


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
        check_attention_implementation(implementation)
        return implementation

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in `PreTrainedModel`, from split or stock checkpoints, but never with random attention weights.

        Raises:
            ValueError: If vision attention weights of the checkpoint are missing, superfluous or of a wrong shape.
        """
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        cls._check_attention_weights(
            missing=loading_info["missing_keys"],
            not_in_the_model=loading_info["unexpected_keys"],
            of_another_shape=(key for key, *_ in loading_info["mismatched_keys"]),
        )
        for module in model.modules():
            # bitsandbytes would pack 4-bit weights in evaluation on some CPUs, and then give no gradients in training.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return (model, loading_info) if output_loading_info else model

    def _move_missing_keys_from_meta_to_device(self, missing_keys: list[str], *args, **kwargs) -> None:
        # Where `from_pretrained` goes on to load an adapter, it reports on that, and no more on the base model.
        own = re.compile(r"\.(?:[qkv]|proj)\.(?:weight|bias)$|\.rel_pos_[hw]$")
        self._check_attention_weights(missing=filter(own.search, missing_keys))
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    @classmethod
    def _check_attention_weights(cls, **problems: Iterable[str]) -> None:
        told = [
            f"{problem.replace('_', ' ')}: {', '.join(attention_keys)}"
            for problem, keys in problems.items()
            if (attention_keys := sorted(key for key in keys if ".attn." in key))
        ]
        if told:
            raise ValueError(
                f"{cls.__name__} would not hold the checkpoint's vision attention weights. Expected were, in every "
                "layer, a fused `attn.qkv` or all of `attn.q`, `attn.k`, `attn.v`, plus `attn.proj` and "
                "`attn.rel_pos_*`, as the configuration says. Check that it is a complete SAM v1 checkpoint and that "
                "num_hidden_layers, qkv_bias, use_rel_pos and the sizes in its config.json are its own. Weights "
                f"{'; '.join(told)}."
            )

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
        """As in `PreTrainedModel`: always split weights, with the code that loads them, in place of what was there."""
        self.config.auto_map = dict(self._auto_map)
        kwargs["save_original_format"] = False
        folder = Path(save_directory)
        replaced = [*folder.glob("model*.safetensors")] if kwargs.get("is_main_process", True) else []
        if not replaced:
            return super().save_pretrained(save_directory, *args, **kwargs)
        # Live models may be memory-mapped on these files, and a single one would be preferred to new shards.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".replaced-") as aside:
            for file in replaced:
                file.rename(Path(aside, file.name))
            written = False
            try:
                output = super().save_pretrained(save_directory, *args, **kwargs)
                written = any(folder.glob("model*.safetensors"))  # and not an adapter alone
            finally:
                if not written:
                    for file in replaced:
                        Path(aside, file.name).replace(file)
            return output

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


__all__ = ["SamSplitModel", "SamSplitPreTrainedModel", "SamSplitVisionModel", "SamVisionAttentionSplit"]
