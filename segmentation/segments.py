"""Masks of objects, cropped to their boxes: cleaning, overlap, and label images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage


IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # connects the pixels of a mask, and not those of two masks
IN_PLANE[1] = True
IN_PLANE_STRAIGHT = IN_PLANE & (ndimage.generate_binary_structure(3, 1))


@dataclass(frozen=True, eq=False)
class Segment:
    """The mask of one object, cropped to its box.

    Args:
        left: Column of the first pixel of `crop` in the image.
        top: Row of it.
        crop: The mask within its box, bool (H, W).
        rating: IoU that the model predicts.
        stability: Stability score.
        category: Name of the object's class, where there is one.
    """

    left: int
    top: int
    crop: np.ndarray
    rating: float
    stability: float
    category: str | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom; the last two are one pixel outside."""
        height, width = self.crop.shape
        return self.left, self.top, self.left + width, self.top + height

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the box."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.crop))

    def part(self, window: tuple[slice, slice]) -> np.ndarray:
        """Returns the mask in a window (rows, columns) of the image that overlaps the box, cropped to the box."""
        rows, columns = window
        return self.crop[
            max(0, rows.start - self.top) : rows.stop - self.top,
            max(0, columns.start - self.left) : columns.stop - self.left,
        ]

    def moved(self, down: int, right: int) -> Self:
        """Returns the segment so many pixels further down and right."""
        return replace(self, top=self.top + down, left=self.left + right)

    def full(self, shape: tuple[int, int]) -> np.ndarray:
        """Returns the mask in the whole image, bool (H, W)."""
        mask = np.zeros(shape, dtype=bool)
        mask[self.window] = self.crop
        return mask


