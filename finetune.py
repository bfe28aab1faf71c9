"""Fine-tunes Segment Anything on your own images, and writes an adapter, a merged model, or a stock SAM.

python finetune.py --images DIR --masks DIR --output DIR [--base facebook/sam-vit-base]
accelerate launch --num_processes 2 finetune.py ...

Without --images, it trains sam-tiny on half of a photograph of coins.
"""

import argparse
import sys
from pathlib import Path

from finetuning.model import ModelError
from finetuning.prompts import KINDS
from finetuning.recipe import finetune
from finetuning.settings import AUGMENTATIONS, EXPORTS, LOSSES, METHODS, Settings, SettingsError
from finetuning.sources import DataError


def main(arguments: list[str] | None = None) -> None:
    settings = parse_args(arguments)
    try:
        finetune(settings)
    except (DataError, ModelError, SettingsError, FileExistsError) as error:
        sys.exit(str(error))


def parse_args(arguments: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of Settings
    )
    group = parser.add_argument_group("data")
    group.add_argument("--images", type=Path, help="folder of PNG, JPEG or TIFF images")
    group.add_argument("--masks", type=Path, help="folder of PNG or TIFF label images, named as the images")
    group.add_argument("--coco", type=Path, help="COCO annotations of the images, instead of masks")
    group.add_argument(
        "--validation", type=float, help="share held out for validation (0.2 of the images, or 0.5 of a single image)"
    )
    group.add_argument("--tile", type=int, help="cut images into tiles of so many pixels")
    group.add_argument("--overlap", type=float, help="overlap of neighbouring tiles, as a share of the tile side")
    group.add_argument("--min-area", type=int, help="smallest object, in pixels of the predicted masks")
    group.add_argument("--augment", choices=AUGMENTATIONS, help="crop also mirrors")
    group.add_argument("--workers", type=int, help="processes that prepare the data")

    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", choices=KINDS)
    group.add_argument("--points", type=int, help="points in each object")
    group.add_argument("--negative-points", type=int, help="points beside each object")
    group.add_argument("--objects", type=int, help="objects per image and training step")
    group.add_argument("--multimask", action="store_true", help="predict three masks per prompt, and train the best")

    group = parser.add_argument_group("model")
    group.add_argument("--base", help="folder or Hub id of a SAM v1, stock or split")
    group.add_argument("--revision", help="of the base, on the Hub")
    group.add_argument(
        "--method",
        choices=METHODS,
        help="adapters, all weights of the vision encoder, or those of the mask decoder alone",
    )
    group.add_argument("--target", nargs="+", help="Linears of the vision layers to adapt")
    group.add_argument("--rank", type=int)
    group.add_argument("--alpha", type=float)
    group.add_argument("--dropout", type=float)
    group.add_argument("--dora", action="store_true")
    group.add_argument("--rslora", action="store_true")
    group.add_argument("--last-layers", type=int, metavar="N", help="adapt the last N layers only")
    group.add_argument("--train-decoder", choices=("full", "lora"), help="the mask decoder too")
    group.add_argument("--load-in-4bit", action="store_true")

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int)
    group.add_argument("--minutes", type=float, help="time limit of training, in minutes")
    group.add_argument("--batch-size", type=int, help="images per process and batch")
    group.add_argument("--accumulate", type=int, help="batches of a step")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--loss", choices=LOSSES, help="beside dice")
    group.add_argument("--eval-every", type=int, metavar="STEPS", help="validate, and save a checkpoint")
    group.add_argument("--patience", type=int, help="validations without improvement before training stops")
    group.add_argument("--gradient-checkpointing", action="store_true")
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--seed", type=int)
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path)
    group.add_argument("--force", action="store_true", help="replace what an earlier run left in --output")
    group.add_argument("--export", nargs="+", choices=EXPORTS, help="whole models to write")
    group.add_argument("--push-to-hub", metavar="USER/NAME", help="upload what was trained to this model repo")
    options = vars(parser.parse_args(arguments))
    try:
        return Settings(**options)
    except SettingsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
