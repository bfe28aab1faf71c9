"""The model to fine-tune: a split SAM with adapters, or with some of its own weights to train."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel, SamProcessor

from checkpoint_tools.checkout import split_class
from checkpoint_tools.errors import well_formed
from checkpoint_tools.fetching import require_name
from checkpoint_tools.fused_adapters import with_adapter
from checkpoint_tools.loading import let_gradients_through_4bit, processor_sizes
from checkpoint_tools.messages import one_line
from checkpoint_tools.plain_settings import read_processor

from .segmentation_settings import SegmentationSettings
from .settings import ModelSettings


MALFORMED = (ValueError, TypeError, KeyError, AttributeError)  # what PEFT raises for settings of a wrong shape
ONLY_IN_LAYERS = {"q", "k", "v"}  # proj, lin1 and lin2 also exist in the decoder


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
    try:
        require_name(base)
        with well_formed(base):
            model = split_class().from_pretrained(base, revision=revision, dtype=torch.float32, **options)
        let_gradients_through_4bit(model)
        sizes = {} if image_size is None else processor_sizes(model.config)
        processor = read_processor(base, revision, **sizes)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{base}: not a SAM v1 checkpoint with a processor: {str(error).splitlines()[0]}") from error
    side, expected = processor.image_processor.size["longest_edge"], model.config.vision_config.image_size
    if side != expected:
        raise ModelError(f"{base}: the processor resizes to {side} pixels, but the model expects {expected}.")
    return model, processor


def four_bits(bf16: bool) -> BitsAndBytesConfig:
    """QLoRA's settings (https://arxiv.org/abs/2305.14314); the mask decoder is small and stays in full precision."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=["mask_decoder"],
    )


def make_trainable(
    model: PreTrainedModel, settings: ModelSettings, commit: str | None = None
) -> PreTrainedModel | PeftModel:
    """Freezes everything except what `settings` train. Returns `model`, wrapped in a `PeftModel` for LoRA.

    The adapter names the base, by its absolute path or its Hub id (or `base_model`), and there its `commit`.

    Raises:
        ModelError: If it has no such layers.
    """
    if settings.method == "lora":
        model = get_peft_model(model, lora_config(model, settings))
        config = model.peft_config["default"]
        config.revision = commit or settings.revision
        if settings.base_model:
            config.base_model_name_or_path = settings.base_model
        elif Path(settings.base).is_dir():
            config.base_model_name_or_path = str(Path(settings.base).resolve())
        return model
    model.requires_grad_(False)
    model._keys_to_ignore_on_save = list(model._tied_weights_keys)  # Trainer would warn of them when it loads the best
    if settings.method == "full":
        model.vision_encoder.requires_grad_(True)
    if settings.method == "decoder" or settings.train_decoder == "full":
        model.mask_decoder.requires_grad_(True)
    return model


def lora_config(model: PreTrainedModel, settings: ModelSettings) -> LoraConfig:
    """The adapters' configuration; PEFT names the base model in it.

    Raises:
        ModelError: If the vision encoder has no such layers.
    """
    targets = vision_targets(model, settings.target, settings.last_layers)
    if settings.train_decoder == "lora":
        targets += ["q_proj", "v_proj"]  # names that only the decoder has
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=decoder_modules(model) if settings.train_decoder == "full" else None,
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        task_type="FEATURE_EXTRACTION",  # without it, PEFT saves the hashed name of a cached code file
    )


def vision_targets(model: PreTrainedModel, names: Sequence[str], last_layers: int | None) -> list[str]:
    """Returns the value of PEFT's `target_modules`: short names where they are unambiguous, otherwise full paths.

    `layers_to_transform` cannot be used: it would also select decoder layers.

    Raises:
        ModelError: If the encoder has fewer layers, or no such Linears.
    """
    num_layers = model.config.vision_config.num_hidden_layers
    if last_layers is not None and not 1 <= last_layers <= num_layers:
        raise ModelError(f"--last-layers {last_layers}: the vision encoder has {num_layers} layers.")
    paths: dict[str, list[str]] = {name: [] for name in names}
    for path, module in model.named_modules():
        match = re.fullmatch(r"vision_encoder\.layers\.(\d+)\.(?:\w+\.)*(\w+)", path)
        if not match or not isinstance(module, torch.nn.Linear):
            continue
        if match[2] in paths and int(match[1]) >= num_layers - (last_layers or num_layers):
            paths[match[2]].append(path)
    if missing := [name for name in names if not paths[name]]:
        raise ModelError(f"--target {' '.join(missing)}: expected some of q, k, v, proj, lin1, lin2.")
    if last_layers is None and set(names) <= ONLY_IN_LAYERS:
        return list(names)
    return [path for name in paths for path in paths[name]]


def decoder_modules(model: PreTrainedModel) -> list[str]:
    """Returns the decoder's leaf modules, because PEFT 0.18 cannot wrap the whole decoder."""
    return [
        f"mask_decoder.{path}"
        for path, module in model.mask_decoder.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]


def trained(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns the trained model in `folder`: its adapter merged into the fresh base `model`, or the whole model."""
    if (folder / "adapter_config.json").exists():
        return with_adapter(model, folder).merge_and_unload()
    return split_class().from_pretrained(folder)


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
    try:
        config = PeftConfig.from_pretrained(adapter, revision=adapter_revision)
    except (OSError, *MALFORMED) as error:
        raise ModelError(f"{adapter}: not an adapter: {one_line(error):.300}") from error
    if base is None:
        base, revision = config.base_model_name_or_path, revision or config.revision
    if not base or not isinstance(base, str):
        raise ModelError(f"{adapter} does not name the model that it was trained on: give it with --base.")
    image_size = image_size or SegmentationSettings.load(adapter, adapter_revision).image_size
    model, processor = load_base(base, revision, image_size=image_size)
    try:
        return with_adapter(model, adapter, adapter_revision), processor
    except (OSError, RuntimeError, SafetensorError, *MALFORMED) as error:
        raise ModelError(f"{adapter}: does not fit {base}, or is damaged: {one_line(error):.300}") from error
