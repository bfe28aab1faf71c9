"""Facts about a mask that tell what its numbers may mean."""

from dataclasses import dataclass

import numpy as np
from skimage import measure


@dataclass
class MaskFacts:
    """What is remembered of an examined mask.

    Args:
        name: Of the file.
        numbers: The numbers in it, in ascending order, 0 included.
        areas: The pixels of each.
        parts: How many separate parts each has, without specks.
        surrounding: The number, not 0, that fills the mask or surrounds all others; None if there is none.
        outline: Length of the outlines of all objects but the largest number.
        outline_at_largest: The part of it that touches the largest number.
        scraps: How many numbers are scattered in scraps of one or two pixels at the borders of others.
    """

    name: str
    numbers: np.ndarray
    areas: np.ndarray
    parts: np.ndarray
    surrounding: int | None
    outline: int
    outline_at_largest: int
    scraps: int

    def others(self, *numbers: int) -> np.ndarray:
        """Which of `numbers` (n,) are not among these."""
        return ~np.isin(self.numbers, numbers)


def examine(mask: np.ndarray, name: str, background: tuple[int, ...] = (0,)) -> MaskFacts:
    """Returns the facts about a mask (H, W) of integers; numbers of the background have no parts."""
    numbers, index = with_consecutive_numbers(mask)
    areas = np.bincount(index.ravel(), minlength=len(numbers))
    is_object = ~np.isin(numbers, background)
    places = np.where(is_object, np.arange(1, len(numbers) + 1), 0).astype(np.int32)
    regions = measure.label(places[index], background=0, connectivity=2)
    sizes = np.bincount(regions.ravel())
    owners = np.zeros(len(sizes), dtype=np.intp)
    owners[regions.ravel()] = index.ravel()
    sizes, owners = sizes[1:], owners[1:]  # regions are numbered from 1
    largest_parts = np.zeros(len(numbers), dtype=np.intp)
    np.maximum.at(largest_parts, owners, sizes)
    is_no_speck = sizes >= np.maximum(1, largest_parts[owners] / 20)
    parts = np.bincount(owners[is_no_speck], minlength=len(numbers))
    pairs = neighbours(index)
    touches_object = np.zeros(len(numbers), dtype=bool)
    touches_object[pairs[is_object[pairs].all(1)]] = True
    is_scrap = is_object & touches_object & (areas < 3 * np.bincount(owners, minlength=len(numbers)))
    at_largest = (pairs == len(numbers) - 1).any(1)
    of_others = (is_object[pairs] & (pairs < len(numbers) - 1)).any(1)
    return MaskFacts(
        name,
        numbers,
        areas,
        parts,
        surrounding(index, numbers, pairs),
        int(of_others.sum()),
        int((of_others & at_largest).sum()),
        int(is_scrap.sum()),
    )


def with_consecutive_numbers(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers in a mask in ascending order, and the place of each pixel's number among them."""
    if mask.dtype == bool:
        mask = mask.astype(np.uint8)
    if mask.dtype.itemsize > 2 or mask.dtype.kind == "i":
        numbers, index = np.unique(mask, return_inverse=True)
        return numbers, index.reshape(mask.shape).astype(np.int32)
    occurs = np.zeros(2 ** (8 * mask.dtype.itemsize), dtype=bool)
    occurs[mask.ravel()] = True
    places = np.cumsum(occurs, dtype=np.int32) - 1
    return np.flatnonzero(occurs), places[mask.astype(np.uint16, copy=False)]


def neighbours(index: np.ndarray) -> np.ndarray:
    """Returns the numbers (n, 2) of all pairs of pixels beside or below each other that differ."""
    pairs = [(index[:, :-1], index[:, 1:]), (index[:-1], index[1:])]
    return np.concatenate([np.stack([first, second], -1)[first != second] for first, second in pairs])


def surrounding(index: np.ndarray, numbers: np.ndarray, pairs: np.ndarray) -> int | None:
    """Returns the number that fills the mask, or lies on all of its sides and around all else, if it is not 0."""
    sides = [index[0], index[-1], index[:, 0], index[:, -1]]
    border = np.bincount(np.concatenate(sides))
    commonest = int(border.argmax())
    is_around = (pairs == commonest).any(1).sum() >= 0.4 * len(pairs) and 2 * border[commonest] > border.sum()
    if numbers[commonest] == 0 or not is_around or not all((side == commonest).any() for side in sides):
        return None
    return int(numbers[commonest])
