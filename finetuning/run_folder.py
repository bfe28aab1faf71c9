"""The output folder of a run: its settings, a lock on it, and what may be replaced in it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from checkpoint_tools.output_folders import MARKER, MAY_LIE_IN_EMPTY_FOLDERS, locked, mark, read_marker, staged
from image_data.samples import TrainValidationParts

from .command_line import write_file
from .data_summary import FILE, PICTURE, DataSummary
from .recipe_settings import Settings
from .resuming import FINGERPRINT, checkpoint_to_resume, fingerprint


KIND = "fine-tuning run"
RUN_FILE = "run.yaml"  # repeats the run
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
        checkpoint, _ = checkpoint_to_resume(settings, parts) if goes_on(settings) else (None, [])
        yield checkpoint
        return
    with held(settings.folder):
        checkpoint = None
        if goes_on(settings):
            checkpoint, damaged = checkpoint_to_resume(settings, parts)
            if damaged:
                print(f"Not whole: {', '.join(damaged)}. The run goes on from {checkpoint or 'its beginning'}.")
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
