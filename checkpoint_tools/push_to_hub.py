"""Pushes a staged model repo to the Hub in one commit, and compares every file of the commit with what was staged."""

import filecmp
import fnmatch
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .messages import one_line
from .output_folders import MARKER


# What may lie in a repo beside what is pushed: nothing that transformers, PEFT or another library would load or run.
HARMLESS = ("*.md", "*.txt", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.pdf", ".gitignore")
WRITTEN_BY_THE_HUB = ".gitattributes"


class PushError(ValueError):
    """The Hub refuses a push, or gives back something else than what was pushed."""


@dataclass(frozen=True)
class Destination:
    """Destination of a push.

    Args:
        repo_id: USER/NAME.
        commit_message: Message of the commit.
        private: Creates the repo as private.
        revision: Branch, created if missing; None for main.
        create_pr: Whether to open a pull request instead.
        repo_type: Of the repo, in the Hub's names: "model" or "space".
    """

    repo_id: str
    commit_message: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    repo_type: str = "model"


def check_destination(api: HfApi, destination: Destination) -> str | None:
    """Returns the parent commit of a push, None if the repo or branch does not exist yet.

    Raises:
        PushError: If it is clear already that nothing can be pushed.
    """
    if api.token is None:
        raise PushError(
            "A push needs a token that may write: run `hf auth login`, set HF_TOKEN, or give --token-file."
        )
    try:
        api.whoami()
        info = api.repo_info(destination.repo_id, repo_type=destination.repo_type)
        if destination.private and not info.private:
            raise PushError(
                f"{destination.repo_id} exists and is public: make it private in its settings, or choose another."
            )
        return head_of(api, destination)
    except (RevisionNotFoundError, RepositoryNotFoundError):
        return None
    except HTTPError as error:
        raise PushError(explain(error, destination.repo_id)) from error


def push(
    api: HfApi,
    destination: Destination,
    folder: Path,
    head: str | None,
    patterns: Sequence[str],
    verify: Callable[[str, Path], object] = lambda commit, cache: None,
) -> CommitInfo:
    """Pushes `folder` in one commit on top of `head`, compares it with what the Hub gives back, and verifies that.

    Args:
        api: The Hub, with a token.
        destination: Where to push to.
        folder: The staged model repo.
        head: The parent commit; None if there is none yet.
        patterns: Names of files that such a repo holds; those of an earlier push are replaced or deleted.
        verify: Called with the new commit and a Hub cache that holds it, once all files are the same.

    Raises:
        PushError: If the Hub refuses, or gives back something else.
    """
    try:
        head = head or create(api, destination)
        others = other_files(api, destination, head, folder, patterns)
        commit = commit_files(api, destination, folder, head, others)
    except (HTTPError, RuntimeError) as error:  # the latter from hf_xet
        raise PushError(explain(error, destination.repo_id)) from error
    if commit.oid == head:
        print(f"No changes: {destination.repo_id} is up to date, no commit was made.")
    print("Comparing it with what the Hub gives back ...", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="sam-split-pushed-") as cache:
            compare_files(api, destination, commit.oid, folder, head, others, Path(cache))
            verify(commit.oid, Path(cache))
    except (ValueError, OSError, HTTPError) as error:
        raise PushError(
            f"Commit {commit.oid} was pushed to {destination.repo_id}, but verification failed: {one_line(error)}"
        ) from error
    return commit


def read_token(path: Path | None) -> str | None:
    """Returns the token in the file `path`, otherwise the token of `hf auth login` or HF_TOKEN, if any.

    Raises:
        ValueError: If the file or HF_TOKEN does not contain exactly one word.
    """
    token = path.read_text(encoding="utf-8").strip() if path else get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):  # HTTP errors would show a malformed one
        raise ValueError(f"{path or 'HF_TOKEN'} does not contain a token: expected one word.")
    return token


def create(api: HfApi, destination: Destination) -> str:
    """Makes the repo and the branch where there is none, and returns the commit to build on."""
    repo_id, repo_type = destination.repo_id, destination.repo_type
    if not api.repo_exists(repo_id, repo_type=repo_type):
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, private=destination.private or None, repo_type=repo_type, space_sdk=sdk)
    if destination.revision:
        api.create_branch(repo_id, branch=destination.revision, repo_type=repo_type)
    return str(head_of(api, destination))


