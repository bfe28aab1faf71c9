"""What one user does on the page: an image, clicks, masks. Each action returns a new session.

session = Session(open_file(model, Path("photo.png")))
session = add_click(session, (120, 80), "inside")
session = finish_object(session)
session.segments  # the masks
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from image_data.tiles import Window
from segmentation.automatic import Candidates
from segmentation.segmenter import PromptedObject
from segmentation.segments import Segment, by_area
from segmentation.settings import SegmentationSettings

from .open_image import OpenImage, in_window


MOST_OBJECTS = 2000  # to draw, which takes some seconds
MOST_CANDIDATES = 3000  # to keep for other thresholds; those of ViT-B take 330 KB each


class ActionError(ValueError):
    """An action that is not possible now, and what to do instead."""


@dataclass(frozen=True)
class Prompt:
    """The clicks on one object, in pixels of the image.

    Args:
        points: (x, y) of each.
        labels: Of each: 1 inside of the object, 0 outside.
        corner: (x, y) of the first corner of a box, whose second one is still to come.
        box: Left, top, right and bottom.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    corner: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def prompted(self) -> PromptedObject:
        """What is clicked, without a corner."""
        return PromptedObject(points=self.points, labels=list(self.labels), box=self.box)

    @property
    def is_enough(self) -> bool:
        """Whether it says what is inside of the object."""
        return self.box is not None or 1 in self.labels


@dataclass(frozen=True, eq=False)
class SegmentedObject:
    """An object: its mask, and how it was found.

    Args:
        segment: The mask.
        prompt: The clicks on it; None if it was found from the grid.
        choice: Which of the prompt's masks it is.
    """

    segment: Segment
    prompt: Prompt | None = None
    choice: int = 0


@dataclass(frozen=True, eq=False)
class Marks:
    """What an action may change, and what `undo` brings back.

    Args:
        objects: Those that are finished.
        prompt: The clicks on the next one.
        choice: Which of its masks the user has chosen; None for the one that the settings choose.
    """

    objects: tuple[SegmentedObject, ...] = ()
    prompt: Prompt = field(default_factory=Prompt)
    choice: int | None = None


@dataclass(frozen=True, eq=False)
class GridSearch:
    """A search for all objects.

    Args:
        candidates: Masks above the thresholds of `lowest`, tile by tile; none if they were too many to keep.
        lowest: Settings with which the model has run.
        settings: Settings with which the objects were chosen among the candidates.
    """

    candidates: Sequence[tuple[Window, Candidates]]
    lowest: SegmentationSettings
    settings: SegmentationSettings

    def holds(self, settings: SegmentationSettings) -> bool:
        """Whether all masks that are above other thresholds are among the candidates."""
        if not self.candidates:
            return False
        is_stricter = settings.min_iou >= self.lowest.min_iou and settings.min_stability >= self.lowest.min_stability
        return is_stricter and settings.grid == self.lowest.grid


@dataclass(frozen=True, eq=False)
class Session:
    """An image and what is marked in it.

    Args:
        image: The image.
        marks: What is marked in it.
        masks: Masks of the current prompt: SAM's three, and the single one.
        past: Marks before each action.
        search: The last search for all objects.
    """

    image: OpenImage
    marks: Marks = field(default_factory=Marks)
    masks: tuple[Segment, ...] = ()
    past: tuple[Marks, ...] = ()
    search: GridSearch | None = None

    @property
    def choice(self) -> int:
        """Index of the current one of `masks`."""
        return self.marks.choice or 0

    @property
    def current(self) -> SegmentedObject | None:
        """The object that is being clicked on."""
        return SegmentedObject(self.masks[self.choice], self.marks.prompt, self.choice) if self.masks else None

    @property
    def objects(self) -> list[SegmentedObject]:
        """All objects, the current one last."""
        return [*self.marks.objects, *([self.current] if self.current else [])]

    @property
    def segments(self) -> list[Segment]:
        """Their masks."""
        return [each.segment for each in self.objects]


def add_click(session: Session, place: tuple[float, float], mode: str) -> Session:
    """Adds a point (x, y) to the current object, or a corner of its box.

    Raises:
        ActionError: If the place is outside of the image, or no corner of a box.
    """
    height, width = session.image.size
    x, y = place
    if not (0 <= x <= width and 0 <= y <= height):
        raise ActionError(f"({x:g}, {y:g}) is outside of the image of {width} x {height} pixels.")
    prompt = session.marks.prompt
    if mode != "box":
        label = int(mode == "inside")
        prompt = replace(prompt, points=(*prompt.points, place), labels=(*prompt.labels, label), corner=None)
    elif prompt.corner is None:
        prompt = replace(prompt, corner=place)
    else:
        (left, right), (top, bottom) = map(sorted, zip(prompt.corner, place, strict=True))
        if left == right or top == bottom:
            raise ActionError("Both corners are on one line: click on the opposite corner of the box.")
        prompt = replace(prompt, corner=None, box=(left, top, right, bottom))
    return marked(session, prompt=prompt, choice=None)


