"""Objects that several tiles of an image show."""

import numpy as np
import pytest
from scipy import ndimage

from segmentation.joining_tiles import joined, tile_windows
from segmentation.segments import Segment, as_labels, iou_matrix, segment_of, segments_of


def predicted(labels: np.ndarray, side: int, overlap: float, ratings=lambda number: 0.9) -> list:
    """What a perfect model finds in each tile."""
    groups = []
    for window in tile_windows(labels.shape, side, overlap):
        offset = window[0].start, window[1].start
        part = labels[window]
        numbers = np.setdiff1d(part, [0])
        groups.append((window, [segment_of(part == n, ratings(n), 0.8, offset) for n in numbers]))
    return groups


def cells(shape: tuple[int, int] = (150, 210), size: float = 4) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), size)
    return ndimage.label(noise > noise.std())[0]


@pytest.mark.parametrize("size", [3, 8], ids=["smaller than the overlap", "larger than a tile"])
@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
def test_objects_are_whole_again(size, overlap):
    labels = cells(size=size)
    truth = segments_of(labels)
    assert len(truth) > 5
    segments = joined(predicted(labels, 64, overlap), labels.shape, 0.5)
    assert len(segments) == len(truth)
    assert iou_matrix(truth, segments).max(1).tolist() == [1] * len(truth)
    assert sorted(np.unique(as_labels(segments, labels.shape), return_counts=True)[1]) == sorted(
        np.unique(labels, return_counts=True)[1]
    )


def test_whole_masks_go_before_parts_and_better_ones_before_worse():
    labels = np.zeros((20, 60), int)
    labels[5:15, 22:30] = 1
    (first, one), (second, two) = predicted(labels, 40, 0.5)
    assert (one[0].box, two[0].box) == ((22, 5, 30, 15), (22, 5, 30, 15))
    worse = Segment(22, 5, np.ones((10, 7), bool), 0.5, 0.8)
    (segment,) = joined([(first, [worse]), (second, two)], labels.shape, 0.9)
    assert segment.area == 80
    cut = Segment(20, 5, np.ones((10, 10), bool), 0.99, 0.8)  # at the left edge of the second tile
    (segment,) = joined([(first, one), (second, [cut])], labels.shape, 0.9)
    assert segment.area == 80


def test_neighbours_that_touch_stay_apart():
    labels = np.zeros((20, 60), int)
    labels[5:15, 20:30], labels[5:15, 30:40] = 1, 2
    assert len(joined(predicted(labels, 40, 0.5), labels.shape, 0.5)) == 2


def test_overlapping_masks_of_one_tile_stay_apart():
    labels = np.zeros((20, 60), int)
    labels[5:15, 5:15] = 1
    (first, one), (second, _) = predicted(labels, 40, 0.5)
    nested = Segment(5, 5, np.ones((10, 8), bool), 0.8, 0.8)  # IoU 0.8
    assert len(joined([(first, [*one, nested]), (second, [])], labels.shape, 0.9)) == 2


def test_parts_that_are_put_together_keep_their_mean_rating():
    labels = np.zeros((20, 100), int)
    labels[5:15, 10:90] = 1
    (segment,) = joined(predicted(labels, 40, 0.5), labels.shape, 0.5)
    assert (segment.area, segment.rating, segment.stability) == (800, pytest.approx(0.9), pytest.approx(0.8))


def test_one_tile_is_left_as_it_is():
    labels = cells()
    windows = tile_windows(labels.shape, None, 0.25)
    assert windows == [(slice(0, 150), slice(0, 210))]
    assert len(joined([(windows[0], segments_of(labels))], labels.shape, 0.5)) == labels.max()
    assert joined([], labels.shape, 0.5) == joined([(windows[0], [])], labels.shape, 0.5) == []
