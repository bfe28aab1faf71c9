"""Sources of images and the labels of the objects in them: files in pairs, and a photograph of coins."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import data, filters, measure, morphology, segmentation

from .images import IMAGE_SUFFIXES, MASK_SUFFIXES, as_rgb, read_image, read_mask


class DataError(ValueError):
    """Problems with the input files, one line per problem."""

    def __init__(self, problems: Iterable[str], most: int = 20):
        problems = list(problems)
        more = [f"and {len(problems) - most} more"] if len(problems) > most else []
        super().__init__("\n".join([*problems[:most], *more]))


@dataclass
class LabelledImage:
    """An image and the objects in it.

    Args:
        image: (H, W, 3) uint8.
        labels: Integers (H, W), 0 for background and another number for each object; (layers, H, W) if objects overlap
            (`overlaps.py`).
        categories: The category of each object, by number, as far as the source has categories.
        left_out: How many objects of the image were left out, by reason.
    """

    image: np.ndarray
    labels: np.ndarray
    categories: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


class Source(ABC):
    """A source of one image and its labels."""

    name: str

    @abstractmethod
    def read(self) -> LabelledImage:
        """Returns the image and its objects.

        Raises:
            ValueError: If there is something wrong, in one line that names the file.
        """


@dataclass(eq=False)
class FilePair(Source):
    """An image file and a mask file with one integer per object."""

    image: Path
    mask: Path

    def __post_init__(self) -> None:
        self.name = str(self.image)

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
        return LabelledImage(read_image(self.image), read_mask(self.mask))


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
        return LabelledImage(as_rgb(image), measure.label(morphology.remove_small_objects(filled, max_size=200)))


@dataclass
class SourceList:
    """Sources, how many of the things in the files are left out by reason, and notes on how they were read."""

    sources: list[Source]
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def paired_files(images: Path, masks: Path) -> list[Source]:
    """Pairs image and mask files of the same name (without suffix) in two folders.

    Raises:
        DataError: With every file that has no partner, or more than one.
    """
    files_by_stem: list[dict[str, Path]] = []
    problems = []
    for folder, suffixes in ((images, IMAGE_SUFFIXES), (masks, MASK_SUFFIXES)):
        if not folder.is_dir():
            raise DataError([f"{folder} is not a folder."])
        by_stem: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() not in suffixes:
                problems.append(
                    f"{path}: unsupported file type, expected one of {', '.join(suffixes)}. Convert it or remove "
                    "it from the folder."
                )
            elif path.stem in by_stem:
                problems.append(f"{path}: has the same name as {by_stem[path.stem]}.")
            else:
                by_stem[path.stem] = path
        files_by_stem.append(by_stem)
    (by_image, by_mask), folders = files_by_stem, (masks, images)
    for alone, other, folder in ((by_image, by_mask, folders[0]), (by_mask, by_image, folders[1])):
        problems += [f"{path}: no file {stem}.* in {folder}." for stem, path in alone.items() if stem not in other]
    if not problems and not by_image:
        problems = [f"{images} holds no image ({', '.join(IMAGE_SUFFIXES)})."]
    if problems:
        raise DataError(problems)
    return [FilePair(path, by_mask[stem]) for stem, path in by_image.items()]
