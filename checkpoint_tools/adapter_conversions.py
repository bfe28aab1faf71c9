"""Turns LoRA adapters into other layouts, and measures that they do what they did."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, SamConfig, SamModel

from . import fused_adapters, meta_layout, micro_sam_adapters, samed_adapters, wrapped_checkpoints
from .base_provenance import SPLIT, STOCK, named_base
from .conversions import (
    accepted,
    allowed_difference,
    compare_with_files,
    effect_of,
    load_checked,
    note,
    note_other_adapters,
)
from .fetching import named_in
from .loading import as_split, model_type, processor_for
from .meta_adapters import MetaAdapter
from .output_comparison import example_outputs
from .output_folders import staged


def adapter_to_fused(
    source: str, destination: Path, base: str | None = None, base_model: str | None = None, force: bool = False
) -> float:
    """Writes a LoRA of `q`, `k`, `v` as the same LoRA of stock SAM's fused `qkv`; returns as `to_sam` does."""
    return convert_adapter(fused_adapters.to_fused, source, destination, base, base_model, force)


def adapter_to_split(
    source: str, destination: Path, base: str | None = None, base_model: str | None = None, force: bool = False
) -> float:
    """Writes a LoRA of stock SAM's fused `qkv` as the same LoRA of `q`, `k`, `v`; returns as `to_sam` does."""
    return convert_adapter(fused_adapters.to_split, source, destination, base, base_model, force)


def convert_adapter(
    convert: Callable[[fused_adapters.Adapter, PeftModel, PreTrainedModel], fused_adapters.Adapter],
    source: str,
    destination: Path,
    base: str | None,
    base_model: str | None,
    force: bool,
) -> float:
    """Applies `convert` to the adapter `source`, and compares both on `base` (by default the base it names).

    The new adapter names `base_model`, or what it was converted on.

    Raises:
        ValueError: If the adapter names no base, or the conversion is not exact.
    """
    with staged(destination, "adapter", force, sources=(source, base)) as folder:
        to_fused = convert is fused_adapters.to_fused
        adapter = fused_adapters.Adapter.load(source)
        adapter.require(fused_adapters.PROJECTIONS if to_fused else fused_adapters.FUSED)
        revision = None
        if not base:
            base, revision = named_in(adapter.config)
        if not base:
            raise ValueError(f"{source} does not name the model that it was trained on: give it with --base.")
        split, _ = load_checked(base, revision, complete=False)
        commit = named_base(base_model, split, STOCK if to_fused else SPLIT) if base_model else None
        stock = split.to_sam()
        model, target = (split, stock) if to_fused else (stock, split)
        adapter.check_fits(adapter.part_of(model), base)
        note_other_adapters(source)
        adapted = fused_adapters.with_adapter(adapter.part_of(model), source)
        expected, effect = effect_of(adapted, model, target)
        converted = convert(adapter, adapted, adapter.part_of(target))
        if base_model:
            base, revision = base_model, commit
        elif to_fused and model_type(base, revision) != SamConfig.model_type:
            converted.notes.append(
                f"base_model_name_or_path is left out, because {base} is split. The new adapter fits its stock "
                "version (convert.py to-sam). If that is on the Hub, name it with --base-model."
            )
            base = revision = None
        converted.config |= {"base_model_name_or_path": base, "revision": revision}
        converted.save(folder)
        for message in converted.notes:
            note(message)
        fused_adapters.with_adapter(adapter.part_of(target), folder).to(model.dtype)
        return accepted(example_outputs(target), expected, allowed_difference(effect))


