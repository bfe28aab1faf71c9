"""Loads the model to segment with, or to train: any SAM v1 checkpoint, or an adapter on its base."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel, SamProcessor

from checkpoint_tools.checkout import split_class
from checkpoint_tools.config_files import read_processor
from checkpoint_tools.errors import well_formed
from checkpoint_tools.fetching import named_in, require_name, require_no_adapter
from checkpoint_tools.fused_adapters import with_adapter
from checkpoint_tools.loading import let_gradients_through_4bit, processor_sizes
from checkpoint_tools.messages import one_line

from .settings import SegmentationSettings


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
MALFORMED = (ValueError, TypeError, KeyError, AttributeError)  # what PEFT raises for settings of a wrong shape


class ModelError(ValueError):
    """The base model cannot be loaded, or cannot be trained with these settings."""


def load_base(
    base: str,
    revision: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    image_size: int | None = None,
) -> tuple[PreTrainedModel, SamProcessor]:
    """Loads any SAM v1 checkpoint, stock or split, as a split model in fp32, and its processor.

    With `image_size`, both are for images of that side, in pixels, instead of the checkpoint's own.

    Raises:
        ModelError: If the checkpoint cannot be loaded for this side, or its processor has another one.
    """
    options: dict[str, Any] = {"quantization_config": quantization_config} if quantization_config else {}
    if image_size is not None:
        options["image_size"] = image_size
    require_model_name(base, revision)
    try:
        with well_formed(base):
            require_no_adapter(base, revision)
            model = split_class().from_pretrained(base, revision=revision, dtype=torch.float32, **options)
        let_gradients_through_4bit(model)
        sizes = {} if image_size is None else processor_sizes(model.config)
        processor = read_processor(base, revision, **sizes)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[0]
        if image_size is not None and problem.startswith(f"image_size={image_size}"):
            raise ModelError(f"--image-size {image_size}: {problem}") from error
        raise ModelError(f"{base}: not a SAM v1 checkpoint with a processor: {problem}") from error
    side, expected = processor.image_processor.size["longest_edge"], model.config.vision_config.image_size
    if side != expected:
        raise ModelError(f"{base}: the processor resizes to {side} pixels, but the model expects {expected}.")
    return model, processor


def load_adapted(
    adapter: str,
    base: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    adapter_revision: str | None = None,
) -> tuple[PeftModel, SamProcessor]:
    """Loads a base and an adapter onto it. Returns model and processor.

    The default base is the one that the adapter names, and the default image side that of the adapter's training.

    Raises:
        ModelError: If there is none, or the base is not one.
        SegmentationSettingsError: If the settings beside the adapter are damaged.
    """
    require_model_name(adapter, adapter_revision)
    try:
        config = PeftConfig.from_pretrained(adapter, revision=adapter_revision)
    except (OSError, *MALFORMED) as error:
        raise ModelError(f"{adapter}: not an adapter: {one_line(error):.300}") from error
    if base is None:
        base, named_revision = named_in(vars(config))
        revision = revision or named_revision
    if not base or not isinstance(base, str):
        raise ModelError(f"{adapter} does not name the model that it was trained on: give it with --base.")
    image_size = image_size or SegmentationSettings.load(adapter, adapter_revision).image_size
    model, processor = load_base(base, revision, image_size=image_size)
    try:
        return with_adapter(model, adapter, adapter_revision), processor
    except (OSError, RuntimeError, SafetensorError, *MALFORMED) as error:
        raise ModelError(f"{adapter}: does not fit {base}, or is damaged: {one_line(error):.300}") from error


def require_model_name(name: str, revision: str | None) -> None:
    """Checks a name as `require_name` does.

    Raises:
        ModelError: If it is not the name of a model.
    """
    try:
        require_name(name, revision)
    except ValueError as error:
        raise ModelError(str(error)) from error
