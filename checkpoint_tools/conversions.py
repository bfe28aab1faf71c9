"""Turns SAM checkpoints into other layouts, and measures that they give the masks of their source.

Each source is read a second time without the code that converts it: tensor by tensor, and by stock `SamModel` or by
Meta's own model.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SamConfig, SamModel

from . import meta_layout, meta_model, wrapped_checkpoints
from .checkout import split_class
from .config_files import keep_known_settings, read_processor
from .errors import well_formed
from .fetching import fetch
from .fused_adapters import read_config, require_adapter, with_adapter
from .loading import as_split, load, model_type, processor_for, processor_sizes
from .messages import listing, name_of
from .output_comparison import Outputs, OutputsDifferError, compare, example_outputs, largest_relative_error
from .output_folders import mark_archive, staged, staged_file
from .verification import TIED, Weights, compare_weights, split_weights, stock_model
from .wrapped_checkpoints import check_finite


TOLERANCE = 1e-4  # relative to the largest output: fp32 rounds differently in another order
SHARE = 0.01  # of an adapter's own effect, by which the outputs may differ
CLEAR_EFFECT = 1e-3  # of which fp32 can tell that share from its rounding
NO_EFFECT = 1e-9  # fp64 rounds more than this


def to_sam(
    source: str, destination: Path, adapter: str | None = None, dtype: str | None = None, force: bool = False
) -> float:
    """Writes the split model `source`, with a PEFT `adapter` on it merged, as a stock `SamModel`.

    Args:
        source: Folder or Hub id of a split or stock model.
        destination: The folder to write.
        adapter: Folder or Hub id of an adapter for it.
        dtype: The name of the dtype to write, by default that of `source`.
        force: Whether an earlier output is replaced.

    Returns:
        The largest absolute difference between the outputs of the written model and of `source`, relative to the
        largest output.
    """
    with staged(destination, "stock model", force, sources=(source, adapter)) as folder:
        model, plain, stored, sizes = load_at_side_of(adapter, source)
        target = getattr(torch, dtype) if dtype else stored
        if adapter is None:
            expected, tolerance = example_outputs(plain), TOLERANCE
            merged = model
        else:
            note_other_adapters(adapter)
            adapted = with_adapter(model, adapter)
            expected, effect = effect_of(adapted, model, plain)
            tolerance = allowed_difference(effect)
            merged = adapted.merge_and_unload()
        sam = merged.to_sam()
        exact = target.itemsize >= sam.dtype.itemsize or (adapter is None and target == stored)
        if not exact:  # what rounding does is told below, and must not hide anything else
            accepted(example_outputs(sam), expected, tolerance)
        computed = sam.dtype
        check_finite(sam.to(target).state_dict(), f"In {name_of(target)}, the model", "give --dtype float32")
        sam.save_pretrained(folder)
        keep_known_settings(folder)
        copy_processor(source, folder, sam.config, sizes)
        compare_with_files(sam, folder)
        written = example_outputs(SamModel.from_pretrained(folder, dtype=computed))
        if exact:
            return accepted(written, expected, tolerance)
        error = largest_relative_error(written, expected)
        if target.itemsize >= torch.float32.itemsize and error <= tolerance:
            return error
        share = f", which is {error / effect:.0%} of the adapter's own effect" if adapter and effect else ""
        remedy = "" if target == torch.float32 else " --dtype float32 avoids that."
        note(f"Rounding to {name_of(target)} changes the outputs by {error:.1e} (relative){share}.{remedy}")
        return error


def to_split(source: str, destination: Path, force: bool = False) -> float:
    """Writes the stock model `source` as a split model with its code; returns the relative error, like `to_sam`.

    Raises:
        ValueError: If the source is not a stock SAM, or the result differs from it.
    """
    with staged(destination, "split model", force, sources=(source,)) as folder:
        if model_type(source) != SamConfig.model_type:
            raise ValueError(f"{source}: expected a stock SAM (model_type 'sam'), got {model_type(source)!r}.")
        with well_formed(source):
            model = split_class().from_pretrained(source)
        check_finite(model.state_dict(), source)
        model.save_pretrained(folder)
        keep_known_settings(folder)
        copy_processor(source, folder, model.config)
        compare_weights(folder, fetch(source))
        return accepted(example_outputs(load(str(folder))[0].float()), example_outputs(stock_model(fetch(source))))


def from_meta(
    file: Path,
    destination: Path,
    stock: bool = False,
    decoder_heads: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    rescale: str | None = None,
    force: bool = False,
) -> float:
    """Writes a checkpoint in Meta's layout, as trainers save it, as a split or `stock` model.

    Args:
        file: Weights of `segment_anything`, see `wrapped_checkpoints`.
        destination: The folder to write.
        stock: Whether to write a stock `SamModel`.
        decoder_heads: Attention heads of the decoder, if it is not Meta's.
        image_mean: For each channel, what the processor subtracts from images of 0 to 1.
        image_std: What it then divides by.
        rescale: "min-max" if the model was trained on images that were each stretched to 0 to 1.
        force: Whether an earlier output is replaced.

    Returns:
        The relative error, like `to_sam`.
    """
    with staged(destination, "stock model" if stock else "split model", force, sources=(file,)) as folder:
        checkpoint = wrapped_checkpoints.read(file)
        for message in checkpoint.notes:
            note(message)
        model = meta_layout.sam_from_meta(checkpoint.weights, decoder_heads)
        (model if stock else as_split(model)).save_pretrained(folder)
        settings, advice = normalization(checkpoint.normalization, image_mean, image_std, rescale)
        processor_for(model.config, **settings).save_pretrained(folder)
        if advice:
            note(advice)
        compare_with_files(model, folder)
        written = example_outputs(load(str(folder))[0].float())
        if meta_model.modeling():
            meta = meta_model.build(model.config, checkpoint.weights)
            return accepted(written, meta_model.example_outputs(meta, model.config))
        return accepted(written, example_outputs(model.float()))


def normalization(
    recorded: tuple[list[float], list[float]] | None,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
    rescale: str | None,
) -> tuple[dict[str, object], str | None]:
    """Returns the settings of the image processor, and what users must know about them.

    Args:
        recorded: `pixel_mean` and `pixel_std` of a checkpoint, for images of 0 to 255.
        image_mean: For images of 0 to 1.
        image_std: For the same.
        rescale: "min-max" for images that are stretched.

    Raises:
        ValueError: If a mean is not from 0 to 1, or a standard deviation not above 0 and up to 1.
    """
    for name, values in (("mean", image_mean), ("std", image_std)):
        if values and not all(0 <= value <= 1 and (value > 0 or name == "mean") for value in values):
            limits = "numbers from 0 to 1" if name == "mean" else "numbers above 0 and up to 1"
            raise ValueError(
                f"--image-{name} {' '.join(f'{value:g}' for value in values)}: expected {limits}, as images have "
                "values of 0 to 1: divide those of 0 to 255 by 255."
            )
    if rescale == "min-max":
        message = (
            "The processor divides by 255. The model expects each image stretched, so that its darkest value is 0 and "
            "its brightest 255: do that before you call it, because no setting of SamImageProcessor does."
        )
        return {"image_mean": image_mean or [0.0] * 3, "image_std": image_std or [1.0] * 3}, message
    if image_mean or image_std:
        return {"image_mean": image_mean or [0.0] * 3, "image_std": image_std or [1.0] * 3}, None
    if recorded == ([0.0] * 3, [1.0] * 3):
        return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}, (
            "pixel_mean is 0 and pixel_std is 1, so images are only divided by 255. If the model was trained on "
            "values up to 255, give --image-std 0.00392156862745098 (1/255) three times."
        )
    if recorded:
        mean, std = recorded
        return {"image_mean": [value / 255 for value in mean], "image_std": [value / 255 for value in std]}, None
    return {}, (
        "The file does not say how images were normalized. The processor has ImageNet's mean and std, as Meta's own "
        "models do; for a fine-tuned model that is a guess: see --image-mean, --image-std and --rescale."
    )


def to_meta(source: str, file: Path, force: bool = False) -> float:
    """Writes a split or stock model as a checkpoint in Meta's layout; returns the relative error, like `to_sam`.

    Raises:
        ValueError: If the file's name is that of another format, or the result differs from the source.
    """
    if file.suffix == ".safetensors":
        raise ValueError(f"{file}: to-meta writes as torch.save does: choose a name that ends in .pth.")
    with staged_file(file, "checkpoint in Meta's layout", force, sources=(source,)) as staged_path:
        model, dtype = load_checked(source)
        meta_layout.check_expressible(model.config)
        model = model.to_sam()
        decoder_heads = model.config.mask_decoder_config.num_attention_heads
        if decoder_heads != meta_layout.DECODER_HEADS:
            note(
                f"The decoder has {decoder_heads} attention heads, which Meta's layout does not record: build Meta's "
                f"TwoWayTransformer with num_heads={decoder_heads}, or convert back with "
                f"--decoder-heads {decoder_heads}."
            )
        torch.save(meta_layout.meta_from_sam(model.to(dtype)), staged_path)
        mark_archive(staged_path, "checkpoint in Meta's layout")
        weights = wrapped_checkpoints.read(staged_path).weights
        stock = stock_model(fetch(source))
        epsilon = model.config.mask_decoder_config.layer_norm_eps
        if epsilon != meta_layout.DECODER_LAYER_NORM_EPS:
            note(
                f"The decoder's layer_norm_eps is {epsilon}, and {meta_layout.DECODER_LAYER_NORM_EPS} in Meta's code. "
                "The comparison is made with Meta's."
            )
            for module in stock.mask_decoder.modules():
                if type(module) is nn.LayerNorm:
                    module.eps = meta_layout.DECODER_LAYER_NORM_EPS
        names, expected = meta_layout.names(model.config), stock.state_dict()
        compare_tensors(weights, {meta: expected[name] for name, meta in names.items()}, file)
        back = meta_layout.sam_from_meta(weights, decoder_heads)
        if meta_model.modeling():
            actual = meta_model.example_outputs(meta_model.build(back.config, weights), back.config)
        else:
            actual = example_outputs(back.float())
        return accepted(actual, example_outputs(stock))


def load_checked(
    source: str, revision: str | None = None, complete: bool = True
) -> tuple[PreTrainedModel, torch.dtype]:
    """Returns what `load` does, after comparing each weight with the files.

    Raises:
        ValueError: If a weight is not that of the files, or not finite.
    """
    model, dtype = load(source, revision, complete)
    check_finite(model.state_dict(), source)
    compare_with_files(model, fetch(source, revision))
    return model, dtype


def load_at_side_of(
    adapter: str | None, source: str
) -> tuple[PreTrainedModel, PreTrainedModel, torch.dtype, dict[str, Any]]:
    """Loads the model `source` for images of the side that `adapter` was trained at, if it tells, or else of its own.

    Returns:
        What `load_checked` does; between model and dtype the same without the split; and at another side than its own
        the sizes that its processor needs.
    """
    model, dtype = load_checked(source)
    side = trained_side(adapter) if adapter else None
    if side in (None, model.config.vision_config.image_size):
        return model, stock_model(fetch(source)), dtype, {}
    note(f"The result takes images of {side} pixels, on which the adapter was trained; {source} takes others.")
    model = split_class().from_pretrained(source, image_size=side).eval().to(model.dtype)
    return model, copy.deepcopy(model), dtype, processor_sizes(model.config)


def trained_side(adapter: str) -> int | None:
    """Returns the side of the images that an adapter was trained on, in pixels, if it brings its settings.

    Raises:
        ValueError: If there is no such adapter, or its settings are damaged.
    """
    require_adapter(adapter)
    file = fetch(adapter, weights=False) / "segmentation.json"
    return read_config(file).get("image_size") if file.exists() else None


def compare_with_files(model: PreTrainedModel, folder: Path) -> None:
    """Compares each weight of a split or stock model with the files in `folder`, without the code that loads them.

    Raises:
        ValueError: If the files lack a weight, have another value for it, or hold another one.
    """
    stored, expected = dict(split_weights(Weights(folder))), dict(split_weights(model.state_dict()))
    compare_tensors(stored, expected, folder)
    if unknown := stored.keys() - expected.keys():
        raise ValueError(f"{folder} holds weights that SAM does not have: {listing(unknown)}.")
    tied = [stored[name] for name in TIED if name in stored]
    if len(tied) > 1 and not torch.equal(*tied):
        raise ValueError(f"{folder} has two values for what is one weight in SAM: {' and '.join(TIED)}.")


def compare_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], source: Path) -> None:
    """Compares tensors bit for bit, whatever their dtypes; of two tied ones, `actual` may lack one.

    Raises:
        ValueError: If one is missing or different.
    """
    tied = {**meta_layout.TIED, **{value: key for key, value in meta_layout.TIED.items()}}
    different = []
    for name, tensor in expected.items():
        own = actual.get(name, actual.get(tied.get(name, name)))
        if own is None or own.shape != tensor.shape or not torch.equal(own.double(), tensor.double()):
            different.append(name)
    if different:
        raise ValueError(
            f"{source}: weights in the file are not those of the model: {listing(different)}. If the file has a wider "
            "dtype than its config.json says, correct `dtype` there."
        )


def effect_of(
    adapted: nn.Module, model: PreTrainedModel, plain: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], float]:
    """Returns the outputs of `model`, which holds an adapter, and by how much they differ from those of `plain`.

    Computes in fp32, and again in fp64 if the effect is so small that fp32 could hide a part of it.

    Args:
        adapted: What PEFT returned for `model` or a part of it.
        model: The model whose modules are adapted in place.
        plain: The same model without an adapter, split or stock.

    Returns:
        The outputs, and the relative difference; 0 for an untrained adapter.
    """
    for dtype in (torch.float32, torch.float64):
        for module in (adapted, model, plain):
            module.to(dtype)
        expected = example_outputs(model)
        effect = largest_relative_error(expected, example_outputs(plain))
        if not effect < CLEAR_EFFECT:
            break
    if effect < NO_EFFECT:
        note("The adapter changes nothing, as if it were untrained: there is no effect to compare.")
        return expected, 0.0
    note(f"The adapter itself changes the outputs by {effect:.1e} (relative).")
    return expected, effect


def allowed_difference(effect: float) -> float:
    """Returns the relative difference that a conversion of an adapter may make."""
    return min(TOLERANCE, max(SHARE * effect, NO_EFFECT))


def accepted(actual: Outputs, expected: Outputs, tolerance: float = TOLERANCE) -> float:
    """Returns the largest relative error of an output.

    Raises:
        ValueError: If it is more than `tolerance`, or not a number.
    """
    if broken := [name for name, tensor in expected.items() if not tensor.isfinite().all()]:
        raise ValueError(f"The source itself gives NaN or infinity for {listing(broken)}. Nothing was written.")
    try:
        return compare(actual, expected, tolerance, reference="the source")
    except OutputsDifferError as error:
        raise ValueError(
            f"{error} Nothing was written. If the source works as it is, please report this as a bug."
        ) from error


def copy_processor(source: str, folder: Path, config: SamConfig, sizes: dict[str, Any] | None = None) -> None:
    """Copies the processor of `source`, with other `sizes` if any, and notes if there is none, or it does not fit."""
    try:
        processor = read_processor(source, **sizes or {})
    except ValueError as error:
        note(f"{error} The result has none: add preprocessor_config.json to use it with AutoProcessor.")
        return
    processor.save_pretrained(folder)
    side, expected = processor.image_processor.size.get("longest_edge"), config.vision_config.image_size
    if side != expected:
        note(f"The processor makes images of {side} pixels, and the model takes {expected}: correct its size.")


def note_other_adapters(adapter: str) -> None:
    """Notes which adapters lie in the folder of another one, as PEFT saves a model with several."""
    if others := sorted(path.parent.name for path in Path(adapter).glob("*/adapter_config.json")):
        note(f"Left out: {listing(others)}, which lies in {adapter} as an adapter of its own.")


def note(message: str) -> None:
    """Prints a note about the result."""
    print(f"Note: {message}")
