"""What `--resume` goes on from: the last whole checkpoint of an interrupted run with the same settings and data."""

import hashlib
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, TrainerState

from checkpoint_tools.option_checks import SettingsError
from image_data.samples import TrainValidationParts

from .recipe_settings import Settings


FINGERPRINT = "settings.json"  # what must be the same on resume
# Settings that may change on resume, because they do not affect the result.
NOT_IN_FINGERPRINT = {
    *("check", "resume", "force", "export", "output_dir", "minutes", "license", "license_name", "license_link"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"),
    *("dataloader_num_workers", "report_to", "run_name", "disable_tqdm"),
}


def checkpoint_to_resume(settings: Settings, parts: TrainValidationParts) -> tuple[str | None, list[str]]:
    """Returns the last whole checkpoint of an interrupted run, if any, and the names of later, damaged ones.

    Raises:
        SettingsError: If that run had other settings, or its best checkpoint is gone.
    """
    output = settings.folder
    earlier, run = earlier_settings(output / FINGERPRINT), fingerprint(settings, parts)
    names = [*run, *(name for name in earlier if name not in run)]
    if changed := [name for name in names if run.get(name) != earlier.get(name)]:
        differences = ", ".join(f"{name} {earlier.get(name)} then and {run.get(name)} now" for name in changed)
        raise SettingsError(
            f"--resume: {output} was started with other settings: {differences}. Give the same, or "
            "start again with --force."
        )
    checkpoint, damaged = last_checkpoint(output)
    return str(checkpoint) if checkpoint else None, damaged


def fingerprint(settings: Settings, parts: TrainValidationParts) -> dict[str, Any]:
    """Returns all that the result depends on."""
    run = {name: value for name, value in settings.options.items() if name not in NOT_IN_FINGERPRINT}
    return {**run, "processes": settings.training.world_size, "data": digest(parts)}


def digest(parts: TrainValidationParts) -> str:
    """Returns a hash of the samples. With other data, a resumed run could validate on objects it was trained on."""
    samples = [
        (name, Path(sample.source.name).name, str(sample.window), sample.ids.tolist())
        for name in ("train", "validation")
        for sample in getattr(parts, name)
    ]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:12]


def earlier_settings(file: Path) -> dict[str, Any]:
    """Returns the settings that a run was started with.

    Raises:
        SettingsError: If the file is damaged.
    """
    settings = read_object(file)
    if settings is None:
        raise SettingsError(
            f"--resume: {file} is damaged, so that the run may have had other settings: restore it, or start again "
            "with --force."
        )
    return settings


def last_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """Returns the last whole checkpoint in `output`, if there is one, and the names of later ones that are not whole.

    Raises:
        SettingsError: If the best checkpoint until then is not there.
    """
    numbered = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in numbered.items() if match and path.is_dir()}
    damaged = []
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        state = read_object(path / "trainer_state.json")
        if state is None or not all(map(is_whole, path.iterdir())):
            damaged.append(path.name)
            continue
        best = state.get("best_model_checkpoint")
        if best and not Path(best).is_dir():  # otherwise transformers would silently export the last weights
            raise SettingsError(
                f"--resume: the best checkpoint {best} does not exist: move {output} back, or run from the "
                "original working directory."
            )
        return path, damaged
    return None, damaged


def has_stopped(state: TrainerState, patience: int) -> bool:
    """Whether training had stopped by itself at a checkpoint: `Trainer` would make one more step from there.

    Not at the time limit, as a resumed run has time again.
    """
    stopping = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
    is_late = bool(patience) and stopping.get("early_stopping_patience_counter", 0) >= patience
    return is_late or first_diverged(state) is not None


def first_diverged(state: TrainerState) -> int | None:
    """Returns the first step at which the validation loss was not a number, if there is one."""
    steps = (entry["step"] for entry in state.log_history if not math.isfinite(entry.get("eval_loss", 0)))
    return next(steps, None)


def is_whole(file: Path) -> bool:
    """Whether a file of a checkpoint can be read to its end."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except SafetensorError:
            return False
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    return file.suffix != ".json" or read_object(file) is not None


def read_object(file: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, None if the file is damaged or missing."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
