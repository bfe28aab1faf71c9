"""Joins what was found in overlapping tiles of an image."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from image_data.tiles import Window, tiles

from .segments import Segment, distinct_segments, segment_of


AGREEMENT = 0.5  # IoU in the part of the image that both tiles show, from which on two masks are of one object
MARGIN = 2  # pixels from the edge of a tile, in which a mask that is cut off ends


def tile_windows(size: tuple[int, int], side: int | None, overlap: float) -> list[Window]:
    """Returns windows of at most `side` pixels that cover an image (H, W); one of the whole image without a side."""
    return list(tiles((slice(0, size[0]), slice(0, size[1])), side, overlap))


def joined(
    groups: Sequence[tuple[Window, Sequence[Segment]]], size: tuple[int, int], max_overlap: float
) -> list[Segment]:
    """Returns the objects of an image (H, W) whose tiles show them, or parts of them; best rated first.

    Masks of two tiles are of one object if they agree where both tiles show it. Of those that are not cut off by the
    edge of their tile, the best rated is taken; if all are cut off, they are put together.

    Args:
        groups: Each tile's window, and the segments that were found in it, in pixels of the image.
        size: Height and width of the image.
        max_overlap: Highest IoU of two objects of the result.
    """
    if len(groups) == 1:
        return list(groups[0][1])
    windows = [window for window, segments in groups for _ in segments]
    segments = [segment for _, segments in groups for segment in segments]
    number, objects = connected_components(same_object(segments, windows), directed=False)
    whole = np.array([not is_cut_off(*pair, size) for pair in zip(segments, windows, strict=True)], dtype=bool)
    results = []
    for index in range(number):
        parts = np.flatnonzero(objects == index)
        if whole[parts].any():
            results.append(max((segments[part] for part in parts[whole[parts]]), key=lambda part: part.rating))
        else:
            results.append(union([segments[part] for part in parts]))
    return distinct_segments(results, max_overlap)


def same_object(segments: Sequence[Segment], windows: Sequence[Window]) -> coo_array:
    """Returns which segments of different tiles show the same object, as a sparse matrix (n, n)."""
    boxes = np.array([segment.box for segment in segments]).reshape(-1, 4)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    pairs = [
        (first, second)
        for first, second in np.argwhere(np.triu((low < high).all(-1), 1))
        if windows[first] != windows[second]
        and agreement(segments[first], segments[second], shared(windows[first], windows[second])) > AGREEMENT
    ]
    rows, columns = np.array(pairs, dtype=int).reshape(-1, 2).T
    return coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(segments),) * 2)


def shared(first: Window, second: Window) -> Window:
    """Returns the part of the image that two windows show."""
    rows, columns = (slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return rows, columns


def agreement(first: Segment, second: Segment, window: Window) -> float:
    """Returns the IoU of two segments in a window of the image."""
    if any(part.stop <= part.start for part in window):
        return 0.0
    origin, shape = (window[0].start, window[1].start), tuple(part.stop - part.start for part in window)
    masks = np.zeros((2, *shape), dtype=bool)
    for mask, segment in zip(masks, (first, second), strict=True):
        rows, columns = shared(segment.window, window)
        if rows.start < rows.stop and columns.start < columns.stop:
            top, left = rows.start - origin[0], columns.start - origin[1]
            part = segment.part((rows, columns))
            mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    either = np.count_nonzero(masks[0] | masks[1])
    return np.count_nonzero(masks[0] & masks[1]) / either if either else 0.0


def is_cut_off(segment: Segment, window: Window, size: tuple[int, int]) -> bool:
    """Whether a segment ends at an edge of its tile that is not one of the image (H, W)."""
    return any(
        (tile.start > 0 and part.start < tile.start + MARGIN) or (tile.stop < edge and part.stop > tile.stop - MARGIN)
        for part, tile, edge in zip(segment.window, window, size, strict=True)
    )


def union(segments: Sequence[Segment]) -> Segment:
    """Returns what any of the segments covers; ratings and stabilities are means, weighted by area."""
    if len(segments) == 1:
        return segments[0]
    boxes = np.array([segment.box for segment in segments])
    (left, top), (right, bottom) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for segment in segments:
        rows, columns = segment.window
        mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] |= segment.crop
    areas = [segment.area for segment in segments]
    rating, stability = (
        float(np.average([getattr(segment, name) for segment in segments], weights=areas))
        for name in ("rating", "stability")
    )
    return segment_of(mask, rating, stability, offset=(int(top), int(left)))
