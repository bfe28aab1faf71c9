"""Where an object is clicked."""

import numpy as np
import pytest

from segmentation.corrective_clicks import corrective_click, deepest


@pytest.fixture
def target() -> np.ndarray:
    mask = np.zeros((30, 40), dtype=bool)
    mask[5:16, 10:31] = True
    return mask


def test_the_largest_error_is_clicked_in_its_middle(target):
    predicted = target.copy()
    predicted[5:16, 25:] = False  # 11 x 6 pixels missed
    predicted[20:23, 3:6] = True  # 3 x 3 in excess
    (row, column), label = corrective_click(predicted, target)
    assert label == 1 and 7 <= row <= 13 and column in (27, 28)
    predicted[18:29, 20:39] = True  # 11 x 19 in excess
    assert corrective_click(predicted, target) == ((23, 25), 0)


def test_any_wrong_pixel_is_as_likely(target):
    predicted = np.zeros_like(target)
    predicted[5:16, 21:39] = True
    draws = (np.arange(10_000) + 0.5) / 10_000
    clicks = [corrective_click(predicted, target, draw) for draw in draws]
    pixels = {pixel for pixel, _ in clicks}
    assert pixels == set(map(tuple, np.argwhere(predicted != target).tolist()))
    assert all(label == target[pixel] for pixel, label in clicks)
    missed = np.mean([label for _, label in clicks])
    assert missed == pytest.approx((target & ~predicted).sum() / (target != predicted).sum(), abs=1e-3)


@pytest.mark.parametrize("draw", [None, 0.0, 0.7, 1 - 1e-9])
def test_a_perfect_mask_is_confirmed(target, draw):
    (row, column), label = corrective_click(target, target, draw)
    assert target[row, column] and label == 1


def test_deepest_pixel_counts_the_border_of_the_image():
    mask = np.zeros((9, 20), dtype=bool)
    mask[:, :9] = True
    assert deepest(mask) == ((4, 4), 5.0)
