"""Turns a SAM v1 checkpoint into a model repo for others: stages it in a folder, verifies it, pushes it to the Hub.

python upload.py --base checkpoints/sam-tiny --output sam-tiny-split  # stages and verifies only
python upload.py --base facebook/sam-vit-base --repo-id USER/NAME     # and pushes
"""

import argparse
import errno
import fnmatch
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import SamProcessor
from transformers.utils import logging

from model_card import model_card
from staging import ROOT, fetch, split_class, staged
from verify import check_card


# All that a model repo of ours may consist of. What a repo on the Hub has of these from an earlier push is replaced.
FILES = (
    "README.md",
    "LICENSE",
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "*_sam_split.py",
)


def main() -> None:
    args = parse_args()
    try:
        upload(args)
    except KeyboardInterrupt:
        sys.exit("Interrupted. Run the same command again: what was sent already is not sent again.")
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
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is not empty")
    parser.add_argument("--max-shard-size", default="5GB", help="size of weight files (%(default)s)")
    parser.add_argument("--repo-id", help="USER/NAME on the Hub to push to")
    parser.add_argument("--private", action="store_true", help="create the repo as a private one")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--revision", help="branch to push to, made if there is none (main)")
    target.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--commit-message", help="(Split BASE)")
    parser.add_argument("--token-file", type=Path, help="file with a token; else HF_TOKEN or that of `hf auth login`")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be pushed")
    args = parser.parse_args()
    if not args.output and not args.repo_id:
        parser.error("give --output to stage a model repo, --repo-id to push one, or both")
    if args.repo_id and args.repo_id.count("/") != 1:
        parser.error(f"--repo-id {args.repo_id}: expected was USER/NAME")
    if args.dry_run and not args.repo_id:
        parser.error("--dry-run needs the --repo-id that would be pushed to; --output alone pushes nothing")
    return args


def upload(args: argparse.Namespace) -> None:
    token = read_token(args.token_file)
    pushes = bool(args.repo_id) and not args.dry_run
    api = HfApi(token=token)
    head = check_destination(api, args) if pushes else None

    base = fetch_base(args.base, args.base_revision, token)
    with tempfile.TemporaryDirectory(prefix="sam-split-") as temporary:
        output = args.output or Path(temporary, "model")
        if base.is_relative_to(output.resolve()):
            raise ValueError(f"{output} holds the base, which would be lost: choose another --output.")
        with staged(output, args.force) as folder:
            stage(base, folder, args.max_shard_size)
            print("Verifying it in a process of its own ...", flush=True)
            figures = run_verify(str(folder), base)
            repo_id = args.repo_id or f"<user>/{output.resolve().name}"
            (folder / "README.md").write_text(model_card(repo_id, args.base, base, figures), encoding="utf-8")
            check_staged(folder)
        print(
            f"Its {figures['num_parameters']:,} parameters are the base's, and its outputs differ from stock "
            f"SamModel's by {figures['max_difference']:.1g} of the largest at most."
        )
        print(f"Would push to {args.repo_id}:" if args.dry_run else "Staged:")
        for path in sorted(output.iterdir()):
            print(f"{path.stat().st_size:>14,}  {path.name}")
        if pushes:
            push(api, args, output, head, base, token)


def read_token(path: Path | None) -> str | None:
    """Returns the token in the file `path`, else the one that the machine is logged in with, if it is."""
    token = path.read_text(encoding="utf-8").strip() if path else get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):  # else errors about the request would show it
        raise ValueError(f"What {path or 'HF_TOKEN'} holds is not a token, which is one word")
    return token


