"""Turns SAM checkpoints and LoRA adapters into other layouts, exactly, and measures that they give the same masks.

python convert.py to-sam SPLIT STOCK --adapter ADAPTER
python convert.py from-meta sam_vit_b_01ec64.pth SPLIT
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoProcessor, PreTrainedModel, SamConfig, SamModel, SamProcessor
from transformers.utils import logging

import adapters
import meta_checkpoints
import onnx_export
from staging import split_class, staged


def to_sam(source: str, destination: Path, adapter: str | None = None, force: bool = False) -> float:
    """Writes the split model `source`, with a PEFT `adapter` on it merged, as a stock `SamModel`.

    Returns:
        The largest difference of an output, of what is written and of `source`, as a part of the largest output.
    """
    with staged(destination, force) as folder:
        model, dtype = load(source)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
            expected = outputs(model)
            model = model.merge_and_unload()
        else:
            expected = outputs(model)
        model.to_sam().to(dtype).save_pretrained(folder)
        copy_processor(source, folder)
        return checked(SamModel.from_pretrained(folder, dtype=torch.float32), expected, dtype)


def to_split(source: str, destination: Path, force: bool = False) -> float:
    """Writes the stock model `source` as a split model with its code; returns the difference as `to_sam` does."""
    with staged(destination, force) as folder:
        if model_type(source) != SamConfig.model_type:
            raise ValueError(
                f"{source} holds a model of type {model_type(source)!r}, and only stock SAM ('sam') can be split."
            )
        split_class().from_pretrained(source).save_pretrained(folder)
        copy_processor(source, folder)
        stock = SamModel.from_pretrained(source, dtype=torch.float32)
        model, dtype = load(str(folder))
        return checked(model, outputs(stock), dtype)


def from_meta(
    file: Path, destination: Path, stock: bool = False, decoder_heads: int = 8, force: bool = False
) -> float:
    """Writes a checkpoint in Meta's layout as a split or `stock` model; returns the difference as `to_sam` does."""
    with staged(destination, force) as folder:
        model = meta_checkpoints.to_sam(meta_checkpoints.read(file), decoder_heads)
        dtype = model.dtype
        if stock:
            model.save_pretrained(folder)
        else:
            as_split(model).save_pretrained(folder)
        processor_for(model.config).save_pretrained(folder)
        return checked(load(str(folder))[0], outputs(model.float()), dtype)


def to_meta(source: str, file: Path, force: bool = False) -> float:
    """Writes a split or stock model as a checkpoint in Meta's layout; returns the difference as `to_sam` does."""
    if file.is_dir() or (file.exists() and not force):
        raise FileExistsError(f"{file} exists: choose another name, or replace a file with --force.")
    model, dtype = load(source)
    model = model.to_sam()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
        staged_file = Path(folder, file.name)
        torch.save(meta_checkpoints.from_sam(model.to(dtype)), staged_file)
        expected = outputs(model.float())
        decoder_heads = model.config.mask_decoder_config.num_attention_heads
        if decoder_heads != meta_checkpoints.DECODER_HEADS:
            note(
                f"The decoder has {decoder_heads} attention heads, which Meta's layout does not tell: build Meta's "
                f"TwoWayTransformer with num_heads={decoder_heads}, or come back with --decoder-heads {decoder_heads}."
            )
        epsilon = model.config.mask_decoder_config.layer_norm_eps
        if epsilon != meta_checkpoints.DECODER_LAYER_NORM_EPS:
            note(
                f"The decoder's layer_norm_eps is {epsilon}, and {meta_checkpoints.DECODER_LAYER_NORM_EPS} in Meta's "
                "code; the difference below includes that."
            )
        back = meta_checkpoints.to_sam(meta_checkpoints.read(staged_file), decoder_heads)
        found = checked(back.float(), expected, dtype)
        os.replace(staged_file, file)
    return found


def to_onnx(source: str, destination: Path, force: bool = False) -> float:
    """Writes a split or stock model as ONNX files, in float32; returns the difference, in onnxruntime, as `to_sam`."""
    with staged(destination, force) as folder:
        model, _ = load(source)
        onnx_export.export(model, folder)
        copy_processor(source, folder)
        inputs = onnx_export.example_inputs(model, images=1, objects=2, points=1)  # other sizes than in export()
        found = difference(onnx_export.outputs(folder, inputs), onnx_export.expected_outputs(model, inputs))
        return accepted(found)


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
    """Applies `convert` to the adapter `source`, and compares the two on the model `base` (the adapter's own)."""
    with staged(destination, force) as folder:
        to_fused = convert is adapters.to_fused
        adapter = adapters.Adapter.load(source)
        adapter.require(adapters.PROJECTIONS if to_fused else adapters.FUSED)
        base = base or adapter.config.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{source} does not name the model it was trained on: give it with --base.")
        split, _ = load(base)
        stock = split.to_sam()
        plain = outputs(stock)
        adapted = PeftModel.from_pretrained(split if to_fused else stock, source)
        target = stock if to_fused else split
        converted = convert(adapter, adapted, target)
        if to_fused and model_type(base) != SamConfig.model_type:
            converted.notes.append(
                f"base_model_name_or_path is left out: {base} is split, and the adapter now fits the stock model "
                "that to-sam makes of it."
            )
            base = None
        converted.config["base_model_name_or_path"] = base
        converted.save(folder)
        for message in converted.notes:
            note(message)
        expected = outputs(adapted)
        effect = difference(expected, plain)
        note(f"The adapter itself changes them by {effect:.1e}.")
        return checked(PeftModel.from_pretrained(target, folder), expected, torch.float32, 0.01 * effect)


