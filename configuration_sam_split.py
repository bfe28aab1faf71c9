"""Configuration of SAM with separate query, key and value projections in its vision encoder."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, SamConfig, SamVisionConfig
from transformers.utils.versions import require_version


# Checked here because this file is always imported first, and older releases fail with unclear errors.
require_version(
    "transformers>=5.0.0",
    "Checkpoints are split while loading, which needs transformers 5: pip install -U transformers",
)
require_version("torch>=2.7", "Attention asks torch.compiler.is_exporting(): pip install -U torch")

SAM_SPLIT_VERSION = "0.2.0"  # of this code, see CHANGELOG.md
ONLY_ON_LOAD = ("_attention_tile_bytes", "_interpolate_pos_encoding")  # settings that are never saved
POSITIVE = ("hidden_size", "num_attention_heads", "image_size", "patch_size")
TYPES = {bool: (bool,), int: (int,), float: (float, int), str: (str,), list: (list, tuple), tuple: (list, tuple)}


class SamSplitConfigMixin:
    """Converts stock SAM configurations, in memory or on disk, to ours and back."""

    _stock_class: type[PreTrainedConfig]

    @classmethod
    def from_sam(cls, config: PreTrainedConfig) -> "PreTrainedConfig":
        """Returns `config` itself if it is of this class already, else one of this class with the same settings."""
        if isinstance(config, cls):
            return config
        settings = _with_split_types(config.to_dict())
        split = cls.from_dict(settings, attn_implementation=config._attn_implementation)
        for part in split.sub_configs:  # which may have one each, that no dictionary holds
            getattr(split, part)._attn_implementation = getattr(config, part)._attn_implementation
        ours, given = (getattr(each, "vision_config", each) for each in (split, config))
        ours.attention_tile_bytes = getattr(given, "attention_tile_bytes", None)
        ours._interpolate_pos_encoding = getattr(given, "_interpolate_pos_encoding", False)
        return split

    def to_sam(self) -> PreTrainedConfig:
        """Returns the stock configuration with the same settings."""
        ours = ("model_type", "auto_map", "architectures", "sam_split_version")
        settings = {key: value for key, value in self.to_dict().items() if key not in ours}  # type: ignore[attr-defined]
        for part in self.sub_configs:  # type: ignore[attr-defined]
            config = getattr(self, part)
            settings[part] = config.to_sam() if isinstance(config, SamSplitConfigMixin) else config
        return self._stock_class(**settings, attn_implementation=self._attn_implementation)  # type: ignore[attr-defined]

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `PreTrainedConfig`, with the model types of stock SAM replaced by ours.

        Raises:
            ValueError: If the file configures another architecture.
        """
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return _with_split_types(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *, image_size: int | None = None, **kwargs) -> Any:
        """As in `PreTrainedConfig`, for another side of images in pixels, if one is given.

        `from_pretrained` then interpolates the checkpoint's position tables, instead of refusing them.
        """
        if image_size is not None:
            config_dict = copy.deepcopy(config_dict)
            is_whole = "vision_config" in cls.sub_configs  # type: ignore[attr-defined]
            vision_config = config_dict.setdefault("vision_config", {}) if is_whole else config_dict
            vision_config.update(image_size=image_size, _interpolate_pos_encoding=True)
            if is_whole:
                prompt_encoder_config = config_dict.setdefault("prompt_encoder_config", {})
                prompt_encoder_config["image_size"] = image_size
                prompt_encoder_config.pop("image_embedding_size", None)  # which the constructor derives
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def _dict_from_json_file(cls, json_file: str) -> dict[str, Any]:
        config_dict = super()._dict_from_json_file(json_file)  # type: ignore[misc]
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"{json_file} is not a model's configuration: it holds {config_dict!r:.40}, not an object."
            )
        return config_dict

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `save_pretrained` writes the code. transformers' copy can leave half a file if killed."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> Any:
        """As in `PreTrainedConfig`, with the code that loads it and its version."""
        self.sam_split_version = SAM_SPLIT_VERSION
        auto_map = {"AutoConfig": f"configuration_sam_split.{type(self).__name__}", **getattr(self, "auto_map", {})}
        self.auto_map = {name: path.split("--")[-1] for name, path in auto_map.items()}  # not in the repo it came from
        os.makedirs(save_directory, exist_ok=True)
        for file in Path(__file__).parent.glob("*_sam_split.py"):
            write_whole(Path(save_directory, file.name), file.read_bytes())
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """As in `PreTrainedConfig`."""
        write_whole(Path(json_file_path), self.to_json_string(use_diff).encode())  # type: ignore[attr-defined]


