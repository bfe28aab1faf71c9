"""Loads any SAM v1, stock or split, as a split model, and makes the processor that fits a model."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SamConfig, SamModel, SamProcessor

from .checkout import split_class
from .errors import well_formed
from .fetching import require_name, require_no_adapter


VISION_TYPES = ("sam_vision_model", "sam_split_vision_model")


def load(source: str, revision: str | None = None, complete: bool = True) -> tuple[PreTrainedModel, torch.dtype]:
    """Returns the split or stock model `source` as a split model in float32 or more, and the dtype of its weights.

    Args:
        source: A folder, or an id of the Hub.
        revision: Of the latter: a branch, tag or commit.
        complete: Whether a vision encoder alone is refused.

    Raises:
        ValueError: If it is another model, or not there, or lacks weights.
    """
    actual = model_type(source, revision)
    if actual in (SamConfig.model_type, "sam_split"):
        model_class = split_class()
    elif actual in VISION_TYPES and not complete:
        model_class = split_class("SamSplitVisionModel")
    else:
        raise ValueError(f"{source}: expected a complete SAM (model_type 'sam' or 'sam_split'), got {actual!r}.")
    with well_formed(source):
        model = model_class.from_pretrained(source, revision=revision).eval()
    dtype = model.dtype
    return model.to(torch.promote_types(dtype, torch.float32)), dtype


def model_type(source: str, revision: str | None = None) -> str | None:
    """Returns what the configuration of `source` says.

    Raises:
        ValueError: If there is no such folder, and it is no id of the Hub either; or if it is quantized.
    """
    require_name(source, revision)
    with well_formed(source):
        require_no_adapter(source, revision)
        settings = SamConfig.get_config_dict(source, revision=revision)[0]
        if "quantization_config" in settings:
            raise ValueError(f"{source} is quantized: expected the model in full precision.")
        return settings.get("model_type")


def as_split(stock: SamModel) -> PreTrainedModel:
    """Returns a split model with a copy of the weights of `stock`."""
    with torch.device("meta"):
        model = split_class()(stock.config)
    model.load_state_dict(stock.state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


def processor_for(config: SamConfig, **settings: object) -> SamProcessor:
    """Returns SAM's processor, with the sizes of the model, and other `settings` of `SamImageProcessor`."""
    from transformers import SamImageProcessor  # imported here, because it warns if torchvision is missing

    return SamProcessor(SamImageProcessor(**processor_sizes(config), **settings))


def processor_sizes(config: SamConfig) -> dict[str, Any]:
    """Returns the settings of a processor that depend on the side of a model's images."""
    image_size = config.vision_config.image_size
    mask_size = 4 * image_size // config.vision_config.patch_size
    return {
        "size": {"longest_edge": image_size},
        "pad_size": {"height": image_size, "width": image_size},
        "mask_size": {"longest_edge": mask_size},
        "mask_pad_size": {"height": mask_size, "width": mask_size},
    }


def let_gradients_through_4bit(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights in evaluation, as it does on CPUs that have AVX512-BF16.

    Packed weights give no gradients in later training, and some widths cannot be packed at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
