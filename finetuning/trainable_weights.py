"""What of a split SAM is trained: adapters of its vision encoder, its mask decoder, or all of its weights."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from checkpoint_tools.checkout import split_class
from checkpoint_tools.fused_adapters import with_adapter
from segmentation.adapted_model import ModelError

from .recipe_settings import ModelSettings


ONLY_IN_LAYERS = {"q", "k", "v"}  # proj, lin1 and lin2 also exist in the decoder


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
        raise ModelError(f"--last-layers {last_layers}: expected 1 to {num_layers}, the layers of the vision encoder.")
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
