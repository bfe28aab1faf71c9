"""The model repo of `upload.py`: split weights and code, staged in a folder, verified, and pushed to the Hub."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from .base_provenance import Base, read_base
from .checkout import ROOT, split_class
from .config_files import copy_plain, keep_known_settings, read_json, read_processor
from .errors import well_formed
from .licences import CODE_LICENCE, Licence
from .model_repo_card import card_facts, model_card
from .output_folders import staged
from .push_to_hub import Destination, check_destination, is_ours, print_files, push, read_token
from .verification import check_card


# All files of a model repo. A push replaces or deletes files of an earlier push that match.
FILES = (
    "README.md",
    "LICENSE*",
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "segmentation.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "*_sam_split.py",
)
SEGMENTATION = "segmentation.json"  # how a fine-tuned model is to be used


def upload(
    name: str,
    revision: str | None = None,
    output: Path | None = None,
    destination: Destination | None = None,
    force: bool = False,
    max_shard_size: str = "5GB",
    token_file: Path | None = None,
    dry_run: bool = False,
    licence: Licence | None = None,
    base_model: list[str] | None = None,
) -> None:
    """Stages a model repo made from a base, verifies it, and pushes it.

    Args:
        name: A folder or Hub id of a SAM v1, stock or split: the base.
        revision: Its branch, tag or commit.
        output: The folder to keep what is staged in; None for a temporary one.
        destination: Where to push to; None to stage only.
        force: Replaces an earlier output in `output`.
        max_shard_size: The largest size of a weight file.
        token_file: A file with a token; None for the token that the machine is logged in with.
        dry_run: Shows what would be pushed, and pushes nothing.
        licence: The licence of the weights, as far as the card of the base does not state it.
        base_model: Hub ids of the models that a base in a folder was made from.

    Raises:
        ValueError: If something is wrong with the base, the result or the destination, or the Hub refuses.
        FileExistsError: If `output` may not be written.
    """
    token = read_token(token_file)
    api = HfApi(token=token)
    pushes = destination is not None and not dry_run
    head = check_destination(api, destination) if destination and pushes else None
    base = read_base(name, revision, token, licence, base_model)
    if pushes and base.licence.problem:
        raise ValueError(f"{name}: {base.licence.problem}.")

    with tempfile.TemporaryDirectory(prefix="sam-split-") as temporary:
        output = output or Path(temporary, "model")
        repo_id = destination.repo_id if destination else f"<user>/{output.resolve().name}"
        with staged(output, "model repo", force, sources=(base.folder,)) as folder:
            figures = stage_verified(base, folder, repo_id, max_shard_size)
        print(staged_message(figures, base))
        print_files(output, f"Would push to {repo_id}:" if dry_run else "Staged:")
        if destination and pushes:
            commit = push(
                api,
                destination,
                output,
                head,
                FILES,
                verify=lambda commit, cache: run_verify(destination.repo_id, base.folder, commit, cache),
            )
            print(pushed_message(commit, repo_id))


def stage_verified(base: Base, folder: Path, repo_id: str, max_shard_size: str) -> dict[str, Any]:
    """Writes all files of the model repo into `folder`, with a card of what `verify.py` measured, which it returns.

    Raises:
        ValueError: If something is wrong with the base or the result.
    """
    stage(base.folder, folder, max_shard_size, base.licence.files)
    print("Verifying in a new process ...", flush=True)
    figures = run_verify(str(folder), base.folder)
    version = read_json(folder / "config.json")["sam_split_version"]
    (folder / "README.md").write_text(model_card(card_facts(repo_id, base, figures, version)), encoding="utf-8")
    check_staged(folder, base.licence.files)
    return figures


def staged_message(figures: dict[str, Any], base: Base) -> str:
    """Returns what was measured, and what could not be found out."""
    difference = figures["max_difference"]
    outputs = f"differ by at most {difference:.1g}, relative to the largest" if difference else "are equal"
    lines = [
        f"All {figures['num_parameters']:,} parameters equal the base's. Its outputs and stock SamModel's {outputs}.",
        *(f"Note: the base's card was not read whole: {problem}." for problem in base.card.problems),
    ]
    if base.licence.problem:
        lines.append(f"Note: it is not ready for a push: {base.licence.problem}.")
    return "\n".join(lines)


def pushed_message(commit: CommitInfo, repo_id: str) -> str:
    """Returns where a push can be seen, and how others load what it pushed."""
    return (
        f"{commit.pr_url or commit.repo_url}\nCommit {commit.oid}, which others load with\n\n"
        "    from transformers import AutoModel\n"
        f'    AutoModel.from_pretrained("{repo_id}", revision="{commit.oid}", trust_remote_code=True)\n'
    )


def stage(base: Path, folder: Path, max_shard_size: str, licence_files: tuple[str, ...] = ()) -> None:
    """Writes split weights, configuration, processor, code and licences into `folder`.

    Raises:
        ValueError: If `base` is not a whole SAM.
    """
    # Shapes that do not fit are then reported with all else that is wrong.
    with well_formed(base.name):
        model, loading_info = split_class().from_pretrained(
            base, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    if problems := [f"{problem}: {', '.join(map(str, keys))}" for problem, keys in loading_info.items() if keys]:
        raise ValueError(f"{base.name} is not a complete SAM v1 checkpoint: {'; '.join(problems)}.")
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    keep_known_settings(folder)
    read_processor(base).save_pretrained(folder)
    if (base / SEGMENTATION).is_file():
        copy_plain(base / SEGMENTATION, folder / SEGMENTATION)
    for file in licence_files:
        shutil.copyfile(base / file, folder / file)
    shutil.copyfile(ROOT / "LICENSE", folder / CODE_LICENCE)


def check_staged(folder: Path, licence_files: tuple[str, ...] = ()) -> None:
    """Checks the files themselves, before others get them.

    Raises:
        ValueError: If the card is not what the Hub expects, the code is not this checkout's, or a file is foreign.
    """
    check_card(folder)
    for path in sorted(folder.iterdir()):
        if not is_ours(path.name, FILES) and path.name not in licence_files:
            raise ValueError(f"Unexpected file {path.name} in the staged folder. Allowed: {', '.join(FILES)}.")
        if path.suffix == ".py" and path.read_bytes() != (ROOT / path.name).read_bytes():
            raise ValueError(f"The staged {path.name} differs from this checkout's.")


def run_verify(repo: str, base: Path, revision: str | None = None, cache: Path | None = None) -> dict[str, Any]:
    """Runs `verify.py` in a new process without the network, and returns what it measured.

    Args:
        repo: A folder, or the Hub id of a model in `cache`.
        base: The folder of its base.
        revision: A commit in `cache`.
        cache: A cache of the Hub; None for an empty one.

    Raises:
        ValueError: If a check fails.
    """
    with tempfile.TemporaryDirectory(prefix="sam-split-verify-") as home:
        caches = {"HF_HOME": home, "HF_HUB_CACHE": str(cache or home), "HF_MODULES_CACHE": f"{home}/modules"}
        network = {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
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
        reason, *_ = process.stderr.strip().splitlines()[-1:] or [f"it ended with exit status {process.returncode}."]
        raise ValueError(f"Verification failed: {reason.removeprefix('Verification failed: ')}")
    return json.loads(process.stdout)
