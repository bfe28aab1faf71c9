"""Where an object is clicked: deep inside it, or where a predicted mask of it is wrong."""

import numpy as np
from scipy import ndimage


def corrective_click(
    predicted: np.ndarray, target: np.ndarray, draw: float | None = None
) -> tuple[tuple[int, int], int]:
    """Returns a pixel where a mask is wrong, and its label.

    Without `draw`, it is the pixel deepest inside of what was missed, or of what was segmented in excess: centre of
    the largest error, as in RITM (https://arxiv.org/abs/2102.06583). With it, any wrong pixel is as likely, as in
    Segment Anything (https://arxiv.org/abs/2304.02643, appendix A). Where nothing is wrong, it is in the object.

    Args:
        predicted: Mask (H, W) bool.
        target: Mask (H, W) bool of the object, not empty.
        draw: A random number from 0 to less than 1.

    Returns:
        The pixel's (row, column), and 1 if the object is there, else 0.
    """
    missed, excess = target & ~predicted, predicted & ~target
    if not missed.any() and not excess.any():
        missed = target
    if draw is not None:
        pixels = np.argwhere(missed | excess)
        row, column = pixels[int(draw * len(pixels))]
    else:
        row, column = max((deepest(mask) for mask in (missed, excess) if mask.any()), key=lambda pixel: pixel[1])[0]
    return (int(row), int(column)), int(target[row, column])


def deepest(mask: np.ndarray) -> tuple[tuple[int, int], float]:
    """Returns the (row, column) of the pixel of `mask` (H, W) farthest from its border, and the distance."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    part = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)  # large images are slow
    depth = ndimage.distance_transform_edt(part)[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return (int(row + rows[0]), int(column + columns[0])), float(depth[row, column])
