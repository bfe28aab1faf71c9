"""Turns LoRA adapters into other layouts, and measures that they do what they did."""

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, SamConfig

from . import adapters
from .comparison import example_outputs
from .conversions import accepted, allowed_difference, effect_of, load_checked, note
from .loading import model_type
from .outputs import staged


def adapter_to_fused(source: str, destination: Path, base: str | None = None, force: bool = False) -> float:
    """Writes a LoRA of `q`, `k`, `v` as the same LoRA of stock SAM's fused `qkv`; returns as `to_sam` does."""
    return convert_adapter(adapters.to_fused, source, destination, base, force)


def adapter_to_split(source: str, destination: Path, base: str | None = None, force: bool = False) -> float:
    """Writes a LoRA of stock SAM's fused `qkv` as the same LoRA of `q`, `k`, `v`; returns as `to_sam` does."""
    return convert_adapter(adapters.to_split, source, destination, base, force)


def convert_adapter(
    convert: Callable[[adapters.Adapter, PeftModel, PreTrainedModel], adapters.Adapter],
    source: str,
    destination: Path,
    base: str | None,
    force: bool,
) -> float:
    """Applies `convert` to the adapter `source`, and compares both on `base` (by default the base it names)."""
    with staged(destination, "adapter", force, sources=(source, base)) as folder:
        to_fused = convert is adapters.to_fused
        adapter = adapters.Adapter.load(source)
        adapter.require(adapters.PROJECTIONS if to_fused else adapters.FUSED)
        revision = None if base else adapter.config.get("revision")
        base = base or adapter.config.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{source} does not name the model it was trained on: give it with --base.")
        split, _ = load_checked(base, revision, complete=False)
        stock = split.to_sam()
        model, target = (split, stock) if to_fused else (stock, split)
        adapter.check_fits(adapter.part_of(model), base)
        adapted = PeftModel.from_pretrained(adapter.part_of(model), source)
        expected, effect = effect_of(adapted, model, target)
        converted = convert(adapter, adapted, adapter.part_of(target))
        if to_fused and model_type(base, revision) != SamConfig.model_type:
            converted.notes.append(
                f"base_model_name_or_path is left out, because {base} is split. The new adapter fits its stock "
                "version (convert.py to-sam)."
            )
            base = revision = None
        converted.config |= {"base_model_name_or_path": base, "revision": revision}
        converted.save(folder)
        for message in converted.notes:
            note(message)
        PeftModel.from_pretrained(adapter.part_of(target), folder).to(model.dtype)
        return accepted(example_outputs(target), expected, allowed_difference(effect))
