"""The image as large as the page shows it: scaled, so that masks and clicks have to be scaled, too."""

import numpy as np
from PIL import Image

from segmentation.segments import Segment


LONG_SIDE = 1024  # pixels: enough for a screen, little enough to send after each click


def fitted(image: np.ndarray) -> np.ndarray:
    """Returns an image (H, W, 3) whose longer side is scaled to `LONG_SIDE`."""
    height, width = image.shape[:2]
    scale = LONG_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def place_in_image(place: tuple[int, int], shown: tuple[int, ...], size: tuple[int, ...]) -> tuple[float, float]:
    """Returns the (x, y) in an image of `size` (height, width) that lies at a pixel of its version of size `shown`."""
    return (place[0] + 0.5) * size[1] / shown[1], (place[1] + 0.5) * size[0] / shown[0]


def fitted_segment(segment: Segment, size: tuple[int, int], new_size: tuple[int, int]) -> Segment:
    """Returns a segment in an image that was scaled from `size` to `new_size`."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(size, new_size, strict=True))
    left, top, right, bottom = segment.box
    rows_in, columns_in = (
        np.flatnonzero((numbers >= start) & (numbers < stop))
        for numbers, start, stop in ((rows, top, bottom), (columns, left, right))
    )
    crop = segment.crop[np.ix_(rows[rows_in] - top, columns[columns_in] - left)]
    first_row, first_column = (int(part[0]) if len(part) else 0 for part in (rows_in, columns_in))
    return Segment(first_column, first_row, crop, segment.rating, segment.stability)
