"""How a trained model is to be used: settings that travel with its weights, as `segmentation.json`."""

import argparse
import json
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from checkpoint_tools.option_checks import LEAST_TILE_SIDE, MOST, MOST_GRID_POINTS, MOST_IMAGE_SIDE
from image_data.pillow_images import DataError, ImageReading


FILE_NAME = "segmentation.json"
OF_AUTOMATIC_MASKS = ("grid", "min_iou", "min_stability", "max_overlap")
MULTIMASK = ("single-point", "always", "never")


class SegmentationSettingsError(ValueError):
    """Settings that are out of range, or a file that holds none."""


@dataclass(frozen=True)
class SegmentationSettings:
    """How to read images, prompt the model, and choose among its masks.

    The recipe writes them beside the weights that it has trained. `segment.py`, `evaluate.py` and `app.py` use them
    unless told otherwise.

    Args:
        image_size: Side of the images that the model was trained on, in pixels; None for the base's own.
        reading: How the pixels of image files become colours.
        tile: Side of the windows that larger images are cut into, in pixels; None to scale images down instead.
        overlap: Share of a tile that the next one shows too.
        multimask: When to choose among three masks: for a `single-point` (boxes and several points give one mask), as
            Segment Anything advises; `always`; or `never`.
        grid: Points along a side of the grid that finds all objects of an image or tile.
        min_iou: Lowest predicted IoU of a mask that the grid finds.
        min_stability: Lowest stability score of such a mask.
        max_overlap: Highest IoU of two such masks. Of masks with a higher one, the best rated is kept.

    Raises:
        SegmentationSettingsError: If a setting is out of range.
    """

    image_size: int | None = None
    reading: ImageReading = field(default_factory=ImageReading)
    tile: int | None = None
    overlap: float = 0.25
    multimask: str = "single-point"
    grid: int = 32
    min_iou: float = 0.88
    min_stability: float = 0.95
    max_overlap: float = 0.5

    def __post_init__(self) -> None:
        for name, least, most in (
            ("image_size", 1, MOST_IMAGE_SIDE),
            ("tile", LEAST_TILE_SIDE, MOST),
            ("grid", 1, MOST_GRID_POINTS),
        ):
            value = getattr(self, name)
            if not (isinstance(value, int) and least <= value <= most) and not (value is None and name != "grid"):
                raise SegmentationSettingsError(
                    f"{option_of(name)} {value!r}: expected a whole number from {least} to {most:,}."
                )
        for name in ("overlap", "min_iou", "min_stability", "max_overlap"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise SegmentationSettingsError(f"{option_of(name)} {value!r}: expected a number from 0 to 1.")
        if self.overlap > 0.9:  # more than a hundred windows would show each pixel
            raise SegmentationSettingsError(f"--overlap {self.overlap:g}: expected at most 0.9.")
        if self.multimask not in MULTIMASK:
            raise SegmentationSettingsError(f"--multimask {self.multimask!r}: expected one of {', '.join(MULTIMASK)}.")

    def but(self, **changes: Any) -> Self:
        """Returns these settings with all `changes`, also those of `reading`, that are not None."""
        given = {name: value for name, value in changes.items() if value is not None}
        reading = {each.name: given.pop(each.name) for each in fields(ImageReading) if each.name in given}
        return replace(self, reading=replace(self.reading, **reading), **given)

    def save(self, folder: Path) -> Path:
        """Writes the settings into the folder of the weights, and returns the file's path."""
        path = folder / FILE_NAME
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> Self:
        """Returns the settings that lie beside the weights of `source`, or the defaults if there are none.

        Args:
            source: Folder or Hub id of an adapter or a model.
            revision: Of it, on the Hub.

        Raises:
            SegmentationSettingsError: If the file is damaged, or holds settings that this version does not know.
        """
        path = settings_file(source, revision)
        if path is None:
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SegmentationSettingsError(f"{path}: cannot be read: {error}") from error
        try:
            reading = known_settings(known_settings(values, cls).get("reading", {}), ImageReading)
            return cls(**values | {"reading": ImageReading(**reading)})
        except (SegmentationSettingsError, DataError, TypeError) as error:
            raise SegmentationSettingsError(f"{path}: {error}") from error


def known_settings(values: Any, kind: type) -> dict[str, Any]:
    """Returns values from JSON, if they are settings of this kind.

    Raises:
        SegmentationSettingsError: If they are something else.
    """
    known = {each.name for each in fields(kind)}
    if not isinstance(values, dict) or not known.issuperset(values):
        unknown = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else type(values).__name__
        raise SegmentationSettingsError(f"expected settings among {', '.join(sorted(known))}; got {unknown}.")
    return values


def option_of(name: str) -> str:
    """Returns the option of the command line that sets the field `name`."""
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options that all commands have for these settings, None by default, and returns their group."""
    group = parser.add_argument_group(
        "settings", "The defaults are what came with the model, otherwise the values in parentheses."
    )
    group.add_argument(
        "--image-size", type=int, help="side to which images or tiles are scaled, in pixels (the base's)"
    )
    group.add_argument("--tile", type=int, help="cut larger images into tiles of this side, in pixels (no tiles)")
    group.add_argument("--overlap", type=float, help="overlap of neighbouring tiles, as a share of their side (0.25)")
    group.add_argument("--multimask", choices=MULTIMASK, help="when to choose among three masks (single-point)")
    group.add_argument("--grid", type=int, help="points along a side of the grid for automatic masks (32)")
    group.add_argument("--min-iou", type=float, help="lowest predicted IoU of automatic masks (0.88)")
    group.add_argument("--min-stability", type=float, help="lowest stability score of automatic masks (0.95)")
    group.add_argument("--max-overlap", type=float, help="highest IoU of two automatic masks (0.5)")
    return group


def add_reading_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the options for images that say too little of themselves, None by default."""
    group.add_argument(
        "--channels",
        type=int,
        nargs="+",
        help="numbers of the bands that are red, green and blue, from 1; one number for grey",
    )
    group.add_argument("--pages", help="number of the page to read from files with several, from 1")
    group.add_argument(
        "--intensity",
        nargs="+",
        help="what becomes 0 and 255 of pixels that are not 8-bit: percentile LOW HIGH, min-max, or dtype "
        "(percentile 1 99.8)",
    )
    group.add_argument("--max-pixels", type=int, help="pixels of the largest image to decode (178956970)")


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings and ways of reading that a command was given, for `but`; None for those that it was not."""
    names = {each.name for part in (SegmentationSettings, ImageReading) for each in fields(part)} - {"reading"}
    changes = {name: getattr(args, name, None) for name in names}
    if changes["intensity"]:
        changes["intensity"] = " ".join(changes["intensity"])
    return changes


def settings_file(source: str | Path, revision: str | None = None) -> Path | None:
    """Returns the path of the settings in a folder or Hub repo, or None where there are none."""
    if Path(source).is_dir():
        path = Path(source, FILE_NAME)
        return path if path.exists() else None
    try:
        return Path(hf_hub_download(str(source), FILE_NAME, revision=revision))
    except LocalEntryNotFoundError:
        warnings.warn(
            f"{source}: the Hub cannot be reached, and no {FILE_NAME} is cached. The default settings are used.",
            stacklevel=3,
        )
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        pass  # a model without settings; one that does not exist is reported where its weights are loaded
    return None
