"""Evaluates an adapter on labelled images, before and after: with points, boxes, corrective clicks, and automatically.

python evaluate.py --adapter user/adapter --images photos --masks masks
python evaluate.py --adapter build/finetune/adapter

Without --images, it evaluates on the half of the coins that finetune.py holds out.
"""

import argparse
from dataclasses import fields, make_dataclass
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("finetune"):
    from transformers import HfArgumentParser

    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.quiet import quiet
    from evaluation.evaluate_models import EvaluationRequest, evaluate
    from evaluation.scoring import AUTOMATIC, CLICKS, MODES
    from finetuning.command_line import HelpFormatter
    from image_data.data_settings import DataSettings
    from image_data.pillow_images import ImageReading
    from segmentation.settings import OF_AUTOMATIC_MASKS, add_arguments, changes_of


FOR_TRAINING = {"augment", "min_area", "test_images", "test_masks", "test_coco", "test_split"}
OF_THE_MODEL = {"tile", "overlap"}  # among the settings that come with it
DataOptions = make_dataclass(
    "DataOptions",
    [
        (field.name, field.type, field)
        for field in fields(DataSettings)
        if field.name not in FOR_TRAINING | OF_THE_MODEL
    ],
    namespace={"_argument_group_name": "data, as in finetune.py"},
)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with quiet(), one_line_errors(ValueError):
        given = {field.name: getattr(args, field.name) for field in fields(DataOptions)}
        evaluate(
            EvaluationRequest(
                DataSettings(**{name: value for name, value in given.items() if value is not None}),
                args.held_out,
                args.seed,
                args.adapter,
                args.model,
                args.base,
                args.revision,
                args.modes,
                EvaluationRequest.clicks if args.clicks is None else args.clicks,
                args.output,
                args.force,
                args.push,
                changes_of(args),
            )
        )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    usage = "%(prog)s [--option value ...]"
    parser = HfArgumentParser(DataOptions, usage=usage, description=__doc__, formatter_class=HelpFormatter)
    parser.set_defaults(**dict.fromkeys(field.name for field in fields(ImageReading)))  # else those of the model
    group = parser.add_argument_group("model")
    group.add_argument("--adapter", help="folder or Hub id of an adapter")
    group.add_argument("--model", help="folder or Hub id of a whole model, instead of an adapter")
    group.add_argument("--base", help="folder or Hub id of the model before (the adapter's base, or sam-tiny)")
    group.add_argument("--revision", help="branch, tag or commit of the base on the Hub")

    group = parser.add_argument_group("what to evaluate")
    group.add_argument(
        "--held-out", action="store_true", help="evaluate on what finetune.py holds out for validation only"
    )
    group.add_argument("--seed", type=int, help="seed of finetune.py, which chose what is held out (0)")
    group.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="ways to prompt; automatic is without prompts"
    )
    group.add_argument("--clicks", type=int, help="clicks on each object, in all (8)")

    add_arguments(parser)

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, default=Path("build/evaluate"), help="folder for all results")
    group.add_argument("--force", action="store_true", help="replace what an earlier run wrote there")
    group.add_argument(
        "--push", action="store_true", help="write the results into the card of the adapter or the model on the Hub"
    )
    args = parser.parse_args(arguments)
    if args.adapter and args.model:
        parser.error("--adapter and --model are both given: expected one of them.")
    if args.revision and not (args.base or args.adapter):
        parser.error("--revision: expected --base or --adapter, too.")
    for mode, names in ((CLICKS, ("clicks",)), (AUTOMATIC, OF_AUTOMATIC_MASKS)):
        for name in names:
            if getattr(args, name) is not None and mode not in args.modes:
                parser.error(f"--{name.replace('_', '-')}: expected --modes {mode}, too.")
    return args


if __name__ == "__main__":
    main()
