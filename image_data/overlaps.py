"""Label images of objects that may overlap, in layers in which each pixel belongs to one object at most.

Labels are (H, W), or (layers, H, W) where objects overlap. An object lies in one layer, whole.
"""

from collections.abc import Iterable

import numpy as np

from .labels import VOID


def layers_of(masks: Iterable[tuple[int, np.ndarray]], size: tuple[int, int], largest: int) -> np.ndarray:
    """Returns labels from the numbers and masks (H, W) of objects: (H, W) if none overlap, or (layers, H, W).

    Args:
        masks: One object after the other, so that no two masks have to be in memory.
        size: Height and width.
        largest: The largest number; the labels have the smallest unsigned integer type that holds it.
    """
    layers: list[np.ndarray] = []
    for number, mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        inside = mask[box]
        layer = next((layer for layer in layers if not layer[box][inside].any()), None)
        if layer is None:
            layers.append(layer := np.zeros(size, dtype=np.min_scalar_type(largest)))
        layer[box][inside] = number
    if not layers:
        return np.zeros(size, dtype=np.uint8)
    return np.stack(layers) if len(layers) > 1 else layers[0]


def void_of(labels: np.ndarray) -> np.ndarray:
    """Returns the mask (H, W) of the pixels without a label."""
    void = labels == VOID
    return void if void.ndim == 2 else void.any(0)


def mask_of(labels: np.ndarray, number: int) -> np.ndarray:
    """Returns the mask (H, W) of the object `number`, whatever overlaps it."""
    mask = labels == number
    return mask if mask.ndim == 2 else mask.any(0)
