"""Turns a SAM v1 checkpoint into a model repo for others: stages it in a folder, verifies it, pushes it to the Hub.

python upload.py --base checkpoints/sam-tiny --output sam-tiny-split  # stages and verifies only
python upload.py --base facebook/sam-vit-base --repo-id USER/NAME     # and pushes
python upload.py --space USER/NAME --base USER/MODEL                  # pushes the page of app.py as a Space
"""

import argparse
import re
from pathlib import Path

from checkpoint_tools.packages import needs


with needs("tools"):
    from transformers.utils import logging

    from checkpoint_tools.errors import one_line_errors
    from checkpoint_tools.fetching import is_hub_id
    from checkpoint_tools.licences import OTHER, UNKNOWN, Licence
    from checkpoint_tools.model_repo import upload
    from checkpoint_tools.push_to_hub import Destination
    from checkpoint_tools.quiet import quiet


DEFAULT_BASE = "facebook/sam-vit-base"
TARGETS = ("repo_id", "space", "adapter")
INTERRUPTED = "Interrupted. Run the command again to continue: files already sent are skipped."


def main() -> None:
    args = parse_args()
    with quiet(), one_line_errors(ValueError, RuntimeError, interrupted=INTERRUPTED):
        if args.space:
            push_space(args)
            return
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
            licence=Licence(args.license, args.license_name, args.license_link),
            base_model=args.base_model,
        )


def push_space(args: argparse.Namespace) -> None:
    with needs("tools,app"):  # only now, as nothing else needs gradio
        from checkpoint_tools.spaces import upload_space

    message = args.commit_message or "Update the page"
    upload_space(
        Destination(args.space, message, args.private, args.revision, args.create_pr, repo_type="space"),
        args.base,
        args.base_revision,
        args.adapter,
        args.adapter_revision,
        args.output,
        args.force,
        args.token_file,
        args.dry_run,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", help=f"folder or Hub id of a SAM v1, stock or split ({DEFAULT_BASE}, or that of --adapter)"
    )
    parser.add_argument("--base-revision", help="its branch, tag or commit")
    parser.add_argument("--output", type=Path, help="folder to keep what is staged in")
    parser.add_argument("--force", action="store_true", help="replace an earlier output in OUTPUT")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file, such as 500MB (%(default)s)")
    facts = parser.add_argument_group("facts for the model card, which the base's own card does not name")
    facts.add_argument("--license", help="the Hub's name of the licence of the weights, such as apache-2.0, or other")
    facts.add_argument("--license-name", help="its name, for --license other")
    facts.add_argument("--license-link", help="URL of its text, or the name of a file beside the base")
    facts.add_argument(
        "--base-model",
        nargs="+",
        metavar="USER/NAME",
        help="the models on the Hub that a base in a folder was made from",
    )
    parser.add_argument("--repo-id", help="USER/NAME on the Hub to push to")
    parser.add_argument("--space", metavar="USER/NAME", help="Space to push, with the page of app.py for the base")
    parser.add_argument("--adapter", help="Hub id of an adapter for the Space, on its own base or on --base")
    parser.add_argument("--adapter-revision", help="its branch, tag or commit")
    parser.add_argument("--private", action="store_true", help="create the repo as a private one")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", help="branch to push to; created if missing (default: main)")
    target.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit-message", help="first line of the commit message (Split BASE)")
    parser.add_argument("--token-file", type=Path, help="file with a token; else HF_TOKEN or that of `hf auth login`")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be pushed")
    args = parser.parse_args()
    args.base = args.base or (None if args.adapter else DEFAULT_BASE)
    if not args.output and not args.repo_id and not args.space:
        parser.error("give --output to stage a model repo, --repo-id to push one, or both; or --space")
    if args.space and args.repo_id:
        parser.error("--space and --repo-id: push the model first, then its Space")
    if args.adapter and not args.space:
        parser.error("--adapter is for --space; to push a model with an adapter, merge it first")
    targets = [(f"--{name.replace('_', '-')}", [value] if (value := getattr(args, name)) else []) for name in TARGETS]
    for option, names in (*targets, ("--base-model", args.base_model)):
        for name in names or []:
            if not is_hub_id(name):
                parser.error(f"{option} {name}: expected USER/NAME")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]I?B", args.max_shard_size, re.IGNORECASE):
        parser.error(f"--max-shard-size {args.max_shard_size}: expected a number and its unit, such as 500MB or 5GB")
    if args.license == UNKNOWN:
        parser.error("--license unknown: expected the licence that the authors of the weights have given them")
    if args.license == OTHER and not (args.license_name and args.license_link):
        parser.error("--license other: the Hub wants --license-name and --license-link with it")
    if args.dry_run and not args.repo_id and not args.space:
        parser.error("--dry-run needs the --repo-id that would be pushed to; --output alone pushes nothing")
    return args


if __name__ == "__main__":
    logging.disable_progress_bar()  # of loading and saving; uploads show theirs
    main()
