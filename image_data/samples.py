"""Divides the data into training and validation samples: images, or tiles of images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from .duplicate_images import Copies
from .image_cache import ImageCache
from .pillow_images import DataError
from .sources import LabelledImage, Source
from .tiles import Window, tiles


CACHE = ImageCache()  # of this process: many tiles share an image


@dataclass(frozen=True)
class Sample:
    """A window of an image, and the objects used from it.

    Args:
        source: The image and its objects.
        window: Rows and columns.
        ids: The numbers of the objects.
        categories: Their categories, as far as there are any.
        areas: The pixels that each object shows in the window.
        mask_areas: The pixels that each shows in the masks that the model predicts.
    """

    source: Source
    window: Window
    ids: np.ndarray
    categories: dict[int, str] = field(default_factory=dict)
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    mask_areas: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the part of the image (H, W, 3) and its labels (..., H, W), with all objects that show in it."""
        whole = CACHE.read(self.source)
        return whole.image[self.window], whole.labels[..., *self.window]


@dataclass
class TrainValidationParts:
    """The training and validation samples.

    Args:
        train: Samples to learn from.
        validation: Samples to validate on.
        test: Samples to test on, after training.
        left_out: How many objects, images and tiles are left out, by reason.
        notes: Further remarks on how the data was read.
        part_side: The longer side, in pixels, of the training part of an image that was divided. The model learns the
            scale of that part, at which objects are larger than in the whole image.
    """

    train: list[Sample]
    validation: list[Sample]
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    part_side: int | None = None


def train_validation_parts(
    sources: list[Source],
    mask_side: int,
    validation: float = 0.2,
    tile: int | None = None,
    overlap: float = 0.25,
    min_area: int = 4,
    seed: int = 0,
    own_validation: Sequence[Source] = (),
    test: Sequence[Source] = (),
) -> TrainValidationParts:
    """Reads everything once, keeps whole images for validation, and cuts all into tiles.

    Of a single image, a part is held out; objects that reach into both parts are left out.

    Args:
        sources: Where the images and labels come from.
        mask_side: Pixels that the longest side of an image has in the masks that the model predicts.
        validation: Share of the images, or of the only image, to keep for validation.
        tile: Side of the tiles in pixels; None to take images as they are.
        overlap: Share of a tile that the next one shows too.
        min_area: Objects that show less than this many pixels, of the masks that the model predicts, are left out.
        seed: Of the choice of images.
        own_validation: Other sources to validate on, instead of a share.
        test: Sources to test on, after training.

    Raises:
        DataError: If there is something wrong with any of the files, or nothing is left to learn from or validate on.
    """
    names = [*divided(sources, 0 if own_validation else validation, seed), *["validation"] * len(own_validation)]
    names += ["test"] * len(test)
    divides = len(sources) == 1 and not own_validation
    part_side = None
    samples: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    left_out, notes, problems, copies = Counter[str](), Counter[str](), [], Copies()
    every = [*sources, *own_validation, *test]
    for source, name in zip(tqdm(every, "Reading", unit="image", disable=len(every) < 50), names, strict=True):
        try:
            whole = checked(source)
            windows, spanning = {name: all_of(whole)}, np.zeros(0, dtype=int)
            if divides and name == "train":
                windows, spanning = divided_image(whole, validation)
                part_side = max(edge.stop - edge.start for edge in windows["train"])
                left_out[BETWEEN_PARTS] += len(spanning)
            for part, window in windows.items():
                cut = tiles(window, tile, overlap)
                used = [*samples_of(source, whole, cut, mask_side, min_area, spanning, left_out)]
                samples[part] += used
                if used and len(every) > 1:
                    copies.add(whole.image, part, source.name)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        left_out += whole.left_out
        notes += whole.notes
    if problems:
        raise DataError(problems)
    remarks = [*(f"{number} {what}" for what, number in notes.items()), *copies.notes()]
    parts = TrainValidationParts(**samples, left_out=+left_out, notes=remarks, part_side=part_side)
    require_objects(parts, tests=bool(test))
    return parts


def all_of(whole: LabelledImage) -> Window:
    """Returns the window that shows all of an image."""
    height, width = whole.image.shape[:2]
    return slice(0, height), slice(0, width)


def divided_image(whole: LabelledImage, validation: float) -> tuple[dict[str, Window], np.ndarray]:
    """Returns the training and the validation part of an image, and the numbers of the objects that are in both.

    Args:
        whole: The image.
        validation: Share of it to keep for validation.

    Raises:
        ValueError: If one of them would have no pixels.
    """
    parts = halves(whole.image.shape[:2], validation)
    if not all(edge.stop > edge.start for part in parts.values() for edge in part):
        height, width = whole.image.shape[:2]
        raise ValueError(f"--validation {validation:g}: of {width} x {height} pixels, one part would have none.")
    in_training, in_validation = (areas_of(whole.labels[..., *part])[0] for part in parts.values())
    return parts, np.intersect1d(in_training, in_validation)


def require_objects(parts: TrainValidationParts, tests: bool) -> None:
    """Checks that each part has objects.

    Args:
        parts: The samples.
        tests: Whether there is to be a test part.

    Raises:
        DataError: If one has none.
    """
    wanted = {"training": parts.train, "validation": parts.validation} | ({"test": parts.test} if tests else {})
    for purpose, samples in wanted.items():
        if not samples:
            raise DataError([f"No {purpose} objects left. {advice(parts)}", *lines(parts.left_out), *parts.notes])


