"""Fine-tunes Segment Anything on your own images, and writes an adapter, a merged model, or a stock SAM.

python finetune.py --images DIR --masks DIR --output DIR [--base facebook/sam-vit-base]
python finetune.py run.yaml --steps 500
accelerate launch --num_processes 2 finetune.py ...

Without --images, it trains sam-tiny on half of a photograph of coins. A YAML or JSON file gives options by name. Every
run writes such a file, run.yaml, that repeats it.
"""

import sys

from checkpoint_tools.packages import needs


with needs("finetune"):
    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.option_checks import SettingsError
    from checkpoint_tools.push_to_hub import PushError
    from checkpoint_tools.quiet import quiet
    from finetuning.command_line import parse
    from finetuning.recipe import finetune
    from finetuning.recipe_settings import Settings
    from image_data.pillow_images import DataError
    from segmentation.adapted_model import ModelError


INTERRUPTED = "Interrupted. The same command with --resume goes on from the last checkpoint."


def main(arguments: list[str] | None = None) -> None:
    settings = parse_args(arguments)
    with quiet(), one_line_errors(DataError, ModelError, SettingsError, PushError, interrupted=INTERRUPTED):
        finetune(settings)


def parse_args(arguments: list[str] | None = None) -> Settings:
    return parse(sys.argv[1:] if arguments is None else arguments, description=__doc__)


if __name__ == "__main__":
    main()
