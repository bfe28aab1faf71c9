"""Draws images, masks and clicks as large as the page shows them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from segmentation.overlays import draw_prompts, draw_segments
from segmentation.segmenter import PromptedObject
from segmentation.segments import Segment

from .open_image import OpenImage
from .screen_scaling import fitted_segment
from .session import Prompt, Session


def draw(session: Session) -> np.ndarray:
    """Returns the fitted image with all masks, and the clicks on the current object."""
    picture = draw_masks(session.image, session.segments)
    prompt = scaled(session.marks.prompt, picture.shape[1] / session.image.size[1])
    if prompt.points or prompt.box:
        picture = draw_prompts(picture, [PromptedObject(prompt.points, list(prompt.labels), prompt.box)])
    return draw_corner(picture, prompt.corner) if prompt.corner else picture


def draw_masks(image: OpenImage, segments: Sequence[Segment], colours: Sequence[int] | None = None) -> np.ndarray:
    """Returns the fitted image with masks, in colours that `draw_segments` chooses unless they are given."""
    shape = image.fitted.shape[:2]
    scaled_segments = [fitted_segment(segment, image.size, shape) for segment in segments]
    return draw_segments(image.fitted, scaled_segments, colours=colours)


def scaled(prompt: Prompt, scale: float) -> Prompt:
    """Returns a prompt in pixels of the fitted image."""

    def places(numbers: Sequence[float]) -> tuple:
        return tuple(number * scale for number in numbers)

    return Prompt(
        tuple(map(places, prompt.points)),
        prompt.labels,
        prompt.corner and places(prompt.corner),
        prompt.box and places(prompt.box),
    )


def draw_corner(picture: np.ndarray, corner: tuple[float, float]) -> np.ndarray:
    """Returns a picture with a cross at the corner of a box to come."""
    image = Image.fromarray(picture)
    pen, (x, y) = ImageDraw.Draw(image), corner
    for width, colour in ((7, "black"), (3, "white")):
        pen.line([x - 14, y, x + 14, y], fill=colour, width=width)
        pen.line([x, y - 14, x, y + 14], fill=colour, width=width)
    return np.asarray(image)
