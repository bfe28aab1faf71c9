"""Turns a SAM v1 checkpoint into a model repo for others: stages it in a folder, verifies it, pushes it to the Hub.

python upload.py --base checkpoints/sam-tiny --output sam-tiny-split  # stages and verifies only
python upload.py --base facebook/sam-vit-base --repo-id USER/NAME     # and pushes
"""

import argparse
import errno
import os
import pickle
import sys
from pathlib import Path

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers.utils import logging

from checkpoint_tools.staging import one_line
from checkpoint_tools.uploading import Destination, upload


def main() -> None:
    args = parse_args()
    try:
        destination = args.repo_id and Destination(
            args.repo_id,
            commit_message=args.commit_message or f"Split {Path(args.base).resolve().name}",
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
        )
        upload(
            args.base,
            args.base_revision,
            args.output,
            destination,
            force=args.force,
            max_shard_size=args.max_shard_size,
            token_file=args.token_file,
            dry_run=args.dry_run,
        )
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the command again to continue: files already sent are skipped.")
    except (OSError, ValueError, RuntimeError, HTTPError, SafetensorError, pickle.UnpicklingError) as error:
        message = one_line(error)
        if os.strerror(errno.ENOSPC) in message:  # of whatever type: safetensors has its own
            message = "No space left on the disk: choose another with --output, TMPDIR or HF_HOME, and run again."
        sys.exit(message)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default="facebook/sam-vit-base", help="folder or Hub id of a SAM v1, stock or split (%(default)s)"
    )
    parser.add_argument("--base-revision", help="its branch, tag or commit")
    parser.add_argument("--output", type=Path, help="folder to keep what is staged in")
    parser.add_argument("--force", action="store_true", help="replace an earlier output in OUTPUT")
    parser.add_argument("--max-shard-size", default="5GB", help="size of weight files (%(default)s)")
    parser.add_argument("--repo-id", help="USER/NAME on the Hub to push to")
    parser.add_argument("--private", action="store_true", help="create the repo as a private one")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", help="branch to push to; created if missing (default: main)")
    target.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit-message", help="(Split BASE)")
    parser.add_argument("--token-file", type=Path, help="file with a token; else HF_TOKEN or that of `hf auth login`")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be pushed")
    args = parser.parse_args()
    if not args.output and not args.repo_id:
        parser.error("give --output to stage a model repo, --repo-id to push one, or both")
    if args.repo_id and args.repo_id.count("/") != 1:
        parser.error(f"--repo-id {args.repo_id}: expected USER/NAME")
    if args.dry_run and not args.repo_id:
        parser.error("--dry-run needs the --repo-id that would be pushed to; --output alone pushes nothing")
    return args


if __name__ == "__main__":
    logging.disable_progress_bar()  # of loading and saving; uploads show theirs
    logging.set_verbosity_error()  # errors report problems in one line
    main()
