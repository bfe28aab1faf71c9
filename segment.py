"""Segments images: from points, boxes or rough masks, or everything in them.

python segment.py photo.png --everything --adapter build/finetune/adapter
python segment.py photo.png --point 120 80 --not 40 60 --point 300 90
python segment.py photos --coco boxes.json --adapter user/adapter
"""

import argparse
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("finetune"):
    from transformers.utils import is_torchvision_available

    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.quiet import quiet
    from segmentation.segment_files import SegmentationRequest, segment_files
    from segmentation.segmenter import PromptedObject
    from segmentation.settings import OF_AUTOMATIC_MASKS, add_arguments, add_reading_arguments, changes_of


def main(arguments: list[str] | None = None) -> None:
    request = parse_args(arguments)
    with quiet(), one_line_errors(ValueError):
        segment_files(request)


def parse_args(arguments: list[str] | None = None) -> SegmentationRequest:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", help="PNG, JPEG, TIFF, BMP or WebP files, or folders of them")
    group = parser.add_argument_group("what to segment")
    group.add_argument("--everything", action="store_true", help="find all objects, from a grid of points")
    for name, numbers, text in (
        ("--point", ("X", "Y"), "a point in an object; each --point and --box is a new object"),
        ("--box", ("LEFT", "TOP", "RIGHT", "BOTTOM"), "the box of an object"),
        ("--also", ("X", "Y"), "one more point in the last object"),
        ("--not", ("X", "Y"), "a point outside the last object"),
    ):
        group.add_argument(
            name, dest="prompts", nargs=len(numbers), type=float, action=Prompt, default=[], metavar=numbers, help=text
        )
    group.add_argument("--coco", type=Path, help="the boxes of COCO annotations, such as a detector's")
    group.add_argument("--masks", type=Path, help="rough masks to refine: a label image, or a folder of them")

    group = parser.add_argument_group("model")
    group.add_argument("--adapter", help="folder or Hub id of an adapter")
    group.add_argument("--base", help="folder or Hub id of a SAM v1 (the adapter's, or sam-tiny)")
    group.add_argument("--revision", help="branch, tag or commit of the base on the Hub")

    group = add_arguments(parser)
    add_reading_arguments(group)
    group.add_argument(
        "--pipeline",
        choices=("ours", "stock"),
        default="ours",
        help="stock: the mask-generation pipeline of transformers, for --everything; it cleans no masks, and finds "
        "duplicates by their boxes (%(default)s)",
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("build/segment"), help="folder for all results (%(default)s)"
    )
    group.add_argument("--force", action="store_true", help="replace what an earlier run wrote there")
    group.add_argument("--table", action="store_true", help="also write objects.csv: area, box and scores")
    args = parser.parse_args(arguments)
    check(parser, args)
    return SegmentationRequest(
        args.images,
        args.prompts,
        args.coco,
        args.masks,
        args.everything,
        args.pipeline == "stock",
        args.table,
        args.output,
        args.force,
        args.base,
        args.revision,
        args.adapter,
        changes_of(args),
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits if arguments contradict each other, or would change nothing."""
    ways = [args.everything, bool(args.prompts), bool(args.coco), bool(args.masks)]
    if sum(ways) != 1:
        parser.error("expected one of --point and --box, --coco, --masks or --everything.")
    for name in OF_AUTOMATIC_MASKS:
        if getattr(args, name) is not None and not args.everything:
            parser.error(f"--{name.replace('_', '-')}: expected --everything, too.")
    if args.multimask and args.everything:
        parser.error("--multimask: expected no --everything, which takes three masks for each point.")
    if args.revision and not (args.base or args.adapter):
        parser.error("--revision: expected --base or --adapter, too.")
    if args.pipeline == "stock":
        given = [name for name in ("tile", "overlap", "max_overlap") if getattr(args, name) is not None]
        if not args.everything or given:
            parser.error("--pipeline stock: expected --everything, without --tile, --overlap and --max-overlap.")
        if not is_torchvision_available():
            parser.error("--pipeline stock: expected torchvision, which finds duplicates: pip install torchvision.")


class Prompt(argparse.Action):
    """Collects prompts, object by object, in the order of the command line."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001, D102
        objects = list(namespace.prompts)
        if option_string == "--box":
            objects.append(PromptedObject(box=values))
        elif option_string == "--point":
            objects.append(PromptedObject(points=[values], labels=[1]))
        elif not objects:
            parser.error(f"{option_string}: expected --point or --box before it.")
        else:
            last = objects[-1]
            labels = [*(last.labels or ()), int(option_string == "--also")]
            objects[-1] = PromptedObject([*last.points, values], labels, last.box)
        namespace.prompts = objects


if __name__ == "__main__":
    main()
