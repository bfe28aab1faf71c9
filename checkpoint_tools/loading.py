"""Loads any SAM v1, stock or split, as a split model, and makes the processor that fits a model."""

import torch
from torch import nn
from transformers import PreTrainedModel, SamConfig, SamModel, SamProcessor

from .staging import split_class


def load(source: str) -> tuple[PreTrainedModel, torch.dtype]:
    """Returns the split or stock model `source` as a split model in float32, and the dtype of its weights on disk.

    Raises:
        ValueError: If it is another model, or the vision encoder alone.
    """
    if model_type(source) not in (SamConfig.model_type, "sam_split"):
        raise ValueError(
            f"{source}: expected a complete SAM (model_type 'sam' or 'sam_split'), got {model_type(source)!r}."
        )
    model = split_class().from_pretrained(source).eval()
    dtype = model.dtype
    return model.float(), dtype


def model_type(source: str) -> str | None:
    """Returns what the configuration of `source` says."""
    return SamConfig.get_config_dict(source)[0].get("model_type")


def as_split(stock: SamModel) -> PreTrainedModel:
    """Returns a split model with a copy of the weights of `stock`."""
    with torch.device("meta"):
        model = split_class()(stock.config)
    model.load_state_dict(stock.state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


def processor_for(config: SamConfig) -> SamProcessor:
    """Returns SAM's processor, with the sizes of the model."""
    from transformers import SamImageProcessor  # imported here, because it warns if torchvision is missing

    image_size = config.vision_config.image_size
    mask_size = 4 * image_size // config.vision_config.patch_size
    return SamProcessor(
        SamImageProcessor(
            size={"longest_edge": image_size},
            pad_size={"height": image_size, "width": image_size},
            mask_size={"longest_edge": mask_size},
            mask_pad_size={"height": mask_size, "width": mask_size},
        )
    )


def let_gradients_through_4bit(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights in evaluation, as it does on CPUs that have AVX512-BF16.

    Packed weights give no gradients in later training, and some widths cannot be packed at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
