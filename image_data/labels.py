"""What the numbers in masks mean: objects, background, or pixels without a label."""

from dataclasses import dataclass

import numpy as np
from skimage import measure

from .pillow_images import DataError


MOST_NUMBERS = 2**16
VOID = -1  # in labels: pixels that are neither object nor background, and do not count in the loss


@dataclass(frozen=True)
class LabelReading:
    """How the numbers in a mask become objects. None is for what the masks themselves tell.

    Args:
        background: The numbers of the background. If 0 is not among them, it is an object.
        void: Numbers of pixels without a label; empty if there are none.
        instances: `labels` if each number is an object, `components` if each connected part of a number is one.
        threshold: Lowest value of an object, in masks of one object with soft edges.
        turn_masks: Whether masks without an orientation tag are turned as their images.

    Raises:
        DataError: If a field is out of range.
    """

    background: tuple[int, ...] | None = None
    void: tuple[int, ...] | None = None
    instances: str | None = None
    threshold: int | None = None
    turn_masks: bool = False

    def __post_init__(self) -> None:
        for name in ("background", "void"):
            if getattr(self, name) is not None:  # JSON has lists
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.instances not in (None, "labels", "components"):
            raise DataError([f"--instances {self.instances}: expected labels or components."])
        if self.threshold is not None and self.threshold < 1:
            raise DataError([f"--threshold {self.threshold}: expected 1 or more."])

    @property
    def given(self) -> list[str]:
        """The names of the fields that say what numbers mean."""
        return [name for name in ("background", "void", "instances", "threshold") if getattr(self, name) is not None]

    def objects(self, mask: np.ndarray) -> np.ndarray:
        """Returns labels (H, W) of a mask (H, W) of integers: 0 for background, `VOID`, and a number for each object.

        Objects keep their numbers, but for 0, for `components`, and where there are numbers above `MOST_NUMBERS`. The
        labels have the smallest type that holds them.

        Raises:
            ValueError: If a number is negative, and not void.
        """
        if self.threshold is not None:
            mask = mask >= self.threshold
        numbers = self.background or (0,)
        void = np.isin(mask, self.void) if self.void else None
        others = mask if void is None else mask[~void]
        if (lowest := others.min(initial=0)) < 0 and lowest not in numbers:
            raise ValueError(
                f"negative label {lowest}; labels must be 0 (background) or positive. If it marks pixels without a "
                f"label, say --void {lowest}."
            )
        largest = int(others.max(initial=0)) + (0 not in numbers)
        labels = mask.astype(type_for(largest, void))
        if 0 not in numbers:
            labels[mask == 0] = largest
        if numbers != (0,):
            labels[np.isin(mask, numbers)] = 0
        if void is not None:
            labels[void] = 0
        if self.instances == "components" or largest > MOST_NUMBERS:
            labels = with_new_numbers(labels, self.instances == "components")
            labels = labels.astype(type_for(int(labels.max(initial=0)), void))
        if void is not None and void.any():
            labels[void] = VOID
        return labels


def with_new_numbers(labels: np.ndarray, are_components: bool) -> np.ndarray:
    """Numbers the objects, or their connected parts, from 1; 0 stays 0."""
    if are_components:
        return measure.label(labels, background=0, connectivity=2)
    numbers, places = np.unique(labels, return_inverse=True)
    return places.reshape(labels.shape) + (0 not in numbers)


def type_for(largest: int, void: np.ndarray | None) -> np.dtype:
    """The smallest type of labels up to `largest`, and of `VOID` if there is any."""
    return np.min_scalar_type(largest if void is None or not void.any() else -largest - 1)
