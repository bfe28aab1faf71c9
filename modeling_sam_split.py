"""Segment Anything with separate query, key and value projections in its vision encoder.

Stock `SamModel` computes the three with one fused `qkv` Linear, which PEFT can only adapt as a whole. Here they are
three Linears, `q`, `k` and `v`, so that LoRA can target two of them. Everything else is SAM's own code. Both
`from_pretrained` and `load_state_dict` split the fused weights of a checkpoint. `to_sam()` fuses them again.

Classes that replace a part of SAM are named `Sam…Split`, like `SamVisionAttentionSplit` in the transformers guide
"Customizing model components". Classes that are loaded by name are named `SamSplit…`.

Shapes: B images of rows x columns tokens with C channels. `attention_sam_split.py` explains the other letters.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, SamModel, SamVisionConfig, SamVisionModel
from transformers.modeling_utils import load_state_dict
from transformers.models.sam.modeling_sam import (
    SamPreTrainedModel,
    SamVisionAttention,
    SamVisionEncoder,
    SamVisionLayer,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .attention_sam_split import ATTENTION_FUNCTIONS
from .configuration_sam_split import SamSplitConfig, SamSplitVisionConfig
from .conversion_sam_split import check_loaded, fuse_split, interpolate_positions, split_layer, split_state_dict


logger = logging.get_logger(__name__)


class SamVisionAttentionSplit(SamVisionAttention):
    """Multi-head attention with decomposed relative positions and separate `q`, `k` and `v` projections.

    Args:
        config: The vision encoder's configuration.
        window_size: Side of the window in tokens, 0 for global attention over the whole image.
    """

    # Here and below: torch.jit.load cannot read the module's name, in which a commit may begin with a digit.
    _jit_override_qualname = "__torch__.sam_split.SamVisionAttentionSplit"

    def __init__(self, config: SamVisionConfig, window_size: int):
        super().__init__(config, window_size)
        self.config = config
        self.window_size = window_size
        del self.qkv
        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.register_load_state_dict_pre_hook(self.split_q_k_v_load_hook)

    @staticmethod
    def split_q_k_v_load_hook(module, state_dict, prefix, *args):
        """Splits the fused `qkv` in a state dict given to `load_state_dict`, see `split_layer`.

        Problems go to `error_msgs`, on which `load_state_dict` raises even with `strict=False`.
        """
        *_, error_msgs = args
        own = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        entries, problems = split_layer(own, module.state_dict().keys())
        state_dict.update({prefix + name: tensor for name, tensor in entries.items()})
        error_msgs.extend(f"{prefix.removesuffix('.') or 'attn'}: {problem}" for problem in problems)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the attended `hidden_states` (B, rows, columns, C) and, from `eager` only, the weights (G, N, N)."""
        batch_size, rows, columns, _ = hidden_states.shape
        height, width = (self.window_size, self.window_size) if self.window_size else (rows, columns)
        padded_rows, padded_columns = (rows + height - 1) // height * height, (columns + width - 1) // width * width
        # As in stock SAM, windows attend to what zeros are projected to.
        hidden_states = F.pad(hidden_states, (0, 0, 0, padded_columns - columns, 0, padded_rows - rows))
        window_rows, window_columns = batch_size * padded_rows // height, padded_columns // width

        qkv = torch.stack([projection(hidden_states) for projection in (self.q, self.k, self.v)])
        qkv = qkv.view(3, window_rows, height, window_columns, width, self.num_attention_heads, -1)
        qkv = qkv.permute(0, 1, 3, 5, 2, 4, 6).contiguous().flatten(1, 2)  # (3, M, n, H, W, d)

        tables = None
        if self.use_rel_pos:
            tables = self.get_rel_pos(height, height, self.rel_pos_h), self.get_rel_pos(width, width, self.rel_pos_w)
        attention = ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attn_output, attn_weights = attention(self, qkv, tables)  # (M, n, H, W, d)

        attn_output = attn_output.unflatten(0, (window_rows, window_columns)).permute(0, 3, 1, 4, 2, 5)
        attn_output = attn_output.reshape(batch_size, padded_rows, padded_columns, -1)
        attn_output = attn_output[:, :rows, :columns].contiguous()  # (B, rows, columns, C); a slice slows Linear down
        return self.proj(attn_output), attn_weights

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: torch.Tensor) -> torch.Tensor:
        """As in `SamVisionAttention`, without interpolating a table (2 * size - 1, d) that has the right length."""
        if q_size != k_size or len(rel_pos) != 2 * q_size - 1:
            return super().get_rel_pos(q_size, k_size, rel_pos)
        positions = torch.arange(q_size, device=rel_pos.device)
        return rel_pos[positions[:, None] - positions + q_size - 1]