def choose_mask(session: Session, choice: int) -> Session:
    """Takes another mask of the current prompt.

    Raises:
        ActionError: If there is none.
    """
    if not 0 <= choice < len(session.masks):
        raise ActionError("There is no mask to choose: click on an object first.")
    return session if choice == session.choice else marked(session, choice=choice)


def finish_object(session: Session) -> Session:
    """Keeps the current mask, and starts the next object.

    Raises:
        ActionError: If there is no mask.
    """
    if session.current is None or not session.current.segment.area:
        raise ActionError("There is no mask to keep: click on an object first.")
    return marked(session, objects=tuple(session.objects), prompt=Prompt(), choice=None)


def remove_object(session: Session, number: int) -> Session:
    """Removes object `number`, from 1.

    Raises:
        ActionError: If there is no such object.
    """
    objects = session.marks.objects
    if not 1 <= number <= len(session.objects):
        raise ActionError(f"There is no object {number} to remove: choose one of the table.")
    if number > len(objects):
        return marked(session, prompt=Prompt(), choice=None)
    return marked(session, objects=(*objects[: number - 1], *objects[number:]))


def clear(session: Session) -> Session:
    """Removes all objects and clicks."""
    return marked(session, objects=(), prompt=Prompt(), choice=None)


def undo(session: Session) -> Session:
    """Takes back the last action.

    Raises:
        ActionError: If there is none.
    """
    if not session.past:
        raise ActionError("There is nothing to undo.")
    *past, marks = session.past
    return with_masks(replace(session, marks=marks, past=tuple(past)))


def find_all(session: Session, settings: SegmentationSettings) -> Session:
    """Replaces all objects by those that a grid of points finds.

    The model does not run again if it has found all masks that are above the thresholds before.

    Raises:
        ActionError: If no mask is above the thresholds, or far too many are.
    """
    search = session.search
    if search is None or not search.holds(settings):
        search = GridSearch(session.image.candidates(settings), settings, settings)
    segments = by_area(session.image.model.choose(search.candidates, session.image.size, settings))
    tiles = [candidates for _, candidates in search.candidates]
    if not segments:
        raise ActionError(nothing_found(tiles, settings))
    if len(segments) > MOST_OBJECTS:
        raise ActionError(
            f"{len(segments):,} masks are above the thresholds, and the page shows at most {MOST_OBJECTS:,}: raise "
            "the rating or the stability, lower the overlap, or use segment.py."
        )
    reusable = search.candidates if sum(len(tile.ratings) for tile in tiles) <= MOST_CANDIDATES else ()
    session = replace(session, search=replace(search, candidates=reusable, settings=settings))
    return marked(session, objects=tuple(map(SegmentedObject, segments)), prompt=Prompt(), choice=None)


def nothing_found(tiles: Sequence[Candidates], settings: SegmentationSettings) -> str:
    """Says which threshold no mask passes."""
    rating, stability = (
        max(scores) for scores in zip(*((t.best_rating, t.best_stability) for t in tiles), strict=True)
    )
    if rating < settings.min_iou:
        return (
            f"No mask is rated {settings.min_iou:g} or higher; the best is rated {rating:.2f}. Lower the rating, or "
            "train the model for such images."
        )
    if stability >= settings.min_stability:
        return "All masks are smaller than a pixel: more points per side, or a larger image, may find some."
    return (
        f"No mask with a sufficient rating has a stability of {settings.min_stability:g}; the highest is "
        f"{stability:.2f}. Lower the stability."
    )


def without_adapter(session: Session) -> list[Segment]:
    """Returns what the base model makes of the same prompts and, if objects were found from a grid, of this grid."""
    image = session.image
    segments: list[Segment] = []
    if session.search and any(each.prompt is None for each in session.objects):
        settings = session.search.settings
        segments += by_area(image.model.choose(image.candidates(settings, adapted=False), image.size, settings))
    for each in session.objects:
        if each.prompt:
            segments.append(image.masks(each.prompt.prompted, adapted=False)[each.choice])
    return segments


def marked(session: Session, **changes: Any) -> Session:
    """Returns the session with other marks, after which `undo` brings back the present ones."""
    past = (*session.past, session.marks)
    return with_masks(replace(session, marks=replace(session.marks, **changes), past=past))


def with_masks(session: Session) -> Session:
    """Returns the session with the masks of its prompt."""
    prompt, choice = session.marks.prompt, session.marks.choice
    if not prompt.is_enough:
        return replace(session, masks=())
    masks = session.image.masks(prompt.prompted)
    if choice is None:
        choice = session.image.model.default_choice(masks, in_window(prompt.prompted, 0, 0))
    return replace(session, masks=tuple(masks), marks=replace(session.marks, choice=choice))
