"""The output folder of a run: its settings, a lock, and whether a run may go on from it."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint_tools.outputs import MARKER, MAY_LIE_IN_EMPTY_FOLDERS, locked, mark, read_marker, staged
from image_data.samples import TrainValidationParts
from image_data.setting_checks import SettingsError

from .data_summary import FILE, PICTURE, DataSummary
from .options import write_file
from .resuming import earlier_settings, last_checkpoint
from .settings import Settings


KIND = "fine-tuning run"
RUN_FILE = "run.yaml"  # repeats the run
FINGERPRINT = "settings.json"  # what must be the same on resume
# Settings that may change on resume, because they do not affect the result.
NOT_IN_FINGERPRINT = {
    *(
        "check",
        "resume",
        "force",
        "export",
        "output_dir",
        "minutes",
        "dataloader_num_workers",
        "report_to",
        "run_name",
    ),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "disable_tqdm"),
    *("license", "license_name", "license_link"),
}
NOTHING_TRAINED = {FINGERPRINT, RUN_FILE, FILE, PICTURE, MARKER, *MAY_LIE_IN_EMPTY_FOLDERS}  # names
NOT_REPEATED = {"check", "resume", "force", "hub_token"}


@contextlib.contextmanager
def opened_run(settings: Settings, parts: TrainValidationParts, is_main: bool) -> Iterator[str | None]:
    """Holds a lock on the output folder, writes the settings into it, and yields the checkpoint to continue from.

    Raises:
        SettingsError: If the interrupted run had other settings.
        FileExistsError: If the folder is in use, or belongs to something else.
    """
    if not is_main:
        checkpoint, _ = checkpoint_of(settings, parts)
        yield checkpoint
        return
    with held(settings.folder):
        checkpoint, damaged = checkpoint_of(settings, parts)
        if damaged:
            print(f"Not whole: {', '.join(damaged)}. The run goes on from {checkpoint or 'its beginning'}.")
        if goes_on(settings):
            mark(settings.folder, KIND, grows=True)
        else:
            write_settings(settings, parts)
        yield checkpoint
        mark(settings.folder, KIND)  # from now on, what comes into it is someone else's


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes the output folder if it is missing, and holds a lock on it.

    Raises:
        FileExistsError: If it is a file, or another run writes to it.
    """
    if folder.is_file():
        raise FileExistsError(f"--output {folder} is a file: choose another name.")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def goes_on(settings: Settings) -> bool:
    """Whether an earlier run is resumed."""
    folder = settings.folder
    return settings.output.resume and (folder / FINGERPRINT).exists() and not holds_nothing_trained(folder)


def write_settings(settings: Settings, parts: TrainValidationParts) -> None:
    """Writes the settings into a new folder, so that nothing of an earlier run is mistaken for this run's.

    Raises:
        FileExistsError: If the folder is in use, or belongs to something else.
    """
    force = settings.output.force or holds_nothing_trained(settings.folder)
    with staged(settings.folder, KIND, force, inputs(settings), grows=True) as folder:
        (folder / FINGERPRINT).write_text(json.dumps(fingerprint(settings, parts), indent=2) + "\n")
        write_file(
            {name: value for name, value in settings.options.items() if name not in NOT_REPEATED}, folder / RUN_FILE
        )


def write_check(settings: Settings, summary: DataSummary, parts: TrainValidationParts) -> None:
    """Writes what there is to know of the data into a new folder, which a run may use later.

    Raises:
        FileExistsError: If the folder is in use, or belongs to something else.
    """
    with held(settings.folder):
        force = settings.output.force or holds_nothing_trained(settings.folder)
        with staged(settings.folder, KIND, force, inputs(settings)) as folder:
            summary.save(folder, parts)


def holds_nothing_trained(folder: Path) -> bool:
    """Whether the output folder is that of a check, or of a run that was killed before its first checkpoint."""
    return read_marker(folder).get("kind") == KIND and {path.name for path in folder.iterdir()} <= NOTHING_TRAINED


def inputs(settings: Settings) -> list[str | Path]:
    """What a run reads, and may not replace."""
    return [*settings.data.paths, settings.model.base]


def checkpoint_of(settings: Settings, parts: TrainValidationParts) -> tuple[str | None, list[str]]:
    """Returns the last whole checkpoint of the run that is resumed, if any, and the names of later, damaged ones.

    Raises:
        SettingsError: If that run had other settings, or its best checkpoint is gone.
    """
    output = settings.folder
    if not goes_on(settings):
        return None, []
    earlier, run = earlier_settings(output / FINGERPRINT), fingerprint(settings, parts)
    names = [*run, *(name for name in earlier if name not in run)]
    if changed := [name for name in names if run.get(name) != earlier.get(name)]:
        differences = ", ".join(f"{name} {earlier.get(name)} then and {run.get(name)} now" for name in changed)
        raise SettingsError(f"--resume: {output} was started with other settings: {differences}.")
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