class SamVisionLayerSplit(SamVisionLayer):
    """A `SamVisionLayer` with `SamVisionAttentionSplit`, which cuts its windows itself."""

    _jit_override_qualname = "__torch__.sam_split.SamVisionLayerSplit"

    def __init__(self, config: SamVisionConfig, window_size: int):
        super().__init__(config, window_size)
        self.attn = SamVisionAttentionSplit(config, window_size)

    @property
    def window_size(self) -> int:
        """That of `attn`, so that changing it has the effect that it has on stock."""
        return self.attn.window_size

    @window_size.setter
    def window_size(self, value: int) -> None:
        self.attn.window_size = value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns `hidden_states` (B, rows, columns, C) after attention and MLP."""
        attn_output, _ = self.attn(hidden_states=self.layer_norm1(hidden_states))  # by name as in stock, for hooks
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SamSplitPreTrainedModel(SamPreTrainedModel):
    """Loading, saving and the way back to stock SAM, shared by all models here."""

    _jit_override_qualname = "__torch__.sam_split.SamSplitPreTrainedModel"
    _no_split_modules = ["SamVisionLayerSplit"]
    _auto_map: dict[str, str]
    _stock_class: type[PreTrainedModel]

    def split_vision_encoder(self, config: SamVisionConfig) -> None:
        """Replaces the encoder that stock's constructor built, and which consumed `config.gradient_checkpointing`."""
        is_checkpointing = any(layer.gradient_checkpointing for layer in self.vision_encoder.layers)
        self.vision_encoder = SamVisionEncoderSplit(config)
        if is_checkpointing:
            self.config.gradient_checkpointing = True
        self._no_split_modules = type(self)._no_split_modules
        self.post_init()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: the configuration is saved with all of the code."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, **kwargs):
        """As in `PreTrainedModel`, but every weight of the model gets the checkpoint's value.

        Raises:
            ValueError: If weights are missing, have another shape, or appear twice.
        """
        files = checkpoint_files or ()
        config = getattr(model.config, "vision_config", model.config)
        if config._interpolate_pos_encoding:
            state_dict = state_dict or {key: value for file in files for key, value in load_state_dict(file).items()}
            state_dict = state_dict | interpolate_positions(state_dict, model.state_dict())
            checkpoint_files = None  # from which weights that are offloaded to disk would be read
        output = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)
        if not model._hf_peft_config_loaded:  # otherwise this loads an adapter
            loading_info = output[0] if isinstance(output, tuple) else output  # transformers < 5.1 returns no tuple
            state_dicts = [load_state_dict(file, map_location="meta") for file in files] or [state_dict]
            check_loaded(model, loading_info, load_config.ignore_mismatched_sizes, split_state_dict(*state_dicts)[1])
            config._interpolate_pos_encoding = False  # it was asked for this checkpoint, and not for the next one
        return output

    def load_adapter(self, peft_model_id=None, adapter_name=None, *args, **kwargs):
        """As in `PreTrainedModel`, but never with random adapter weights, as transformers < 5.6 leaves (5.23: DoRA's).

        Raises:
            ValueError: If weights of the adapter do not reach the model, which must then be loaded anew.
        """
        loading_info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        missing = getattr(loading_info, "missing_keys", ())  # some releases return None
        # It may name weights of other adapters, and the model's own.
        if missing := sorted(key for key in missing if (adapter_name or "default") in key.split(".")):
            raise ValueError(
                "The adapter's weights did not reach the model, whose adapter is now random. Load the model again, "
                "and the adapter with PeftModel.from_pretrained(model, adapter), or upgrade transformers. Missing: "
                f"{', '.join(missing)}."
            )
        return loading_info

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        """As in `PreTrainedModel`, but always in the split layout, and with the code that loads it."""
        self.config.auto_map = dict(self._auto_map)
        kwargs["save_original_format"] = False
        state_dict = state_dict and split_state_dict(state_dict)[0]
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        single, index = Path(save_directory, SAFE_WEIGHTS_NAME), Path(save_directory, SAFE_WEIGHTS_INDEX_NAME)
        if single.exists() and index.exists() and single.stat().st_mtime_ns < index.stat().st_mtime_ns:
            logger.warning(f"{index} is new, but from_pretrained would load the older {single}: remove it.")

    @torch.no_grad()
    def to_sam(self) -> PreTrainedModel:
        """Returns the stock model with a copy of these weights, fused, in the same dtypes and on the same devices.

        Raises:
            ValueError: If the weights are quantized or offloaded, or if adapters are in place.
        """
        if getattr(self, "is_quantized", False):
            raise ValueError("The weights are quantized: call dequantize() first, then to_sam().")
        state_dict = self.state_dict()
        if any(tensor.is_meta for tensor in state_dict.values()):
            raise ValueError("Some weights are offloaded: load the model without device_map, then call to_sam().")
        with torch.device("meta"):
            model = self._stock_class(self.config.to_sam())
        if foreign := sorted(state_dict.keys() ^ split_state_dict(model.state_dict())[0].keys()):
            raise ValueError(
                "Adapters are still in place. Merge them with merge_and_unload(), or drop them with unload(), then "
                f"call to_sam() on the model that this returns. A plain SAM differs in: {', '.join(foreign)}."
            )
        fused = fuse_split(state_dict)
        copies = {key: tensor.clone() if key in state_dict else tensor for key, tensor in fused.items()}
        model.load_state_dict(copies, assign=True)
        model.tie_weights()
        return model.train(self.training)


