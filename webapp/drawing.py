"""Draws images, masks and clicks as large as the page shows them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from finetuning.pictures import overlay
from finetuning.segments import Segment

from .screen import fitted_mask
from .session import Prompt, Session


INSIDE, OUTSIDE, BOX = "#0072b2", "#d55e00", "#ffffff"  # of Okabe and Ito: distinct for the colour-blind


def draw(session: Session) -> np.ndarray:
    """Returns the fitted image with all masks, and the clicks on the current object."""
    picture = Image.fromarray(draw_masks(session, session.segments))
    draw_prompt(picture, session.marks.prompt, picture.width / session.image.shape[1])
    return np.asarray(picture)


def draw_masks(session: Session, segments: Sequence[Segment]) -> np.ndarray:
    """Returns the fitted image with masks."""
    shape = session.fitted.shape[:2]
    masks = [fitted_mask(segment, session.image.shape[:2], shape) for segment in segments]
    return overlay(session.fitted, np.reshape(masks, (len(masks), *shape)).astype(bool))


def draw_prompt(picture: Image.Image, prompt: Prompt, scale: float) -> None:
    """Draws points as discs with a plus or a minus, a box, and the corner of a box to come."""
    pen = ImageDraw.Draw(picture)
    if prompt.box:
        box = [edge * scale for edge in prompt.box]
        pen.rectangle(box, outline="black", width=5)
        pen.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=BOX, width=3)
    for (x, y), label in zip(prompt.points, prompt.labels, strict=True):
        draw_point(pen, x * scale, y * scale, label)
    if prompt.corner:
        x, y = (edge * scale for edge in prompt.corner)
        for width, colour in ((7, "black"), (3, BOX)):
            pen.line([x - 14, y, x + 14, y], fill=colour, width=width)
            pen.line([x, y - 14, x, y + 14], fill=colour, width=width)


def draw_point(pen: ImageDraw.ImageDraw, x: float, y: float, label: int) -> None:
    """Draws a disc with a plus (inside) or a minus (outside)."""
    pen.ellipse([x - 11, y - 11, x + 11, y + 11], fill=INSIDE if label else OUTSIDE, outline="white", width=2)
    pen.line([x - 5, y, x + 5, y], fill="white", width=3)
    if label:
        pen.line([x, y - 5, x, y + 5], fill="white", width=3)
