"""Label images of objects that may overlap, in layers in which each pixel belongs to one object at most.

Labels are (H, W), or (layers, H, W) where objects overlap. An object lies in one layer, whole.
"""

from collections.abc import Mapping

import numpy as np


def layers_of(masks: Mapping[int, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Returns the masks (H, W) of objects, by number, as labels: (H, W) if none overlap, otherwise (layers, H, W).

    The labels have the smallest unsigned integer type that holds the numbers.
    """
    layers: list[np.ndarray] = []
    dtype = np.min_scalar_type(max(masks, default=0))
    for number, mask in masks.items():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        layer = next((layer for layer in layers if not layer[box][mask[box]].any()), None)
        if layer is None:
            layers.append(layer := np.zeros(size, dtype=dtype))
        layer[box][mask[box]] = number
    return np.stack(layers) if len(layers) > 1 else layers[0] if layers else np.zeros(size, dtype=dtype)


def mask_of(labels: np.ndarray, number: int) -> np.ndarray:
    """Returns the mask (H, W) of the object `number`, whatever lies over it."""
    mask = labels == number
    return mask if mask.ndim == 2 else mask.any(0)