class SamVisionEncoderSplit(SamSplitPreTrainedModel, SamVisionEncoder):
    """A `SamVisionEncoder` of `SamVisionLayerSplit`s."""

    def __init__(self, config: SamVisionConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(SamVisionLayerSplit(config, layer.window_size) for layer in self.layers)
        self.post_init()


class SamSplitVisionModel(SamSplitPreTrainedModel, SamVisionModel):
    """The vision encoder of SAM, as `SamVisionModel`, with separate `q`, `k` and `v` projections."""

    config: SamSplitVisionConfig
    _stock_class = SamVisionModel
    _auto_map = {
        "AutoConfig": "configuration_sam_split.SamSplitVisionConfig",
        "AutoModel": "modeling_sam_split.SamSplitVisionModel",
    }
    # the rest of a full SAM checkpoint
    _keys_to_ignore_on_load_unexpected = [r"^shared_image_embedding\.", r"^prompt_encoder\.", r"^mask_decoder\."]

    def __init__(self, config: SamSplitVisionConfig):
        super().__init__(SamSplitVisionConfig.from_sam(config))
        self.split_vision_encoder(self.config)


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
        super().__init__(SamSplitConfig.from_sam(config))
        self.split_vision_encoder(self.config.vision_config)


__all__ = ["SamSplitModel", "SamSplitPreTrainedModel", "SamSplitVisionModel", "SamVisionAttentionSplit"]
