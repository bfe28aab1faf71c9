"""Stages a model repo with split weights and code, verifies it, and pushes it to the Hub."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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
from transformers import SamProcessor

from .cards import card_facts, model_card
from .outputs import MARKER, staged
from .sources import fetch
from .staging import ROOT, one_line, split_class
from .verification import check_card


# All files of a model repo. A push replaces or deletes files of an earlier push that match.
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


@dataclass(frozen=True)
class Destination:
    """Destination of a push.

    Args:
        repo_id: USER/NAME.
        commit_message: Message of the commit.
        private: Creates the repo as private.
        revision: Branch, created if missing; None for main.
        create_pr: Whether to open a pull request instead.
    """

    repo_id: str
    commit_message: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


def upload(
    base: str,
    base_revision: str | None = None,
    output: Path | None = None,
    destination: Destination | None = None,
    force: bool = False,
    max_shard_size: str = "5GB",
    token_file: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Stages a model repo made from `base`, verifies it, and pushes it.

    Args:
        base: A folder or Hub id of a SAM v1, stock or split.
        base_revision: Its branch, tag or commit.
        output: The folder to keep what is staged in; None for a temporary one.
        destination: Where to push to; None to stage only.
        force: Replaces `output` if it is not empty.
        max_shard_size: The largest size of a weight file.
        token_file: A file with a token; None for the token that the machine is logged in with.
        dry_run: Shows what would be pushed, and pushes nothing.

    Raises:
        ValueError: If something is wrong with the base, the result or the destination, or the Hub refuses.
    """
    token = read_token(token_file)
    api = HfApi(token=token)
    pushes = destination is not None and not dry_run
    head = check_destination(api, destination) if destination and pushes else None

    base_folder = fetch_base(base, base_revision, token)
    with tempfile.TemporaryDirectory(prefix="sam-split-") as temporary:
        output = output or Path(temporary, "model")
        with staged(output, "model repo", force, sources=(base_folder,)) as folder:
            stage(base_folder, folder, max_shard_size)
            print("Verifying in a new process ...", flush=True)
            figures = run_verify(str(folder), base_folder)
            repo_id = destination.repo_id if destination else f"<user>/{output.resolve().name}"
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            facts = card_facts(repo_id, base, base_folder, figures, code_version=config["sam_split_version"])
            (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
            check_staged(folder)
        print(
            f"All {figures['num_parameters']:,} parameters equal the base's. Largest relative difference from stock "
            f"SamModel's outputs: {figures['max_difference']:.1g}."
        )
        print(f"Would push to {repo_id}:" if dry_run else "Staged:")
        for path in staged_files(output):
            print(f"{path.stat().st_size:>14,}  {path.name}")
        if destination and pushes:
            push(api, destination, output, head, base_folder, token)


def read_token(path: Path | None) -> str | None:
    """Returns the token in the file `path`, otherwise the token of `hf auth login` or HF_TOKEN, if any."""
    token = path.read_text(encoding="utf-8").strip() if path else get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):  # HTTP errors would show a malformed one
        raise ValueError(f"{path or 'HF_TOKEN'} does not contain a token: expected one word")
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
            f"{base} is not a folder, and could not be downloaded from the Hub: try --base "
            f"checkpoints/sam-tiny, which is here. ({one_line(error.__cause__ or error)})"
        ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{base} has no config.json: expected a SAM v1 checkpoint written by save_pretrained. An adapter "
            "must be merged first: merge_and_unload(), then save_pretrained()."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The config.json of {base} is not JSON: {error}") from error
    if config.get("model_type") not in ("sam", "sam_split"):
        raise ValueError(
            f"{base}: expected SAM v1 (model_type 'sam' or 'sam_split'), got '{config.get('model_type')}'."
        )
    if "quantization_config" in config or (folder / "adapter_config.json").is_file():
        raise ValueError(f"{base} is quantized or holds an adapter: save the whole, merged model in full precision.")
    return folder