def head_of(api: HfApi, destination: Destination) -> str | None:
    """Returns the last commit of the branch."""
    info = api.repo_info(destination.repo_id, revision=destination.revision, repo_type=destination.repo_type)
    return info.sha


def staged_files(folder: Path) -> dict[str, Path]:
    """Returns the files of the repo in `folder` by their paths in it, without the mark of outputs."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def print_files(folder: Path, title: str) -> None:
    """Prints the files of the repo in `folder`, with their sizes in bytes."""
    print(title)
    for file, path in staged_files(folder).items():
        print(f"{path.stat().st_size:>14,}  {file}")


def is_ours(name: str, patterns: Sequence[str]) -> bool:
    """Whether a repo of ours may hold a file of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def other_files(api: HfApi, destination: Destination, head: str, folder: Path, patterns: Sequence[str]) -> set[str]:
    """Returns the files of the repo that a push leaves as they are.

    Raises:
        PushError: If one of them could be loaded or run together with the model.
    """
    repo_id = destination.repo_id
    there = api.list_repo_files(repo_id, revision=head, repo_type=destination.repo_type)
    if "adapter_config.json" in there and not is_ours("adapter_config.json", patterns):
        raise PushError(f"{repo_id} contains an adapter, which transformers would load on top: choose another repo.")
    ours = {*staged_files(folder), WRITTEN_BY_THE_HUB, *(name for name in there if is_ours(name, patterns))}
    others = set(there) - ours
    if foreign := sorted(name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in HARMLESS)):
        raise PushError(
            f"{repo_id} also contains {', '.join(foreign)}, which may be loaded or run with the model: delete that, "
            "or choose another repo."
        )
    return others


def commit_files(api: HfApi, destination: Destination, folder: Path, head: str, others: set[str]) -> CommitInfo:
    """Commits all of `folder` at once, on top of `head`, and deletes what is neither in it nor of `others`.

    Raises:
        PushError: If the Hub's answer names no commit.
    """
    files = staged_files(folder)
    there = api.list_repo_files(destination.repo_id, revision=head, repo_type=destination.repo_type)
    try:
        commit = api.create_commit(
            destination.repo_id,
            [CommitOperationAdd(name, path) for name, path in files.items()]
            + [CommitOperationDelete(name) for name in there if name not in {*files, *others, WRITTEN_BY_THE_HUB}],
            commit_message=destination.commit_message,
            revision=destination.revision,
            create_pr=destination.create_pr,
            parent_commit=head,
            repo_type=destination.repo_type,
        )
        if not commit.oid:
            raise KeyError("commitOid")
        return commit
    except (KeyError, TypeError, AttributeError) as error:
        raise PushError(
            f"The Hub's answer to the commit to {destination.repo_id} names no commit ({one_line(error)}): run the "
            "command again, which changes nothing if the commit was made."
        ) from error


def compare_files(
    api: HfApi, destination: Destination, commit: str, folder: Path, head: str, others: set[str], cache: Path
) -> None:
    """Downloads a commit into a Hub cache, and compares every file with what was staged or was there before.

    Raises:
        PushError: If a file is missing, added or different.
    """
    repo_id, repo_type = destination.repo_id, destination.repo_type
    listed = set(api.list_repo_files(repo_id, revision=commit, repo_type=repo_type))
    download = partial(snapshot_download, repo_id, repo_type=repo_type, cache_dir=cache, token=api.token)
    actual = Path(download(revision=commit))
    expected = staged_files(folder)
    if others:
        earlier = Path(download(revision=head, allow_patterns=sorted(others)))
        expected |= {name: earlier / name for name in others}
    downloaded = {path.relative_to(actual).as_posix() for path in actual.rglob("*") if not path.is_dir()}
    problems = {
        "lacks": expected.keys() - (downloaded & listed),
        "also contains": (downloaded | listed) - expected.keys() - {WRITTEN_BY_THE_HUB},
        "has other contents in": {
            name
            for name in downloaded & expected.keys()
            if not filecmp.cmp(actual / name, expected[name], shallow=False)
        },
    }
    if differences := [f"{problem} {', '.join(sorted(names))}" for problem, names in problems.items() if names]:
        raise PushError(f"unlike what was staged, it {'; it '.join(differences)}. Nothing was loaded.")


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
