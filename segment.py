"""Segments an image, from points, from boxes, or everything in it.

python segment.py photo.png --point 120 80 --point 40 60 --output build/photo
python segment.py photo.png --box 10 20 200 180 --adapter build/finetune/adapter
python segment.py photo.png --everything --base build/finetune/merged
"""

import argparse
from pathlib import Path

from transformers.utils import is_torchvision_available

from checkpoint_tools.errors import one_line_errors
from checkpoint_tools.outputs import require_replaceable
from finetuning.images import read_image
from finetuning.segmentation import (
    PICTURE,
    check_prompts,
    everything,
    load,
    picture_paths,
    prompted,
    write_pictures,
)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with one_line_errors(ValueError, ImportError):
        for path in picture_paths(args.output):
            require_replaceable(path, PICTURE, args.force, sources=(args.image,))
        image = read_image(args.image)
        check_prompts(args.point, args.box, image)
        model, processor = load(args.base, args.revision, args.adapter)
        if args.everything:
            masks = everything(model, processor, image, args.grid, args.min_iou, args.min_stability)
        else:
            masks = prompted(model, processor, image, args.point, args.box, args.multimask)
        overlay_path, labels_path = write_pictures(image, masks, args.output, args.force)
    print(f"{len(masks)} objects: {overlay_path}, {labels_path}")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="PNG, JPEG or TIFF")
    for name, numbers, text in (
        ("--point", ("X", "Y"), "a point in an object; repeat the option for more objects"),
        ("--box", ("LEFT", "TOP", "RIGHT", "BOTTOM"), "the box of an object; repeat the option for more objects"),
    ):
        parser.add_argument(
            name, nargs=len(numbers), type=float, action="append", default=[], metavar=numbers, help=text
        )
    parser.add_argument("--everything", action="store_true", help="segment all objects, from a grid of points")
    parser.add_argument("--grid", type=int, default=32, help="points along a side of it")
    parser.add_argument("--min-iou", type=float, default=0.88, help="lowest predicted IoU (%(default)s)")
    parser.add_argument("--min-stability", type=float, default=0.95, help="lowest stability score (%(default)s)")
    parser.add_argument("--multimask", action="store_true", help="choose among three masks per prompt")
    parser.add_argument("--base", help="folder or Hub id of a SAM v1 (default: that of the adapter, or sam-tiny)")
    parser.add_argument("--revision", help="of the base, on the Hub")
    parser.add_argument("--adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--output", type=Path, default=Path("build/segment"), help="prefix of the output files")
    parser.add_argument("--force", action="store_true", help="replace pictures of an earlier run")
    args = parser.parse_args(arguments)
    if args.everything == bool(args.point or args.box):
        parser.error("expected --point, --box or --everything.")
    if args.point and args.box:
        parser.error("--point and --box are both given: expected one kind of prompt.")
    if args.everything and not is_torchvision_available():
        parser.error("--everything needs torchvision to remove duplicate masks: pip install torchvision.")
    return args


if __name__ == "__main__":
    main()