def fetch_base(base: str, revision: str | None, token: str | None) -> Path:
    """Returns the folder of a SAM v1 checkpoint.

    Raises:
        ValueError: If there is none under this name.
    """
    try:
        folder = fetch(base, revision, token)
    except GatedRepoError as error:
        raise ValueError(f"{base} is gated: accept its terms on its page on the Hub, and give your token.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{base} has no revision {revision}: choose another --base-revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{base} is not a folder, and the Hub has no such model, or a private one for which a token is needed: "
            "check --base, or try --base checkpoints/sam-tiny."
        ) from error
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"{base} is not a folder, and could not be had from the Hub: try --base checkpoints/sam-tiny, which is "
            f"here. ({one_line(error.__cause__ or error)})"
        ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{base} has no config.json: a SAM v1 checkpoint was expected, as save_pretrained writes it. An adapter "
            "must be merged first: merge_and_unload(), then save_pretrained()."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The config.json of {base} is not JSON: {error}") from error
    if config.get("model_type") not in ("sam", "sam_split"):
        raise ValueError(f"{base} is a '{config.get('model_type')}' model, and SAM v1 ('sam', 'sam_split') is needed.")
    if "quantization_config" in config or (folder / "adapter_config.json").is_file():
        raise ValueError(f"{base} is quantized or holds an adapter: save the whole, merged model in full precision.")
    return folder