def segment_of(
    mask: np.ndarray,
    rating: float = 1.0,
    stability: float = 1.0,
    offset: tuple[int, int] = (0, 0),
    category: str | None = None,
) -> Segment:
    """Returns the segment of a bool mask (H, W), whose first pixel is at `offset` (top, left) in the image.

    An empty mask becomes a segment without pixels.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, bottom = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
    left, right = (columns[0], columns[-1] + 1) if len(columns) else (0, 0)
    crop = mask[top:bottom, left:right].copy()
    return Segment(int(left) + offset[1], int(top) + offset[0], crop, rating, stability, category)


def segments_of(labels: np.ndarray, categories: Mapping[int, str] | None = None) -> list[Segment]:
    """Returns the objects of labels, 0 = background, in the order of their numbers.

    Args:
        labels: (H, W), or (layers, H, W) where objects overlap (`overlaps.py`).
        categories: The category of each object, by number, as far as there are any.
    """
    segments = {}
    for layer in labels if labels.ndim == 3 else [labels]:
        numbers = np.unique(layer[layer > 0])
        dense = np.searchsorted(numbers, layer) + 1
        dense[layer <= 0] = 0
        for index, (rows, columns) in enumerate(ndimage.find_objects(dense)):
            number = int(numbers[index])
            crop = dense[rows, columns] == index + 1
            category = (categories or {}).get(number)
            segments[number] = Segment(columns.start, rows.start, crop, 1.0, 1.0, category)
    return [segments[number] for number in sorted(segments)]


def by_area(segments: Sequence[Segment]) -> list[Segment]:
    """Returns the segments, the smallest last and so in front."""
    return sorted(segments, key=lambda segment: -segment.area)


def as_labels(segments: Sequence[Segment], shape: tuple[int, int]) -> np.ndarray:
    """Numbers the segments from 1 in one image (H, W) of uint16, or uint32 if there are too many for that.

    Where they overlap, the last is in front.
    """
    labels = np.zeros(shape, dtype=np.uint16 if len(segments) < 2**16 else np.uint32)
    for number, segment in enumerate(segments, start=1):
        labels[segment.window][segment.crop] = number
    return labels


def clean(masks: np.ndarray) -> np.ndarray:
    """Keeps the largest component of each mask (n, H, W), and fills its holes.

    Pixels of a component touch at edges or corners; those of a hole, at edges.
    """
    if not masks.size:
        return masks
    components, _ = ndimage.label(masks, IN_PLANE)
    areas = np.bincount(components.ravel())
    areas[0] = 0
    last = np.maximum.accumulate(components.max((1, 2)))  # components are numbered mask by mask
    first = np.concatenate([[0], last[:-1]]) + 1
    ranges = zip(first, last, strict=True)
    largest = [start + areas[start : stop + 1].argmax() if stop >= start else -1 for start, stop in ranges]
    is_largest = components == np.reshape(largest, (-1, 1, 1))
    outside, number = ndimage.label(~is_largest, IN_PLANE_STRAIGHT)
    is_open = np.zeros(number + 1, dtype=bool)
    for edge in (outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1]):
        is_open[edge.ravel()] = True
    is_open[0] = False
    return ~is_open[outside]


def distinct(masks: np.ndarray, ratings: np.ndarray, max_overlap: float) -> np.ndarray:
    """Non-maximum suppression on masks: of two masks with an IoU above `max_overlap`, the better rated is kept.

    Boxes are not looked at: an island far from an object stretches its box, so that boxes of two masks of one object
    may differ where the masks hardly do.

    Args:
        masks: bool (n, H, W).
        ratings: (n,).
        max_overlap: IoU.

    Returns:
        Indices of the masks to keep, best first.
    """
    number, height, width = masks.shape
    bits = np.packbits(masks.reshape(number, height * width), axis=1)
    packed = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)  # (n, words)
    areas = np.bitwise_count(packed).sum(1, dtype=np.int64)
    order = np.argsort(-ratings, kind="stable")
    packed, areas = packed[order], areas[order]
    chosen = []
    while len(order):
        chosen.append(order[0])
        shared = np.bitwise_count(packed[1:] & packed[0]).sum(1, dtype=np.int64)
        others = 1 + np.flatnonzero(shared <= max_overlap * (areas[1:] + areas[0] - shared))
        order, packed, areas = order[others], packed[others], areas[others]
    return np.array(chosen, dtype=int)


def iou_matrix(first: Sequence[Segment], second: Sequence[Segment]) -> np.ndarray:
    """Returns the IoU of each pair of segments, (first, second)."""
    boxes, others = (np.array([s.box for s in group]).reshape(-1, 4) for group in (first, second))
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    areas = [[segment.area for segment in group] for group in (first, second)]
    iou = np.zeros((len(first), len(second)))
    for row, column in np.argwhere((low < high).all(-1)):  # the pairs whose boxes overlap
        window = slice(low[row, column, 1], high[row, column, 1]), slice(low[row, column, 0], high[row, column, 0])
        shared = np.count_nonzero(first[row].part(window) & second[column].part(window))
        iou[row, column] = shared / max(1, areas[0][row] + areas[1][column] - shared)
    return iou


def distinct_segments(segments: Sequence[Segment], max_overlap: float) -> list[Segment]:
    """Returns the segments, best rated first; of two with an IoU above `max_overlap`, the better rated alone."""
    ordered = sorted(segments, key=lambda segment: -segment.rating)
    overlaps = iou_matrix(ordered, ordered) > max_overlap
    chosen: list[int] = []
    for index in range(len(ordered)):
        if not overlaps[index, chosen].any():
            chosen.append(index)
    return [ordered[index] for index in chosen]


def coco_annotation(segment: Segment, size: tuple[int, int]) -> dict[str, Any]:
    """Returns area, box (left, top, width, height) and run-length encoding of a segment, as COCO has them."""
    encoded = coco_mask.encode(np.asfortranarray(segment.full(size), dtype=np.uint8))
    left, top, right, bottom = segment.box
    return {
        "segmentation": {"size": list(size), "counts": encoded["counts"].decode()},
        "area": segment.area,
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
    }