def from_samed(
    file: Path,
    destination: Path,
    base: str,
    layers: Sequence[int] | None = None,
    base_output: Path | None = None,
    image_size: int | None = None,
    base_model: str | None = None,
    force: bool = False,
) -> float:
    """Writes a LoRA file of SAMed as an adapter of `q` and `v`, with the decoder where the file holds it.

    Args:
        file: What SAMed's `save_lora_parameters()` wrote.
        destination: The folder to write.
        base: The model that training began with, split or stock.
        layers: The adapted blocks, if not all are.
        base_output: A folder for another base with the decoder of the file, for any number of classes. The adapter is
            then one of that model.
        image_size: Side of the training images, if SAMed resized the base for them; needs `base_output`.
        base_model: The Hub id that the adapter is to name, of a split model like its base.
        force: Whether earlier outputs are replaced.

    Returns:
        The relative error, like `to_sam`.

    Raises:
        ValueError: If the options contradict each other, or the file does not fit the base.
    """
    if image_size is not None and base_output is None:
        raise ValueError("--image-size changes the base: give a folder for the new one with --base-output.")
    if base_output is not None and base_output.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"--base-output {base_output} lies in {destination}, which is the adapter: choose another.")
    with ExitStack() as stack:
        folder = stack.enter_context(staged(destination, "adapter", force, sources=(file, base)))
        checkpoint = read_checkpoint(file)
        split, _ = load_checked(base)
        meta_adapter = samed_adapters.read(checkpoint.weights, split.config.vision_config.num_hidden_layers, layers)
        if base_output is not None:
            base_folder = stack.enter_context(staged(base_output, "split model", force, sources=(file, base)))
            split = write_base(samed_adapters.base_of(split.to_sam(), meta_adapter.weights, image_size), base_folder)
            processor_for(split.config, image_mean=[0.0] * 3, image_std=[1.0] * 3).save_pretrained(base_folder)
        base = base if base_output is None else str(base_output)
        where = f"as in {base_output}" if base_output else "unless your base has them already"
        note(f"SAMed trains on images of 0 to 1: use a processor with image_mean=0 and image_std=1, {where}.")
        return write_adapter(meta_adapter, split, base, folder, base_model)


def from_micro_sam(
    file: Path,
    destination: Path,
    base: str | None = None,
    decoder_heads: int | None = None,
    base_model: str | None = None,
    force: bool = False,
) -> float:
    """Writes a LoRA or FacT checkpoint of micro-sam as an adapter, and the model that it is for.

    Args:
        file: A checkpoint such as micro-sam's `best.pt`.
        destination: The folder to write: the adapter to `adapter`, and the base in the file to `base`.
        base: A model to use instead of the one in the file; weights of the decoder that differ go to the adapter.
        decoder_heads: Attention heads of the decoder, if it is not Meta's.
        base_model: The Hub id that the adapter is to name, of a split model like its base.
        force: Whether an earlier output is replaced.

    Returns:
        The relative error, like `to_sam`.
    """
    with staged(destination, "adapter and base", force, sources=(file, base)) as folder:
        meta_adapter = micro_sam_adapters.read(read_checkpoint(file).weights)
        if base is None:
            split = write_base(meta_layout.sam_from_meta(meta_adapter.weights, decoder_heads), folder / "base")
            processor_for(split.config).save_pretrained(folder / "base")
        else:
            split, _ = load_checked(base)
        (folder / "adapter").mkdir()
        return write_adapter(meta_adapter, split, base or str(destination / "base"), folder / "adapter", base_model)


def read_checkpoint(file: Path) -> wrapped_checkpoints.MetaCheckpoint:
    """Returns what `file` holds, and prints what was stripped."""
    checkpoint = wrapped_checkpoints.read(file)
    for message in checkpoint.notes:
        note(message)
    return checkpoint


def write_base(model: SamModel, folder: Path) -> PreTrainedModel:
    """Writes `model` as a split model and returns what is read back, in fp32."""
    as_split(model).save_pretrained(folder)
    compare_with_files(model, folder)
    return load_checked(str(folder))[0]


def write_adapter(
    meta_adapter: MetaAdapter, split: PreTrainedModel, base: str, folder: Path, base_model: str | None = None
) -> float:
    """Writes an adapter of `split`, and compares it with stock SAM to which the update was added by definition."""
    adapter = meta_adapter.adapter(split, base)
    if base_model:
        adapter.config |= {"base_model_name_or_path": base_model, "revision": named_base(base_model, split)}
    adapter.save(folder)
    plain, defined = split.to_sam(), meta_adapter.applied(split)
    expected, effect = effect_of(defined, defined, plain)
    fused_adapters.with_adapter(split, folder).to(defined.dtype)
    return accepted(example_outputs(split), expected, allowed_difference(effect))