def stage(base: Path, folder: Path, max_shard_size: str) -> None:
    """Writes split weights, configuration, processor, code and licence into `folder`.

    Raises:
        ValueError: If `base` is not a whole SAM.
    """
    # Shapes that do not fit are then reported with all else that is wrong.
    model, loading_info = split_class().from_pretrained(
        base, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    if problems := [f"{problem}: {', '.join(map(str, keys))}" for problem, keys in loading_info.items() if keys]:
        raise ValueError(f"{base.name} is not a complete SAM v1 checkpoint: {'; '.join(problems)}.")
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
            raise ValueError(f"Unexpected file {path.name} in the staged folder. Allowed: {', '.join(FILES)}.")
        if path.suffix == ".py" and path.read_bytes() != (ROOT / path.name).read_bytes():
            raise ValueError(f"The staged {path.name} differs from this checkout's.")


def staged_files(folder: Path) -> list[Path]:
    """Returns the files of the model repo in `folder`, without the marker of outputs."""
    return sorted(path for path in folder.iterdir() if path.name != MARKER)


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


def check_destination(api: HfApi, destination: Destination) -> str | None:
    """Returns the parent commit of a push, None if the repo or branch does not exist yet.

    Raises:
        ValueError: If it is clear already that nothing can be pushed.
    """
    if api.token is None:
        raise ValueError(
            "A push needs a token that may write: run `hf auth login`, set HF_TOKEN, or give --token-file."
        )
    try:
        api.whoami()
        info = api.model_info(destination.repo_id)
        if destination.private and not info.private:
            raise ValueError(
                f"{destination.repo_id} exists and is public: make it private in its settings, or choose another."
            )
        return api.model_info(destination.repo_id, revision=destination.revision).sha
    except (RevisionNotFoundError, RepositoryNotFoundError):
        return None
    except HTTPError as error:
        raise ValueError(explain(error, destination.repo_id)) from error


def push(api: HfApi, destination: Destination, folder: Path, head: str | None, base: Path, token: str | None) -> None:
    """Pushes `folder` in one commit on top of `head`, loads it back and says how others do.

    Raises:
        ValueError: If the Hub refuses, or gives back something else.
    """
    try:
        commit = commit_files(api, destination, folder, head)
    except (HTTPError, RuntimeError) as error:  # the latter from hf_xet
        raise ValueError(explain(error, destination.repo_id)) from error
    if commit.oid == head:
        print(f"No changes: {destination.repo_id} is up to date, no commit was made.")
    print("Loading it back from the Hub, with empty caches ...", flush=True)
    try:
        run_verify(destination.repo_id, base, commit.oid, token)
    except ValueError as error:
        raise ValueError(
            f"Commit {commit.oid} was pushed to {destination.repo_id}, but verification failed: {error}"
        ) from error
    print(
        f"{commit.pr_url or commit.repo_url}\nCommit {commit.oid}, which others load with\n\n"
        f'    AutoModel.from_pretrained("{destination.repo_id}", revision="{commit.oid}", trust_remote_code=True)\n'
    )


def commit_files(api: HfApi, destination: Destination, folder: Path, head: str | None) -> CommitInfo:
    """Makes the repo and the branch where there is none, and commits all of `folder` at once."""
    if head is None:
        if not api.repo_exists(destination.repo_id):
            api.create_repo(destination.repo_id, private=destination.private or None)
        if destination.revision:
            api.create_branch(destination.repo_id, branch=destination.revision)
        head = api.model_info(destination.repo_id, revision=destination.revision).sha
    files = {path.name: path for path in staged_files(folder)}
    there = api.list_repo_files(destination.repo_id, revision=head)
    if "adapter_config.json" in there:
        raise ValueError(
            f"{destination.repo_id} contains an adapter, which transformers would load on top: choose another repo."
        )
    return api.create_commit(
        destination.repo_id,
        [CommitOperationAdd(name, path) for name, path in files.items()]
        + [CommitOperationDelete(name) for name in there if is_ours(name) and name not in files],
        commit_message=destination.commit_message,
        revision=destination.revision,
        create_pr=destination.create_pr,
        parent_commit=head,
    )


def explain(error: Exception, repo_id: str) -> str:
    """Returns what an error of the Hub means for a push, and what to do."""
    reasons = {
        401: "The Hub rejected the token: create a new one in your Hub settings, and run `hf auth login`.",
        403: f"The token may not write to {repo_id}: choose a repo of yours, a token that may, or --create-pr.",
        404: f"{repo_id} is not there, or not for this token: choose a repo of yours, or a token that may write.",
        409: f"{repo_id} is taken by a dataset, a Space, or a concurrent push: choose another name.",
        412: f"Someone else pushed to {repo_id} in the meantime: check their commit, then run again to replace it.",
        429: "The Hub's rate limit is reached: wait for a while, and run again.",
    }
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of "Error while uploading ..."
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        reason = reasons.get(error.response.status_code, "The Hub refused.")
    else:
        reason = "The connection to the Hub was lost: run the command again to continue."
    return f"{reason} ({one_line(error)})"