def load(source: str) -> tuple[PreTrainedModel, torch.dtype]:
    """Returns the split or stock model `source` as a split model in float32, and the dtype that it is kept in.

    Raises:
        ValueError: If it is another model, or the vision encoder alone.
    """
    if model_type(source) not in (SamConfig.model_type, "sam_split"):
        raise ValueError(
            f"{source} holds a model of type {model_type(source)!r}: expected was a whole SAM, 'sam' or 'sam_split'."
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
    from transformers import SamImageProcessor  # which warns of a missing torchvision when imported

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


def copy_processor(source: str, folder: Path) -> None:
    """Copies the processor of `source`, if it has one."""
    try:
        AutoProcessor.from_pretrained(source).save_pretrained(folder)
    except (OSError, ValueError):
        note(f"{source} has no processor: add preprocessor_config.json to use the result with AutoProcessor.")


@torch.no_grad()
def outputs(model: PreTrainedModel | PeftModel) -> list[torch.Tensor]:
    """Returns the embeddings of a fixed image, and masks and scores from a point, and from a box with a mask."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    vision = model.config.vision_config
    side, grid = vision.image_size, vision.image_size // vision.patch_size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, vision.num_channels, side, side, generator=generator)
    mask = torch.randn(1, 1, 4 * grid, 4 * grid, generator=generator)
    embeddings = model.eval().get_image_embeddings(image)
    point = model(image_embeddings=embeddings, input_points=torch.tensor([[[[0.3 * side, 0.6 * side]]]]))
    box = model(
        image_embeddings=embeddings,
        input_boxes=torch.tensor([[[0.2 * side, 0.1 * side, 0.7 * side, 0.9 * side]]]),
        input_masks=mask,
        multimask_output=False,
    )
    return [embeddings, point.pred_masks, point.iou_scores, box.pred_masks, box.iou_scores]


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Returns the largest difference of an output, as a part of its largest value."""
    pairs = zip(actual, expected, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def checked(
    model: PreTrainedModel | PeftModel, expected: list[torch.Tensor], dtype: torch.dtype, limit: float = 1e-4
) -> float:
    """Returns the difference of the model's outputs from `expected`.

    Raises:
        ValueError: If it is more than `limit`, or what rounding explains, of the weights to `dtype` or of the outputs.
    """
    return accepted(difference(outputs(model), expected), max(limit, 16 * torch.finfo(dtype).eps))


def accepted(found: float, limit: float = 1e-4) -> float:
    """Returns the difference `found`.

    Raises:
        ValueError: If it is more than `limit`, and more than the rounding of outputs explains.
    """
    if not found <= max(1e-5, limit):
        raise ValueError(
            f"The result differs from the source by {found:.1e} of the largest output: nothing was written. If the "
            "source works as it is, please report this as a bug."
        )
    return found


def note(message: str) -> None:
    """Tells what the user of a result should know."""
    print(f"Note: {message}")


def parse_args() -> argparse.Namespace:
    """Returns the function that the command names, and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable[..., float], summary: str, **paths: tuple[type, str]) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__.replace("_", "-"), help=summary, description=summary)
        command.set_defaults(function=function)
        for name, (kind, description) in paths.items():
            command.add_argument(name, type=kind, metavar=name.upper(), help=description)
        command.add_argument("--force", action="store_true", help="replace what is there")
        return command

    model, adapter = (str, "folder or Hub id of a model"), (str, "folder or Hub id of a LoRA adapter")
    folder, file = (Path, "folder to write"), (Path, "a file as sam_vit_b_01ec64.pth")
    command = add(to_sam, "split model to stock SamModel", source=model, destination=folder)
    command.add_argument("--adapter", help="folder or Hub id of a PEFT adapter, to be merged")
    add(to_split, "stock SamModel to split model", source=model, destination=folder)
    command = add(from_meta, "Meta's layout to split model", file=file, destination=folder)
    command.add_argument("--stock", action="store_true", help="write a stock SamModel instead")
    command.add_argument("--decoder-heads", type=int, help="of another decoder than Meta's, which no file tells")
    add(to_meta, "split or stock model to Meta's layout", source=model, file=file)
    add(to_onnx, "split or stock model to ONNX: an encoder and decoders", source=model, destination=folder)
    for function, summary in (
        (adapter_to_fused, "LoRA of q, k, v to LoRA of stock SAM's qkv"),
        (adapter_to_split, "LoRA of stock SAM's qkv to LoRA of q, k, v"),
    ):
        command = add(function, summary, source=adapter, destination=folder)
        command.add_argument("--base", help="the model it was trained on, split or stock, if the adapter names none")
    return parser.parse_args()


def main() -> None:
    """Runs one command."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    arguments = vars(parse_args())
    function = arguments.pop("function")
    try:
        found = function(**arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        source = arguments.get("source", arguments.get("file"))
        sys.exit(f"convert.py: {source} was not converted: {' '.join(str(error).split())}")
    written = arguments.get("destination", arguments.get("file"))
    print(f"Wrote {written}. Masks and scores for a fixed image differ by {found:.1e} of the largest value.")


if __name__ == "__main__":
    main()