def divided(sources: Sequence[Source], validation: float, seed: int) -> list[str]:
    """Returns `train` or `validation` for each source. The sources of a group go together; a single one is for both.

    Args:
        sources: What to divide.
        validation: Share to keep for validation; 0 for none.
        seed: Of the choice.

    Raises:
        DataError: If all are of one group.
    """
    names = ["train"] * len(sources)
    if len(sources) == 1 or not validation:
        return names
    groups: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(str(index) if source.group is None else f"group {source.group}", []).append(index)
    if len(groups) == 1:
        group = sources[0].group
        raise DataError([f"All images are of one group, {group}: nothing is left to validate on. Change the groups."])
    wanted, members = max(1, round(validation * len(sources))), list(groups.values())
    for place in np.random.default_rng(seed).permutation(len(members))[:-1]:
        if names.count("validation") < wanted:
            for index in members[place]:
                names[index] = "validation"
    return names


BETWEEN_PARTS = "objects cross the border between training and validation part and are left out of both"
TOO_SMALL = "objects (or parts cut off by a tile) are left out: smaller than {} pixels in the predicted masks"
EMPTY = "images or tiles are left out: they show no object"


def lines(left_out: Counter[str]) -> list[str]:
    """Returns what is left out, one reason a line."""
    return [f"{number} {what}" for what, number in left_out.items()]


def advice(parts: TrainValidationParts) -> str:
    """Returns what to do if no object is left for one of the parts."""
    if any(what.startswith(TOO_SMALL[:20]) for what in parts.left_out):
        return (
            "Images are scaled down to the model's size, and objects become too small: use --tile, as in --tile 1024, "
            "or lower --min-area."
        )
    if not parts.train + parts.validation and set(parts.left_out) == {EMPTY}:
        return "All pixels are background: are these the masks?"
    if any(what.startswith("annotations") for what in parts.left_out):
        return "Correct the annotations that are left out."
    return "Add images, or change --validation, --tile or --min-area."


def samples_of(
    source: Source,
    whole: LabelledImage,
    windows: Iterator[Window],
    mask_side: int,
    min_area: int,
    excluded: np.ndarray,
    left_out: Counter[str],
) -> Iterator[Sample]:
    """Yields the windows that show objects to use, and counts what is left out.

    Raises:
        ValueError: If a window is too narrow for the model.
    """
    for window in windows:
        labels = whole.labels[..., *window]
        height, width = labels.shape[-2:]
        if 2 * mask_side * min(height, width) < max(height, width):
            raise ValueError(
                f"{source.name}: {width} x {height} pixels are too narrow: nothing is left of the shorter side in the "
                f"model's masks of {mask_side} x {mask_side}. Cut it with --tile."
            )
        shown, areas = areas_of(labels)
        small, mask_areas = areas_of(shrink(labels, mask_side))
        large_enough = small[mask_areas >= min_area]
        is_used = np.isin(shown, large_enough) & ~np.isin(shown, excluded)
        ids = shown[is_used]
        left_out[TOO_SMALL.format(min_area)] += int((~is_used & ~np.isin(shown, excluded)).sum())
        left_out[EMPTY] += not len(ids)
        if len(ids):
            names = {number: whole.categories[number] for number in ids.tolist() if number in whole.categories}
            yield Sample(source, window, ids, names, areas[is_used], mask_areas[np.isin(small, ids)])


def checked(source: Source) -> LabelledImage:
    """Reads a source.

    Raises:
        ValueError: If it cannot be read, or image and labels have different sizes.
    """
    whole = source.read()
    height, width = whole.image.shape[:2]
    if whole.labels.shape[-2:] != (height, width):
        raise ValueError(
            f"{source.name}: expected a mask of {width} x {height} pixels (the image's size), "
            f"got {whole.labels.shape[-1]} x {whole.labels.shape[-2]}."
        )
    return whole


def halves(size: tuple[int, int], validation: float) -> dict[str, Window]:
    """Returns the training and validation parts of one image, cut across its longer side."""
    height, width = size
    if width >= height:
        cut = round(width * (1 - validation))
        return {"train": (slice(0, height), slice(0, cut)), "validation": (slice(0, height), slice(cut, width))}
    cut = round(height * (1 - validation))
    return {"train": (slice(0, cut), slice(0, width)), "validation": (slice(cut, height), slice(0, width))}


def shrink(labels: np.ndarray, side: int) -> np.ndarray:
    """Downscales `labels` (..., H, W) to `side` pixels on the longest edge, with the processor's rounding.

    Of the pixels that become one, the nearest is taken.
    """
    edges = labels.shape[-2:]
    size = [max(1, int(edge * side / max(edges) + 0.5)) for edge in edges]
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, edges, strict=True))
    return labels[..., rows[:, None], columns]


def areas_of(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the objects in labels (..., H, W), in ascending order, and the pixels of each."""
    if labels.max(initial=0) < 2**16:
        counts = np.bincount(labels[labels > 0] if labels.min(initial=0) < 0 else labels.ravel(), minlength=1)
        counts[0] = 0
        ids = np.flatnonzero(counts)
        return ids, counts[ids]
    return np.unique(labels[labels > 0], return_counts=True)


def visible(labels: np.ndarray, min_area: int) -> np.ndarray:
    """The objects that show at least `min_area` pixels."""
    ids, areas = areas_of(labels)
    return ids[areas >= min_area]
