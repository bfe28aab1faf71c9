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
    parser.add_argument("--base-revision", help="branch, tag or commit of the base on the Hub")
    parser.add_argument("--output", type=Path, help="folder to stage in (a temporary one)")
    parser.add_argument("--force", action="store_true", help="replace an earlier output in --output")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="size of the largest weight file, such as 500MB (%(default)s)"
    )
    facts = parser.add_argument_group("facts for the model card, as far as the base's own card does not state them")
    facts.add_argument("--license", help="the Hub's name of the licence of the weights, such as apache-2.0, or other")
    facts.add_argument("--license-name", help="name of the licence, for --license other")
    facts.add_argument("--license-link", help="URL of the licence's text, or the name of a file beside the base")
    facts.add_argument(
        "--base-model",
        nargs="+",
        metavar="USER/NAME",
        help="Hub ids of the models that a base in a folder was made from",
    )
    parser.add_argument("--repo-id", metavar="USER/NAME", help="model repo on the Hub to push to; created if missing")
    parser.add_argument(
        "--space",
        metavar="USER/NAME",
        help="Space on the Hub to push to, with the page of app.py for --base or --adapter",
    )
    parser.add_argument("--adapter", help="Hub id of an adapter for the Space, on --base or the base that it names")
    parser.add_argument("--adapter-revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument("--private", action="store_true", help="create the repo as private")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", help="branch to push to; created if missing (main)")
    target.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit-message", help="first line of the commit message (Split BASE, or Update the page)")
    parser.add_argument("--token-file", type=Path, help="file with a Hub token (HF_TOKEN, or `hf auth login`)")
    parser.add_argument(
        "--dry-run", action="store_true", help="stage, verify and show what would be pushed, but push nothing"
    )
    args = parser.parse_args()
    args.base = args.base or (None if args.adapter else DEFAULT_BASE)
    if not args.output and not args.repo_id and not args.space:
        parser.error("expected --output to stage a model repo, --repo-id to push one, both, or --space.")
    if args.space and args.repo_id:
        parser.error("--space and --repo-id: expected one of them. Push the model first, then its Space.")
    if args.adapter and not args.space:
        parser.error("--adapter: expected --space, too. To push a model with an adapter, merge it first.")
    targets = [(f"--{name.replace('_', '-')}", [value] if (value := getattr(args, name)) else []) for name in TARGETS]
    for option, names in (*targets, ("--base-model", args.base_model)):
        for name in names or []:
            if not is_hub_id(name):
                parser.error(f"{option} {name}: expected USER/NAME.")
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]I?B", args.max_shard_size, re.IGNORECASE):
        parser.error(f"--max-shard-size {args.max_shard_size}: expected a number and its unit, such as 500MB or 5GB.")
    if args.license == UNKNOWN:
        parser.error("--license unknown: expected the licence that the authors of the weights have given them.")
    if args.license == OTHER and not (args.license_name and args.license_link):
        parser.error("--license other: expected --license-name and --license-link, too, as the Hub wants them.")
    refuse_idle_options(parser, args)
    return args


def refuse_idle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits if an option would change nothing."""
    pushes = bool(args.repo_id or args.space)
    of_a_push = ("private", "revision", "create_pr", "commit_message", "dry_run")
    of_a_model_card = ("license", "license_name", "license_link", "base_model")
    for names, applies, problem in (
        (of_a_push, pushes, "expected --repo-id or --space, too. --output alone pushes nothing."),
        (("adapter_revision",), bool(args.adapter), "expected --adapter, too."),
        (of_a_model_card, not args.space, "a Space has the licence and the base that the model's card states."),
    ):
        for name in names:
            if getattr(args, name) and not applies:
                parser.error(f"--{name.replace('_', '-')}: {problem}")


if __name__ == "__main__":
    logging.disable_progress_bar()  # of loading and saving; uploads show theirs
    main()
