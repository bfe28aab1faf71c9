"""Draws masks and prompts over an image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import KDTree

from .segmenter import PromptedObject
from .segments import Segment


# Okabe and Ito's colours, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/), without black.
COLOURS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]]
)


def draw_segments(
    image: np.ndarray, segments: Sequence[Segment], opacity: float = 0.4, colours: Sequence[int] | None = None
) -> np.ndarray:
    """Returns `image` (H, W, 3) uint8 with each segment tinted and outlined, neighbours in different colours.

    Args:
        image: (H, W, 3) uint8.
        segments: In the order in which they are drawn.
        opacity: Of the tint.
        colours: Indices into `COLOURS`, where the same objects are drawn more than once.
    """
    drawn = image.astype(float)
    thickness = line_width(image.shape[:2])
    colours = distinct_colours(segments) if colours is None else colours
    for segment, colour in zip(segments, COLOURS[[*colours]], strict=True):
        if not segment.area:
            continue
        part = drawn[segment.window]
        part[segment.crop] = (1 - opacity) * part[segment.crop] + opacity * colour
        outline = segment.crop & ~ndimage.binary_erosion(segment.crop, iterations=thickness)
        part[outline] = colour
    return drawn.round().astype(np.uint8)


def distinct_colours(segments: Sequence[Segment]) -> list[int]:
    """Returns an index into `COLOURS` for each segment, other than those of the nearest segments before it."""
    number = len(COLOURS)
    boxes = np.array([segment.box for segment in segments]).reshape(-1, 4)
    if not len(boxes):
        return []
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    _, nearest = KDTree(centres).query(centres, k=2 * number)  # where there are fewer, the index is too high
    colours: list[int] = []
    for index, neighbours in enumerate(nearest):
        used = [colours[other] for other in neighbours if other < index]
        free = [colour for colour in range(number) if colour not in used[: number - 1]]
        colours.append(free[index % len(free)])
    return colours


def draw_prompts(image: np.ndarray, objects: Sequence[PromptedObject]) -> np.ndarray:
    """Returns `image` (H, W, 3) uint8 with boxes, and points: white inside of objects, black outside."""
    picture = Image.fromarray(image)
    canvas = ImageDraw.Draw(picture)
    width = line_width(image.shape[:2])
    radius = 3 * width + 1
    for each in objects:
        if each.box is not None:
            canvas.rectangle([float(edge) for edge in each.box], outline="black", width=3 * width)
            canvas.rectangle([float(edge) for edge in each.box], outline="white", width=width)
        for (x, y), label in zip(each.points, each.labels or [1] * len(each.points), strict=True):
            colours = ("white", "black") if label else ("black", "white")
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colours[0], outline=colours[1])
            canvas.line((x - radius / 2, y, x + radius / 2, y), fill=colours[1], width=width)
            if label:
                canvas.line((x, y - radius / 2, x, y + radius / 2), fill=colours[1], width=width)
    return np.asarray(picture)


def line_width(size: tuple[int, int]) -> int:
    """Returns the width of lines that can be seen in an image (H, W), in pixels."""
    return max(1, round(max(size) / 600))
