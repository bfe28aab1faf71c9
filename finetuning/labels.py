"""What the numbers in masks mean: objects, background, or pixels without a label."""

from dataclasses import dataclass

import numpy as np
from skimage import measure

from .decoding import DataError


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

    def objects(self, mask: np.ndarray) -> np.ndarray:
        """Returns labels (H, W) of a mask (H, W) of integers: 0 for background, `VOID`, and a number for each object.

        Objects keep their numbers, but for 0, and for `components`. The labels have the smallest type that holds them.

        Raises:
            ValueError: If a number is negative, and not void.
        """
        if self.threshold is not None:
            mask = mask >= self.threshold
        void = np.isin(mask, self.void or ())
        background = np.isin(mask, self.background or (0,)) | void
        kept = mask[~background]
        if kept.size and (lowest := kept.min()) < 0:
            raise ValueError(
                f"negative label {lowest}; labels must be 0 (background) or positive. If it marks pixels without a "
                f"label, say --void {lowest}."
            )
        largest = int(kept.max(initial=0)) + 1
        labels = mask.astype(type_for(largest, void))
        labels[mask == 0] = largest
        labels[background] = 0
        if self.instances == "components":
            labels = measure.label(labels, background=0, connectivity=2)
            labels = labels.astype(type_for(int(labels.max(initial=0)), void))
        if void.any():
            labels[void] = VOID
        return labels


def type_for(largest: int, void: np.ndarray) -> np.dtype:
    """The smallest type of labels up to `largest`, and of `VOID` if there is any."""
    return np.min_scalar_type(-largest - 1 if void.any() else largest)