def stage(base: Path, folder: Path, max_shard_size: str) -> None:
    """Writes split weights, configuration, processor, code and licence into `folder`.

    Raises:
        ValueError: If `base` is not a whole SAM.
    """
    # Shapes that do not fit are then told with all else that is wrong.
    model, loading_info = split_class().from_pretrained(
        base, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    if problems := [f"{problem}: {', '.join(map(str, keys))}" for problem, keys in loading_info.items() if keys]:
        raise ValueError(f"{base.name} does not hold the weights of a SAM v1, but has {'; '.join(problems)}.")
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    try:
        processor = SamProcessor.from_pretrained(base)
    except OSError as error:
        raise ValueError(f"{base.name} has no processor: save it there with processor.save_pretrained().") from error
    processor.save_pretrained(folder)
    shutil.copy(ROOT / "LICENSE", folder)


def check_staged(folder: Path) -> None:
    """Checks the files themselves, before others get them.

    Raises:
        ValueError: If the card is not what the Hub expects, the code is not this checkout's, or a file is foreign.
    """
    check_card(folder)
    for path in sorted(folder.iterdir()):
        if not is_ours(path.name):
            raise ValueError(f"Staging wrote {path.name}, which is no part of a model repo: {', '.join(FILES)}.")
        if path.suffix == ".py" and path.read_bytes() != (ROOT / path.name).read_bytes():
            raise ValueError(f"The staged {path.name} is not that of this folder.")


def is_ours(name: str) -> bool:
    """Whether a model repo of ours may hold a file of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def run_verify(repo: str, base: Path, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Runs `verify.py` with empty caches, without the network if `repo` is a folder, and returns what it measured.

    Raises:
        ValueError: If a check fails.
    """
    with tempfile.TemporaryDirectory(prefix="sam-split-verify-") as home:
        caches = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_MODULES_CACHE": f"{home}/modules"}
        network = {"HF_HUB_OFFLINE": "0" if revision else "1", "HF_TOKEN": token or ""}
        command = [sys.executable, str(ROOT / "verify.py"), repo, "--base", str(base)]
        process = subprocess.run(
            command + (["--revision", revision] if revision else []),
            env={**os.environ, **caches, **network},
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        reason, *_ = process.stderr.strip().splitlines()[-1:] or [f"it ended with {process.returncode}."]
        raise ValueError(f"Verification failed: {reason.removeprefix('Verification failed: ')}")
    return json.loads(process.stdout)


def check_destination(api: HfApi, args: argparse.Namespace) -> str | None:
    """Returns the commit that a push would build on, None if the repo or the branch is still to be made.

    Raises:
        ValueError: If it is clear already that nothing can be pushed.
    """
    if api.token is None:
        raise ValueError(
            "A push needs a token that may write: run `hf auth login`, set HF_TOKEN, or give --token-file."
        )
    try:
        api.whoami()
        info = api.model_info(args.repo_id)
        if args.private and not info.private:
            raise ValueError(
                f"{args.repo_id} exists and is public: make it private in its settings, or choose another."
            )
        return api.model_info(args.repo_id, revision=args.revision).sha
    except (RevisionNotFoundError, RepositoryNotFoundError):
        return None
    except HTTPError as error:
        raise ValueError(explain(error, args.repo_id)) from error


def push(api: HfApi, args: argparse.Namespace, folder: Path, head: str | None, base: Path, token: str | None) -> None:
    """Pushes `folder` in one commit on top of `head`, loads it back and says how others do.

    Raises:
        ValueError: If the Hub refuses, or gives back something else.
    """
    try:
        commit = commit_files(api, args, folder, head)
    except (HTTPError, RuntimeError) as error:  # the latter from hf_xet
        raise ValueError(explain(error, args.repo_id)) from error
    if commit.oid == head:
        print(f"Nothing was changed: {args.repo_id} is the same already, so there is no new commit.")
    print("Loading it back from the Hub, with empty caches ...", flush=True)
    try:
        run_verify(args.repo_id, base, commit.oid, token)
    except ValueError as error:
        raise ValueError(f"Commit {commit.oid} of {args.repo_id} is on the Hub, but: {error}") from error
    print(
        f"{commit.pr_url or commit.repo_url}\nCommit {commit.oid}, which others load with\n\n"
        f'    AutoModel.from_pretrained("{args.repo_id}", revision="{commit.oid}", trust_remote_code=True)\n'
    )


def commit_files(api: HfApi, args: argparse.Namespace, folder: Path, head: str | None) -> CommitInfo:
    """Makes the repo and the branch where there is none, and commits all of `folder` at once."""
    if head is None:
        if not api.repo_exists(args.repo_id):
            api.create_repo(args.repo_id, private=args.private or None)
        if args.revision:
            api.create_branch(args.repo_id, branch=args.revision)
        head = api.model_info(args.repo_id, revision=args.revision).sha
    files = {path.name: path for path in sorted(folder.iterdir())}
    there = api.list_repo_files(args.repo_id, revision=head)
    if "adapter_config.json" in there:
        raise ValueError(f"{args.repo_id} holds an adapter, which would be loaded on top: choose another repo.")
    return api.create_commit(
        args.repo_id,
        [CommitOperationAdd(name, path) for name, path in files.items()]
        + [CommitOperationDelete(name) for name in there if is_ours(name) and name not in files],
        commit_message=args.commit_message or f"Split {Path(args.base).resolve().name}",
        revision=args.revision,
        create_pr=args.create_pr,
        parent_commit=head,
    )


def explain(error: Exception, repo_id: str) -> str:
    """Returns what an error of the Hub means for a push, and what to do."""
    reasons = {
        401: "The Hub does not know the token: make another on its settings page, and run `hf auth login`.",
        403: f"The token may not write to {repo_id}: choose a repo of yours, a token that may, or --create-pr.",
        404: f"{repo_id} is not there, or not for this token: choose a repo of yours, or a token that may write.",
        409: f"{repo_id} is taken, by a dataset, a Space or somebody who was faster: choose another name.",
        412: f"Somebody pushed to {repo_id} meanwhile: look at their commit, and run again to push over it.",
        429: "The Hub's rate limit is reached: wait for a while, and run again.",
    }
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of "Error while uploading ..."
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        reason = reasons.get(error.response.status_code, "The Hub refused.")
    else:
        reason = "The connection to the Hub was lost: run the same command again; what was sent is not sent again."
    return f"{reason} ({one_line(error)})"


def one_line(message: object) -> str:
    return " ".join(str(message).split())


if __name__ == "__main__":
    logging.disable_progress_bar()  # of loading and saving; uploads show theirs
    logging.set_verbosity_error()  # what is wrong with a base is told in one line
    main()
