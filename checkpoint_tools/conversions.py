"""Turns SAM checkpoints and LoRA adapters into other layouts, and measures that they give the same masks."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoProcessor, PreTrainedModel, SamConfig, SamModel

from . import adapters, meta_layout, onnx_export
from .comparison import Outputs, OutputsDifferError, compare, example_outputs, largest_relative_error
from .loading import as_split, load, model_type, processor_for
from .outputs import mark_archive, staged, staged_file
from .staging import split_class


def to_sam(source: str, destination: Path, adapter: str | None = None, force: bool = False) -> float:
    """Writes the split model `source`, with a PEFT `adapter` on it merged, as a stock `SamModel`.

    Returns:
        The largest absolute difference between the outputs of the written model and of `source`, relative to the
        largest output.
    """
    with staged(destination, "stock model", force, sources=(source, adapter)) as folder:
        model, dtype = load(source)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
            expected = example_outputs(model)
            model = model.merge_and_unload()
        else:
            expected = example_outputs(model)
        model.to_sam().to(dtype).save_pretrained(folder)
        copy_processor(source, folder)
        return checked(SamModel.from_pretrained(folder, dtype=torch.float32), expected, dtype)


def to_split(source: str, destination: Path, force: bool = False) -> float:
    """Writes the stock model `source` as a split model with its code; returns the relative error, like `to_sam`."""
    with staged(destination, "split model", force, sources=(source,)) as folder:
        if model_type(source) != SamConfig.model_type:
            raise ValueError(f"{source}: expected a stock SAM (model_type 'sam'), got {model_type(source)!r}.")
        split_class().from_pretrained(source).save_pretrained(folder)
        copy_processor(source, folder)
        stock = SamModel.from_pretrained(source, dtype=torch.float32)
        model, dtype = load(str(folder))
        return checked(model, example_outputs(stock), dtype)


def from_meta(
    file: Path, destination: Path, stock: bool = False, decoder_heads: int = 8, force: bool = False
) -> float:
    """Writes a checkpoint in Meta's layout as a split or `stock` model; returns the relative error, like `to_sam`."""
    with staged(destination, "stock model" if stock else "split model", force, sources=(file,)) as folder:
        model = meta_layout.sam_from_meta(meta_layout.read(file), decoder_heads)
        dtype = model.dtype
        if stock:
            model.save_pretrained(folder)
        else:
            as_split(model).save_pretrained(folder)
        processor_for(model.config).save_pretrained(folder)
        return checked(load(str(folder))[0], example_outputs(model.float()), dtype)


def to_meta(source: str, file: Path, force: bool = False) -> float:
    """Writes a split or stock model as a checkpoint in Meta's layout; returns the relative error, like `to_sam`."""
    with staged_file(file, "checkpoint in Meta's layout", force, sources=(source,)) as staged_path:
        model, dtype = load(source)
        model = model.to_sam()
        torch.save(meta_layout.meta_from_sam(model.to(dtype)), staged_path)
        mark_archive(staged_path, "checkpoint in Meta's layout")
        expected = example_outputs(model.float())
        decoder_heads = model.config.mask_decoder_config.num_attention_heads
        if decoder_heads != meta_layout.DECODER_HEADS:
            note(
                f"The decoder has {decoder_heads} attention heads, which Meta's layout does not record: build Meta's "
                f"TwoWayTransformer with num_heads={decoder_heads}, or convert back with "
                f"--decoder-heads {decoder_heads}."
            )
        epsilon = model.config.mask_decoder_config.layer_norm_eps
        if epsilon != meta_layout.DECODER_LAYER_NORM_EPS:
            note(
                f"The decoder's layer_norm_eps is {epsilon}, and {meta_layout.DECODER_LAYER_NORM_EPS} in Meta's "
                "code; the difference below includes that."
            )
        back = meta_layout.sam_from_meta(meta_layout.read(staged_path), decoder_heads)
        return checked(back.float(), expected, dtype)


def to_onnx(source: str, destination: Path, force: bool = False) -> float:
    """Writes a split or stock model as ONNX files, in float32; returns the relative error, in onnxruntime."""
    with staged(destination, "ONNX model", force, sources=(source,)) as folder:
        model, _ = load(source)
        onnx_export.export(model, folder)
        copy_processor(source, folder)
        inputs = onnx_export.example_inputs(model, images=1, objects=2, points=1)  # other sizes than in export()
        return accepted(onnx_export.onnx_outputs(folder, inputs), onnx_export.model_outputs(model, inputs))


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
        base = base or adapter.config.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{source} does not name the model it was trained on: give it with --base.")
        split, _ = load(base)
        stock = split.to_sam()
        plain = example_outputs(stock)
        adapted = PeftModel.from_pretrained(split if to_fused else stock, source)
        target = stock if to_fused else split
        converted = convert(adapter, adapted, target)
        if to_fused and model_type(base) != SamConfig.model_type:
            converted.notes.append(
                f"base_model_name_or_path is left out, because {base} is split. The new adapter fits its stock "
                "version (convert.py to-sam)."
            )
            base = None
        converted.config["base_model_name_or_path"] = base
        converted.save(folder)
        for message in converted.notes:
            note(message)
        expected = example_outputs(adapted)
        effect = largest_relative_error(expected, plain)
        note(f"The adapter itself changes the outputs by {effect:.1e} (relative).")
        return checked(PeftModel.from_pretrained(target, folder), expected, torch.float32, 0.01 * effect)


def checked(
    model: PreTrainedModel | PeftModel, expected: Outputs, dtype: torch.dtype, tolerance: float = 1e-4
) -> float:
    """Returns the largest relative error of the model's outputs.

    Raises:
        ValueError: If it exceeds `tolerance` and the rounding error of `dtype`.
    """
    return accepted(example_outputs(model), expected, max(tolerance, 16 * torch.finfo(dtype).eps))


def accepted(actual: Outputs, expected: Outputs, tolerance: float = 1e-4) -> float:
    """Returns the largest relative error of an output.

    Raises:
        ValueError: If it is more than `tolerance`, and more than the rounding of outputs explains.
    """
    try:
        return compare(actual, expected, max(1e-5, tolerance), reference="the source")
    except OutputsDifferError as error:
        raise ValueError(
            f"{error} Nothing was written. If the source works as it is, please report this as a bug."
        ) from error


def copy_processor(source: str, folder: Path) -> None:
    """Copies the processor of `source`, or notes that it has none."""
    try:
        AutoProcessor.from_pretrained(source).save_pretrained(folder)
    except (OSError, ValueError):
        note(f"{source} has no processor: add preprocessor_config.json to use the result with AutoProcessor.")


def note(message: str) -> None:
    """Prints a note about the result."""
    print(f"Note: {message}")
