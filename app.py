"""Opens a page on this machine, on which a click on an object shows its mask.

python app.py
python app.py --adapter build/finetune/adapter --images photos
"""

import argparse
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("app"):
    from transformers.utils import logging

    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.quiet import quiet
    from segmentation.settings import add_arguments, add_reading_arguments, changes_of


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with needs("app"):  # only now, as it takes some seconds
        from webapp.model import ModelSource
        from webapp.serving import serve

    with quiet(), one_line_errors(ValueError):
        source = ModelSource(args.base, args.revision, args.adapter, args.adapter_revision, changes_of(args))
        serve(source, args.images, args.port)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder or Hub id of a SAM v1 (the adapter's, or sam-tiny)")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    parser.add_argument("--adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--adapter-revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--images", type=Path, help="folder of images to choose from (the coins)")
    parser.add_argument("--port", type=int, help="port of the page (a free one from 7860)")
    add_reading_arguments(add_arguments(parser))
    args = parser.parse_args(arguments)
    if args.port is not None and not 0 < args.port < 2**16:
        parser.error(f"--port {args.port}: expected a number from 1 to 65535.")
    if args.adapter_revision and not args.adapter:
        parser.error("--adapter-revision: expected --adapter, too.")
    if args.revision and not (args.base or args.adapter):
        parser.error("--revision: expected --base or --adapter, too.")
    if args.images and not args.images.is_dir():
        parser.error(f"--images {args.images}: expected a folder.")
    return args


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
