"""Divides the data into training and validation samples: images, or tiles of images."""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from .sources import DataError, LabelledImage, Source


Window = tuple[slice, slice]


@dataclass(frozen=True)
class Sample:
    """A window of an image, the ids of the objects used from it, and their categories as far as there are any."""

    source: Source
    window: Window
    ids: np.ndarray
    categories: dict[int, str] = field(default_factory=dict)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the part of the image (H, W, 3) and its labels (..., H, W), with all objects that show in it."""
        whole = read_cached(self.source)
        return whole.image[self.window], whole.labels[..., *self.window]


@functools.lru_cache(maxsize=8)  # images may be large, and many tiles share one
def read_cached(source: Source) -> LabelledImage:
    """Reads a source, and keeps the last ones in memory."""
    return source.read()


@dataclass
class TrainValidationParts:
    """The training and validation samples, and notes on what was left out."""

    train: list[Sample]
    validation: list[Sample]
    notes: list[str]


def train_validation_parts(
    sources: list[Source],
    mask_side: int,
    validation: float = 0.2,
    tile: int | None = None,
    overlap: float = 0.25,
    min_area: int = 4,
    seed: int = 0,
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

    Raises:
        DataError: If there is something wrong with any of the files, or nothing is left to learn from or validate on.
    """
    sizes, left_out = check(sources)
    held_out = set(np.random.default_rng(seed).permutation(len(sources))[: max(1, round(validation * len(sources)))])
    samples: dict[bool, list[Sample]] = {False: [], True: []}
    fragments = empty = spanning = 0
    for index, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        labels, categories = read_cached(source).labels, read_cached(source).categories
        parts, excluded = {index in held_out: (slice(0, size[0]), slice(0, size[1]))}, np.array([], dtype=labels.dtype)
        if len(sources) == 1:
            parts = halves(size, validation)
            excluded = np.intersect1d(labels[..., *parts[False]], labels[..., *parts[True]])
            spanning = int(np.count_nonzero(excluded))
        for is_validation, part in parts.items():
            for window in tiles(part, tile, overlap):
                part_labels = labels[..., *window]
                shown = np.setdiff1d(np.unique(part_labels), [0, *excluded])
                ids = np.intersect1d(shown, visible(shrink(part_labels, mask_side), min_area))
                fragments += len(shown) - len(ids)
                empty += not len(ids)
                if len(ids):
                    names = {number: categories[number] for number in ids.tolist() if number in categories}
                    samples[is_validation].append(Sample(source, window, ids, names))
    notes = [f"{number} {what}" for what, number in left_out.items()] + [
        f"{number} {what}"
        for number, what in (
            (spanning, "objects cross the border between training and validation part and are left out of both"),
            (
                fragments,
                "objects (or parts cut off by a tile) are left out: "
                f"smaller than {min_area} pixels in the predicted masks",
            ),
            (empty, "images or tiles are left out: they show no object"),
        )
        if number
    ]
    for purpose, is_validation in (("training", False), ("validation", True)):
        if not samples[is_validation]:
            advice = "Add images, or change --validation, --tile or --min-area."
            raise DataError([f"No {purpose} objects left. {advice}", *notes])
    return TrainValidationParts(samples[False], samples[True], notes)


def check(sources: list[Source]) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Returns the (height, width) of each image, and how many objects the sources left out, by reason.

    Raises:
        DataError: With every problem of every image.
    """
    sizes, left_out, problems = [], Counter[str](), []
    for source in tqdm(sources, desc="Reading", unit="image", disable=len(sources) < 50):
        try:
            whole = read_cached(source)
            height, width = whole.image.shape[:2]
            if whole.labels.shape[-2:] != (height, width):
                raise ValueError(
                    f"{source.name}: expected a mask of {width} x {height} pixels (the image's size), "
                    f"got {whole.labels.shape[-1]} x {whole.labels.shape[-2]}."
                )
            sizes.append((height, width))
            left_out += whole.left_out + whole.notes
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise DataError(problems)
    return sizes, left_out


def halves(size: tuple[int, int], validation: float) -> dict[bool, Window]:
    """Returns the training (False) and validation (True) parts of one image, cut across its longer side."""
    height, width = size
    if width >= height:
        cut = round(width * (1 - validation))
        return {False: (slice(0, height), slice(0, cut)), True: (slice(0, height), slice(cut, width))}
    cut = round(height * (1 - validation))
    return {False: (slice(0, cut), slice(0, width)), True: (slice(cut, height), slice(0, width))}


def tiles(part: Window, side: int | None, overlap: float) -> Iterator[Window]:
    """Windows of at most `side` pixels that cover `part`; the last of a row or column ends at the border."""
    if side is None:
        yield part
        return

    def starts(span: slice) -> list[int]:
        last = max(span.start, span.stop - side)
        return [*range(span.start, last, max(1, round(side * (1 - overlap)))), last]

    for top in starts(part[0]):
        for left in starts(part[1]):
            yield slice(top, min(top + side, part[0].stop)), slice(left, min(left + side, part[1].stop))


def shrink(labels: np.ndarray, side: int) -> np.ndarray:
    """Downscales `labels` (..., H, W) to `side` pixels on the longest edge, with the processor's rounding.

    Of the pixels that become one, the nearest is taken.
    """
    edges = labels.shape[-2:]
    size = [max(1, int(edge * side / max(edges) + 0.5)) for edge in edges]
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, edges, strict=True))
    return labels[..., rows[:, None], columns]


def visible(labels: np.ndarray, min_area: int) -> np.ndarray:
    """The objects that show at least `min_area` pixels."""
    ids, areas = np.unique(labels[labels > 0], return_counts=True)
    return ids[areas >= min_area]
