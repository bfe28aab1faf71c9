"""Decodes COCO segmentations: polygons and run lengths, checked before memory is allocated for them.

https://cocodataset.org/#format-data and https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


MAX_OUTLINE = 100_000_000  # pixels; pycocotools takes about 100 bytes for each


class EmptyMaskError(ValueError):
    """A segmentation that covers no pixel, and the reason."""


def is_missing(segmentation: Any) -> bool:
    """Whether there is nothing to decode: no segmentation, no polygon, no run."""
    if isinstance(segmentation, Mapping):
        return not segmentation.get("counts")
    parts = segmentation if isinstance(segmentation, list) else []
    return not segmentation or (bool(parts) and all(isinstance(p, (list, Mapping)) and is_missing(p) for p in parts))


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask (H, W) bool of a segmentation in an image of `size` (height, width).

    Polygons may be a list of lists (COCO), one flat list of coordinates, or one list of points. What is outside of the
    image is cut off.

    Raises:
        EmptyMaskError: If it covers no pixel of the image.
        ValueError: If it is no segmentation of such an image.
    """
    if isinstance(segmentation, Mapping):
        mask = decode_runs(segmentation, size)
    elif not isinstance(segmentation, list):
        raise ValueError(f"expected polygons or run lengths, got {shortened(segmentation)}")
    elif any(isinstance(part, Mapping) for part in segmentation):
        mask = np.zeros(size, dtype=bool)
        for part in segmentation:
            with contextlib.suppress(EmptyMaskError):
                mask |= decode(part, size)
    else:
        mask = decode_polygons(segmentation, size)
    if not mask.any():
        raise EmptyMaskError("cover no pixel")
    return mask


def decode_polygons(segmentation: list[Any], size: tuple[int, int]) -> np.ndarray:
    """Returns the mask of what lies in any of the polygons, as pycocotools draws them.

    Raises:
        EmptyMaskError: If none of them has an area in the image.
        ValueError: If one of them is no polygon.
    """
    is_one_polygon = not any(isinstance(part, list) for part in segmentation)
    is_list_of_points = all(isinstance(part, list) and len(part) == 2 for part in segmentation)
    outlines, empty = [], None
    for polygon in [segmentation] if is_one_polygon or is_list_of_points else segmentation:
        try:
            outlines.append(outline_of(polygon, size).ravel().tolist())
        except EmptyMaskError as error:
            empty = error
    if empty and not outlines:
        raise empty
    return decode_runs(coco_mask.merge(coco_mask.frPyObjects(outlines, *size)), size)


def outline_of(polygon: Any, size: tuple[int, int]) -> np.ndarray:
    """Returns a polygon's points (n, 2), as x and y in pixels.

    Raises:
        EmptyMaskError: If it has no area in the image.
        ValueError: If it is no polygon, or longer than an outline in this image can be.
    """
    height, width = size
    try:
        numbers = np.asarray(polygon, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected the coordinates of a polygon, got {shortened(polygon)}") from None
    if len(numbers) % 2:
        raise ValueError(f"expected pairs of coordinates, got a polygon of {len(numbers)} numbers")
    if not np.isfinite(numbers).all():
        raise ValueError("a coordinate is not a finite number")
    points = numbers.reshape(-1, 2)
    if len(points) < 3:
        raise EmptyMaskError("have fewer than three points")
    if (points.max(0) <= 0).any() or (points.min(0) >= (width, height)).any():
        raise EmptyMaskError("are outside of the image")
    if points.min() >= 0 and points.max() <= 1 < max(size):
        raise EmptyMaskError("have coordinates from 0 to 1, where COCO has pixels")
    length = np.abs(points - np.roll(points, 1, axis=0)).max(1).sum()
    if length > min(max(4 * height * width, 1_000_000), MAX_OUTLINE):
        raise ValueError(f"an outline of {length:.3g} pixels is too long for an image of {width} x {height} pixels")
    return points


def decode_runs(segmentation: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """Returns the mask of run lengths, compressed (a string) or not (a list).

    Raises:
        ValueError: If they do not add up to the image.
    """
    height, width = size
    given, counts = segmentation.get("size"), segmentation.get("counts")
    edges = [whole_number(edge) for edge in given] if isinstance(given, Sequence) else []
    if given is not None and edges != [height, width]:
        raise ValueError(f"expected run lengths of size [{height}, {width}] (height, width), got {shortened(given)}")
    if isinstance(counts, (str, bytes)):
        runs: list[int | None] = [*uncompressed(counts if isinstance(counts, str) else counts.decode("latin-1"))]
    elif isinstance(counts, Sequence):
        runs = [whole_number(count) for count in counts]
    else:
        raise ValueError(f"expected run lengths, got {shortened(counts)}")
    lengths = [run for run in runs if run is not None and run >= 0]
    if len(lengths) < len(runs):
        raise ValueError(f"expected run lengths of 0 or more, got {shortened(runs)}")
    if sum(lengths) != height * width:
        raise ValueError(f"run lengths add up to {sum(lengths)} pixels, and the image has {height * width}")
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return np.ascontiguousarray(inside.reshape(width, height).T)


def uncompressed(text: str) -> list[int]:
    """Returns the run lengths in a string: 5 bits a letter, and from the fourth the difference to the last but one.

    As `rleFrString` in maskApi.c.

    Raises:
        ValueError: If it holds something else.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - ord("0")
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"{shortened(text)} is no compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more letters follow
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"the compressed run lengths {shortened(text)} are cut off")
    return runs


def whole_number(value: Any) -> int | None:
    """Returns a whole number, written as such, as a string or as a float; None for anything else."""
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def shortened(value: Any) -> str:
    """The beginning of a value, for an error message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
