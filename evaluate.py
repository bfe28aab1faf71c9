"""Evaluates an adapter on labelled images, before and after: with points, boxes, corrective clicks, and automatically.

python evaluate.py --adapter user/adapter --images photos --masks masks
python evaluate.py --adapter build/finetune/adapter

Without --images, it evaluates on the half of the coins that finetune.py holds out.
"""

import argparse
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("finetune"):
    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.quiet import quiet
    from finetuning.evaluation import EvaluationRequest, evaluate
    from finetuning.scoring import MODES
    from finetuning.segmentation_settings import add_arguments, changes_of
    from finetuning.settings import DataSettings


FILES = ("images", "masks", "coco", "image_pattern", "mask_pattern", "color_masks", "categories", "validation")
DATASET = ("dataset", "dataset_config", "image_column", "mask_column", "split")
PIXELS = ("channels", "pages", "intensity", "max_pixels", "background", "void", "instances", "threshold", "turn_masks")
DATA = (*FILES, *DATASET, *PIXELS)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with quiet(), one_line_errors(ValueError):
        given = {name: getattr(args, name) for name in DATA if getattr(args, name) is not None}
        changes = changes_of(args)
        changes["intensity"] = args.intensity and " ".join(args.intensity)
        evaluate(
            EvaluationRequest(
                DataSettings(**given),
                args.held_out,
                args.adapter,
                args.model,
                args.base,
                args.revision,
                args.modes,
                args.clicks,
                args.output,
                args.force,
                args.push,
                changes,
            )
        )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--adapter", help="folder or Hub id of an adapter")
    group.add_argument("--model", help="folder or Hub id of a whole model, instead of an adapter")
    group.add_argument("--base", help="folder or Hub id of the model before (that of the adapter, or sam-tiny)")
    group.add_argument("--revision", help="of the base, on the Hub")

    group = parser.add_argument_group("data", "As in finetune.py.")
    group.add_argument("--images", type=Path, help="folder of images")
    group.add_argument("--masks", type=Path, help="folder of label images, named as the images")
    group.add_argument("--coco", type=Path, help="COCO annotations of the images, instead of masks")
    group.add_argument("--image-pattern", help="which files are images, as in {stem}_img.png")
    group.add_argument("--mask-pattern", help="how masks are named, as in {stem}_mask.png")
    group.add_argument("--color-masks", action="store_true", default=None, help="each colour but black is an object")
    group.add_argument("--categories", nargs="+", help="names of the COCO categories to use (all)")
    group.add_argument("--dataset", help="Hub id, folder or Parquet file of the datasets library, instead of files")
    group.add_argument("--dataset-config", help="configuration of the data set, if it has several")
    group.add_argument("--image-column", help="column with the images (image)")
    group.add_argument("--mask-column", help="column with label images, lists of masks, or objects as in COCO")
    group.add_argument("--split", help="split to evaluate on (train, or the only one)")
    group.add_argument("--held-out", action="store_true", help="only what finetune.py holds out for validation")
    group.add_argument("--validation", type=float, help="the share that it holds out, if not the default")
    group.add_argument("--channels", type=int, nargs="+", help="bands that are red, green and blue, from 1")
    group.add_argument("--pages", help="each, or the number of the page, from 1, of files with several")
    group.add_argument("--intensity", nargs="+", help="what becomes 0 and 255: percentile LOW HIGH, min-max or dtype")
    group.add_argument("--max-pixels", type=int, help="pixels of the largest image to decode")
    group.add_argument("--background", type=int, nargs="+", help="numbers of the background in masks (0)")
    group.add_argument("--void", nargs="+", help="numbers in masks of pixels without a label; or none")
    group.add_argument("--instances", choices=("labels", "components"), help="what is an object in a mask")
    group.add_argument("--threshold", type=int, help="lowest value of an object, in masks with soft edges")
    group.add_argument("--turn-masks", action="store_true", default=None, help="turn masks with their images")

    group = parser.add_argument_group("what to evaluate")
    group.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="all by default")
    group.add_argument("--clicks", type=int, default=8, help="most clicks on an object (%(default)s)")

    add_arguments(parser)

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, default=Path("build/evaluate"), help="folder for all results")
    group.add_argument("--force", action="store_true", help="replace what an earlier run wrote there")
    group.add_argument("--push", action="store_true", help="write the results into the adapter's card on the Hub")
    args = parser.parse_args(arguments)
    if args.adapter and args.model:
        parser.error("--adapter and --model are both given: expected one of them.")
    return args


if __name__ == "__main__":
    main()
