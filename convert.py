"""Turns SAM checkpoints and LoRA adapters into other layouts, exactly, and measures that they give the same masks.

python convert.py to-sam SPLIT STOCK --adapter ADAPTER
python convert.py from-meta sam_vit_b_01ec64.pth SPLIT
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("tools"):
    from transformers.utils import logging

    from checkpoint_tools.adapter_conversions import adapter_to_fused, adapter_to_split, from_micro_sam, from_samed
    from checkpoint_tools.conversions import from_meta, to_meta, to_sam, to_split
    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.onnx_export import INTERFACES, to_onnx
    from checkpoint_tools.quiet import quiet


DTYPES = ("float32", "float16", "bfloat16")


MODEL, ADAPTER = (str, "folder or Hub id of a model"), (str, "folder or Hub id of a LoRA adapter")
FOLDER, META_FILE = (Path, "folder to write"), (Path, "checkpoint in Meta's layout, such as sam_vit_b_01ec64.pth")


def parse_args() -> argparse.Namespace:
    """Returns the function that the command names, and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_model_commands(commands)
    add_adapter_commands(commands)
    return parser.parse_args()


def add_model_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands that convert whole models."""
    command = add(commands, to_sam, "split model to stock SamModel", source=MODEL, destination=FOLDER)
    command.add_argument("--adapter", help="folder or Hub id of a PEFT adapter to merge")
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the weights to write (that of SOURCE)")
    add(commands, to_split, "stock SamModel to split model", source=MODEL, destination=FOLDER)
    command = add(commands, from_meta, "Meta's layout to split model", file=META_FILE, destination=FOLDER)
    command.add_argument("--stock", action="store_true", help="write a stock SamModel instead")
    command.add_argument(
        "--decoder-heads", type=int, help="attention heads of the decoder, which no file records (Meta's 8)"
    )
    for name, other in (("mean", "0 beside --image-std"), ("std", "1 beside --image-mean")):
        summary = f"{name} of the training images, for values of 0 to 1 (the file's, or ImageNet's; {other})"
        command.add_argument(f"--image-{name}", nargs=3, type=float, metavar=("R", "G", "B"), help=summary)
    command.add_argument(
        "--rescale", choices=["min-max"], help="min-max if each training image was stretched to 0 to 1, as by MedSAM"
    )
    add(
        commands,
        to_meta,
        "split or stock model to Meta's layout",
        source=MODEL,
        file=(Path, "file to write, such as sam.pth"),
    )
    summary = "split or stock model to ONNX: an encoder and a decoder"
    command = add(commands, to_onnx, summary, source=MODEL, destination=FOLDER)
    command.add_argument(
        "--interface", choices=INTERFACES, default="transformers", help="tools that the files are for (%(default)s)"
    )
    command.add_argument("--adapter", help="folder or Hub id of a PEFT adapter to merge")
    command.add_argument(
        "--dtype", choices=DTYPES[:2], default="float32", help="dtype of the weights, not of the inputs (%(default)s)"
    )
    command.add_argument(
        "--all-masks", action="store_true", help="for --interface sam: return all four masks, not one of them"
    )


def add_adapter_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands that convert adapters."""
    for function, summary, kind in (
        (adapter_to_fused, "LoRA of q, k, v to LoRA of stock SAM's qkv", "stock"),
        (adapter_to_split, "LoRA of stock SAM's qkv to LoRA of q, k, v", "split"),
    ):
        command = add(commands, function, summary, source=ADAPTER, destination=FOLDER)
        command.add_argument("--base", help="model that it was trained on, split or stock (the one that it names)")
        add_base_model(command, kind)
    file = (Path, "file that SAMed's save_lora_parameters() wrote")
    command = add(commands, from_samed, "LoRA of SAMed or Sam_LoRA to LoRA of q, v", file=file, destination=FOLDER)
    command.add_argument("--base", required=True, help="model that training began with, split or stock")
    command.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="numbers of the adapted blocks, from 0 (all)"
    )
    command.add_argument(
        "--base-output", type=Path, metavar="FOLDER", help="folder for another base, with the file's decoder"
    )
    command.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="image side of that base, which is resized as SAMed does"
    )
    add_base_model(command)
    file = (Path, "checkpoint of micro-sam, such as best.pt")
    summary = "LoRA or FacT of micro-sam to LoRA, and its base"
    command = add(commands, from_micro_sam, summary, file=file, destination=FOLDER)
    command.add_argument("--base", help="model to use as base instead of the one in FILE")
    command.add_argument(
        "--decoder-heads", type=int, help="attention heads of the decoder, which no file records (Meta's 8)"
    )
    add_base_model(command)


def add(
    commands: argparse._SubParsersAction, function: Callable[..., float], summary: str, **paths: tuple[type, str]
) -> argparse.ArgumentParser:
    """Adds a command that calls `function`, with the type and the description of each path, and returns it."""
    command = commands.add_parser(function.__name__.replace("_", "-"), help=summary, description=summary)
    command.set_defaults(function=function)
    for name, (kind, description) in paths.items():
        command.add_argument(name, type=kind, metavar=name.upper(), help=description)
    command.add_argument("--force", action="store_true", help="replace an earlier output of the same kind")
    return command


def add_base_model(command: argparse.ArgumentParser, kind: str = "split") -> None:
    """Adds the option for the base that a new adapter names."""
    summary = f"Hub id of a {kind} model equal to the base, for the new adapter to name"
    command.add_argument("--base-model", metavar="USER/NAME", help=summary)


def main() -> None:
    """Runs one command."""
    logging.disable_progress_bar()
    arguments = vars(parse_args())
    function = arguments.pop("function")
    source = arguments.get("source", arguments.get("file"))
    with quiet(), one_line_errors(ValueError, RuntimeError, prefix=f"convert.py: cannot convert {source}: "):
        error = function(**arguments)
    written = arguments.get("destination", arguments.get("file"))
    difference = f"differ by {error:.1e}, relative to the largest" if error else "are equal"
    print(f"Wrote {written}. Masks and scores for a fixed image {difference}.")


if __name__ == "__main__":
    main()
