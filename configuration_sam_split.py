"""Configuration of SAM with separate query, key and value projections in its vision encoder."""

from typing import Any

from transformers import PreTrainedConfig, SamConfig, SamVisionConfig
from transformers.utils.versions import require_version


# Checked here because every road into this repo imports this file first, and older releases fail far less clearly.
require_version(
    "transformers>=5.0.0",
    "Checkpoints are split while loading, which needs transformers 5: pip install -U transformers",
)

require_version("torch>=2.7", "Attention asks torch.compiler.is_exporting(): pip install -U torch")

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


class StockConfigMixin:
    """Takes a stock SAM configuration, in memory or on disk, as one of ours."""

    @classmethod
    def from_sam(cls, config: PreTrainedConfig) -> "PreTrainedConfig":
        """Returns `config` itself if it is of this class already, else one of this class with the same settings."""
        if isinstance(config, cls):
            return config
        settings = _as_split(config.to_dict())
        split = cls.from_dict(settings, attn_implementation=config._attn_implementation)  # type: ignore[attr-defined]
        for part in split.sub_configs:  # which may have one each, that no dictionary holds
            getattr(split, part)._attn_implementation = getattr(config, part)._attn_implementation
        return split

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `PreTrainedConfig`, with the model types of stock SAM replaced by ours.

        Raises:
            ValueError: If the file configures another architecture.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return _as_split(config_dict), kwargs


class SamSplitVisionConfig(StockConfigMixin, SamVisionConfig):
    """Configuration of `SamSplitVisionModel`: the arguments of `SamVisionConfig`, checked, and one more.

    Args:
        attention_tile_bytes: What `sdpa` attention may take for the scores of some of the queries, in bytes, whatever
            the batch and the image size; inference holds one such tile at a time, training two. Tiles of a few MB stay
            in a CPU's caches, larger ones keep a GPU busier.

    Raises:
        ValueError: If the settings would build a broken or silently different model.
    """

    model_type = "sam_split_vision_model"
    _auto_class = "AutoConfig"

    def __init__(self, attention_tile_bytes: int = 8 * 2**20, **kwargs):
        kwargs.pop("model_type", None)  # a stock config names its own type
        super().__init__(**kwargs)
        self.attention_tile_bytes = attention_tile_bytes
        if attention_tile_bytes < 1:
            raise ValueError(
                f"attention_tile_bytes={attention_tile_bytes} leaves attention no memory: choose 1 MB or more."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: "
                "choose a multiple, or heads would lose channels."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: choose a multiple, "
                "or the last rows and columns of pixels would be ignored."
            )
        beyond = [index for index in self.global_attn_indexes if not 0 <= index < self.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"global_attn_indexes={list(self.global_attn_indexes)} names layers {beyond}, but there are only "
                f"layers 0 to {self.num_hidden_layers - 1}: the model would have fewer global layers than asked for."
            )
        check_attention_implementation(self._attn_implementation)

    def to_sam(self) -> SamVisionConfig:
        """Returns the stock configuration with the same settings."""
        return SamVisionConfig(**_stock_settings(self), attn_implementation=self._attn_implementation)


class SamSplitConfig(StockConfigMixin, SamConfig):
    """Configuration of `SamSplitModel`: the arguments of `SamConfig`, or a stock SAM's `config.json`.

    Raises:
        ValueError: If the settings would build a broken or silently different model, or are another architecture's.
    """

    model_type = "sam_split"
    _auto_class = "AutoConfig"  # lets this file travel with every saved configuration

    def __init__(self, **kwargs):
        kwargs.pop("model_type", None)  # a stock config names its own type
        super().__init__(**kwargs)
        self.vision_config = SamSplitVisionConfig(
            **self.vision_config.to_dict(), attn_implementation=self.vision_config._attn_implementation
        )
        check_attention_implementation(self._attn_implementation)

    def to_sam(self) -> SamConfig:
        """Returns the stock configuration with the same settings."""
        settings = {**_stock_settings(self), "vision_config": self.vision_config.to_sam()}
        return SamConfig(**settings, attn_implementation=self._attn_implementation)


def _as_split(config_dict: dict[str, Any]) -> dict[str, Any]:
    split_types = {
        SamConfig.model_type: SamSplitConfig.model_type,
        SamVisionConfig.model_type: SamSplitVisionConfig.model_type,
    }
    model_type = config_dict.get("model_type")
    if model_type is not None and model_type not in (*split_types, *split_types.values()):
        raise ValueError(
            f"This is the configuration of a '{model_type}' model, but only SAM v1 checkpoints (model_type 'sam' or "
            f"'{SamSplitConfig.model_type}') can be loaded. Load it with its own class, or with AutoModel."
        )
    config_dict = {**config_dict, "model_type": split_types.get(model_type, model_type)}
    if isinstance(config_dict.get("vision_config"), dict):
        config_dict["vision_config"] = _as_split(config_dict["vision_config"])
    return config_dict


def _stock_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of `config` that stock SAM knows, without those that say which code it belongs to."""
    ours = ("model_type", "auto_map", "architectures", "attention_tile_bytes")
    return {key: value for key, value in config.to_dict().items() if key not in ours}


def check_attention_implementation(implementation: str | None) -> None:
    """Passes the implementations that the vision encoder has, and None for the default.

    Raises:
        ValueError: If `implementation` is another one.
    """
    if implementation not in (None, *ATTENTION_IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported: choose one of "
            f"{', '.join(map(repr, ATTENTION_IMPLEMENTATIONS))}."
        )


__all__ = ["SamSplitConfig", "SamSplitVisionConfig"]
