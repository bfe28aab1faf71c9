"""What a source of images and the labels of the objects in them is, and one: a photograph of coins."""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from skimage import data, filters, measure, morphology, segmentation

from .images import as_rgb


@dataclass
class LabelledImage:
    """An image and the objects in it.

    Args:
        image: (H, W, 3) uint8.
        labels: Integers (H, W), 0 for background, `labels.VOID` for pixels without a label, and another number for
            each object; (layers, H, W) if objects overlap (`overlaps.py`).
        categories: The category of each object, by number, as far as the source has categories.
        left_out: How many objects of the image were left out, by reason.
        notes: How often something was done that the user should know of, by what it was.
    """

    image: np.ndarray
    labels: np.ndarray
    categories: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def nbytes(self) -> int:
        """The memory of pixels and labels, in bytes."""
        return self.image.nbytes + self.labels.nbytes


class Source(ABC):
    """A source of one image and its labels.

    Args:
        name: How notes and errors name it.
        group: Sources of one group are not divided between training and validation; None for no group.
    """

    name: str
    group: str | None = None

    @abstractmethod
    def read(self) -> LabelledImage:
        """Returns the image and its objects.

        Raises:
            ValueError: If there is something wrong, in one line that names the file.
        """


class Coins(Source):
    """The photograph of coins that comes with scikit-image, labelled by watershed.

    As in https://scikit-image.org/docs/0.26.x/auto_examples/applications/plot_coins_segmentation.html.
    """

    name = "skimage.data.coins()"

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
        image = data.coins()
        markers = np.zeros_like(image)
        markers[image < 30], markers[image > 150] = 1, 2
        filled = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
        labels = measure.label(morphology.remove_small_objects(filled, max_size=200))
        return LabelledImage(as_rgb(image), labels.astype(np.uint8))


@dataclass
class SourceList:
    """Sources, how many of the things in the files are left out by reason, and notes on how they were read."""

    sources: list[Source]
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