class SamSplitVisionConfig(SamSplitConfigMixin, SamVisionConfig):
    """Configuration of `SamSplitVisionModel`: the arguments of `SamVisionConfig`, checked, and one more.

    Args:
        attention_tile_bytes: Size in bytes of one tile of attention scores in tiled `sdpa` attention, whatever the
            batch and the image size; a tile has at least one row of queries. Inference holds one tile at a time,
            training two. The default None means 8 MB on CPUs, so that tiles stay in the caches, and 256 MB elsewhere.
            It depends on the machine. So it is given on load and never saved.

    Raises:
        ValueError: If the settings have a wrong type, or would build a broken or silently different model.
    """

    model_type = "sam_split_vision_model"
    _stock_class = SamVisionConfig
    _interpolate_pos_encoding = False  # set by `image_size`, until a checkpoint is loaded

    def __init__(self, attention_tile_bytes: int | None = None, **kwargs):
        kwargs.pop("model_type", None)  # a stock config names its own type
        check_types(kwargs, SamVisionConfig)
        super().__init__(**kwargs)
        self.attention_tile_bytes = attention_tile_bytes
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
        if beyond and [*self.global_attn_indexes] != [*SamVisionConfig().global_attn_indexes]:  # of a deeper model
            raise ValueError(
                f"global_attn_indexes={list(self.global_attn_indexes)} names layers {beyond}, but there are only "
                f"layers 0 to {self.num_hidden_layers - 1}: the model would have fewer global layers than asked for."
            )

    @property
    def attention_tile_bytes(self) -> int | None:
        """Size of a tile in bytes, None for the default of the device."""
        return self.__dict__.get("_attention_tile_bytes")

    @attention_tile_bytes.setter
    def attention_tile_bytes(self, value: int | None) -> None:
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"attention_tile_bytes={value!r} is not a number of bytes: give a positive int, or None.")
        self._attention_tile_bytes = value

    def to_dict(self) -> dict[str, Any]:
        """As in `PreTrainedConfig`, without what applies to one load only."""
        return {name: value for name, value in super().to_dict().items() if name not in ONLY_ON_LOAD}


class SamSplitConfig(SamSplitConfigMixin, SamConfig):
    """Configuration of `SamSplitModel`: the arguments of `SamConfig`, or a stock SAM's `config.json`.

    Raises:
        ValueError: If the settings have a wrong type, or would build a broken or silently different model, or are
            another architecture's.
    """

    model_type = "sam_split"
    _stock_class = SamConfig
    sub_configs = {**SamConfig.sub_configs, "vision_config": SamSplitVisionConfig}
    sub_configs_defaults = sub_configs  # the name that later releases give it

    def __init__(self, vision_config: dict[str, Any] | PreTrainedConfig | None = None, **kwargs):
        kwargs.pop("model_type", None)  # a stock config names its own type
        for part, part_class in SamConfig.sub_configs.items():
            settings = vision_config if part == "vision_config" else kwargs.get(part)
            if settings is not None and not isinstance(settings, PreTrainedConfig):
                check_types(settings, part_class)
        super().__init__(vision_config=vision_config, **kwargs)
        given = vision_config if isinstance(vision_config, PreTrainedConfig) else self.vision_config
        self.vision_config = SamSplitVisionConfig.from_sam(given)

    @property
    def attention_tile_bytes(self) -> int | None:
        """That of `vision_config`, so that `from_pretrained` takes it."""
        return self.vision_config.attention_tile_bytes

    @attention_tile_bytes.setter
    def attention_tile_bytes(self, value: int | None) -> None:
        self.vision_config.attention_tile_bytes = value


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file and then puts it in place in one step, so that a killed process leaves no half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        file = Path(folder, path.name)
        file.write_bytes(content)
        file.replace(path)


def check_types(settings: Any, stock_class: type[PreTrainedConfig]) -> None:
    """Checks that settings have the types of the defaults of `stock_class`.

    Raises:
        ValueError: If `settings` are not a dictionary, or if one has another type or is too small.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{stock_class.base_config_key}={settings!r:.40} should be a dictionary of settings.")
    for name, default in vars(stock_class()).items():
        value = settings.get(name, default)
        if type(default) not in TYPES or (name == "mlp_dim" and value is None):
            continue
        types = TYPES[type(default)]
        if type(value) not in types or (list in types and any(type(item) is not int for item in value)):
            expected = "a list of int" if list in types else f"of type {types[0].__name__}"
            raise ValueError(f"{name}={value!r:.40} should be {expected}.")
        if type(value) in (int, float) and value < (1 if name in POSITIVE else 0):
            raise ValueError(f"{name}={value!r} is too small.")


def _with_split_types(config_dict: dict[str, Any]) -> dict[str, Any]:
    split_types = {split._stock_class.model_type: split.model_type for split in (SamSplitConfig, SamSplitVisionConfig)}
    model_type = config_dict.get("model_type")
    if model_type is not None and model_type not in (*split_types, *split_types.values()):
        raise ValueError(
            f"This is the configuration of a '{model_type}' model, but only SAM v1 checkpoints (model_type 'sam' or "
            f"'{SamSplitConfig.model_type}') can be loaded. Load it with its own class, or with AutoModel."
        )
    config_dict = {**config_dict, "model_type": split_types.get(model_type, model_type)}
    config_dict.pop("attention_tile_bytes", None)  # which version 0.1 saved
    if isinstance(config_dict.get("vision_config"), dict):
        config_dict["vision_config"] = _with_split_types(config_dict["vision_config"])
    return config_dict


__all__ = ["SamSplitConfig", "SamSplitVisionConfig"]
