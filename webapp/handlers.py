"""What the page does when something is clicked on: plain functions, whose errors the page shows as messages."""

import functools
import html
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from segmentation.settings import SegmentationSettings

from . import session as actions
from .downloads import annotations_of
from .model import SharedModel
from .open_image import open_file
from .session import ActionError, Session


def message_of(error: Exception) -> str:
    """Returns what the page says of an error. Messages may contain HTML there: the texts of users must not."""
    if isinstance(error, gr.Error):  # of a Space that has no GPU to lend now
        return error.message
    if isinstance(error, ValueError):
        return html.escape(str(error), quote=False)
    logging.getLogger(__name__).error("A handler of the page failed.", exc_info=error)
    return f"This should not happen: {type(error).__name__}. The server's log says more."


def warns(handler: Callable[..., Any], outputs: int) -> Callable[..., Any]:
    """Makes errors of a handler messages on the page, which otherwise stays as it is.

    Args:
        handler: Returns what becomes of the outputs.
        outputs: Their number.
    """

    @functools.wraps(handler)
    def safe(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            gr.Warning(message_of(error), title="That did not work")
        return [gr.skip()] * outputs if outputs > 1 else gr.skip()

    return safe


def raises(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Makes errors of a handler errors of the program that has called it."""

    @functools.wraps(handler)
    def safe(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise gr.Error(message_of(error), print_exception=False) from None

    return safe


def segment_file(
    model: SharedModel,
    path: str | None,
    points: list[list[float]] | None,
    box: list[float] | None,
) -> dict[str, Any]:
    """Segments one object, or all without points and a box.

    Args:
        model: The model.
        path: An uploaded image.
        points: (x, y, label) of each, label 1 inside of the object and 0 outside.
        box: Left, top, right and bottom.

    Returns:
        COCO annotations.

    Raises:
        ValueError: If an argument is not as described.
    """
    if path is None:
        raise ValueError("image: expected a file.")
    session = Session(open_file(model, Path(path)))
    for x, y, label in checked(points or [], 3, "points"):
        session = actions.add_click(session, (x, y), "inside" if label else "outside")
    for left, top, right, bottom in checked([box] if box else [], 4, "box"):
        for corner in ((left, top), (right, bottom)):
            session = actions.add_click(session, corner, "box")
    if not points and not box:
        session = actions.find_all(session, model.settings)
    return annotations_of(session).content


def checked(rows: Any, length: int, name: str) -> list[list[float]]:
    """Returns lists of `length` numbers.

    Raises:
        ValueError: If they are something else.
    """
    is_numbers = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == length and all(isinstance(number, int | float) for number in row)
        for row in rows
    )
    if not is_numbers:
        raise ValueError(f"{name}: expected {length} numbers each, got {str(rows)[:80]}.")
    return rows


def required(session: Session | None) -> Session:
    """Returns the session.

    Raises:
        ActionError: If there is none, or no more.
    """
    if session is None:
        raise ActionError("No image is open, or it was closed after an hour without a click: open one.")
    return session


def settings_of(model: SharedModel, values: Sequence[float]) -> SegmentationSettings:
    """Returns the settings with the values of the sliders: rating, stability, overlap and grid."""
    min_iou, min_stability, max_overlap, grid = values
    return model.settings.but(min_iou=min_iou, min_stability=min_stability, max_overlap=max_overlap, grid=int(grid))


def table_of(session: Session) -> list[list[Any]]:
    """Returns a row for each object, with the columns of the page's table."""
    rows = []
    for number, segment in enumerate(session.segments, start=1):
        left, top, right, bottom = segment.box
        box = f"{left}, {top}: {right - left} x {bottom - top}"
        rows.append([number, segment.area, box, f"{segment.rating:.2f}", f"{segment.stability:.2f}"])
    return rows


def choices_of(session: Session) -> list[tuple[str, int]]:
    """Returns the masks to choose from, with their ratings, and their indices."""
    names = ["A", "B", "C", "Single"]
    return [
        (f"{name} {mask.rating:.2f}", index)
        for index, (name, mask) in enumerate(zip(names, session.masks, strict=False))
    ]


def status_of(session: Session) -> str:
    """Says how many objects there are, and what to do next."""
    number = len(session.objects)
    if session.marks.prompt.corner:
        return "Click on the **opposite corner** of the box."
    if session.current and not session.current.segment.area:
        return "**The mask is empty:** choose another one, or click again."
    if session.current:
        objects = f"{number} object{'s' if number > 1 else ''}."
        return f"**{objects}** Click again to correct the mask, or choose *Next object*."
    if session.marks.prompt.points:
        return "Now click **in the object**, or draw a box around it."
    if number:
        return f"**{number} object{'s' if number > 1 else ''}.** Click on the next one."
    return "**Click on an object** in the picture."
