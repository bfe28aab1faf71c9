"""Image files and mask files that belong together by their names, in folders and the folders below them."""

from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .images import (
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    labels_of,
    number_of_pages,
    read_pixels,
    rgb_of,
    turn_with_image,
)
from .labels import LabelReading
from .mask_interpretation import interpret_masks
from .overlaps import layers_of
from .patterns import Pattern, checked_folder, files_in
from .pillow_images import DataError, ImageReading, Pixels, number_of
from .sources import LabelledImage, Source, SourceList


MAX_COLOURS = 4096  # more are no objects, but soft edges or a photograph


@dataclass(eq=False)
class FilePair(Source):
    """An image file and a mask file with one integer per object."""

    image: Path
    mask: Path
    page: int | None = None
    reading: ImageReading = ImageReading()
    labels: LabelReading = LabelReading()

    def __post_init__(self) -> None:
        self.name = str(self.image) if self.page is None else f"{self.image}, page {self.page + 1}"

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
        pixels = read_pixels(self.image, self.reading, self.page)
        mask = self.read_mask()
        note = turn_with_image(mask, pixels, self.labels.turn_masks)
        image, labels = rgb_of(pixels, self.reading, self.image), self.labels_of(mask)
        return LabelledImage(image, labels, notes=Counter([note] if note else []))

    @property
    def mask_name(self) -> str:
        """The mask file, and the page of it."""
        return str(self.mask) if self.page is None else f"{self.mask}, page {self.page + 1}"

    def numbers(self) -> np.ndarray:
        """Reads the integers (H, W) of the mask file.

        Raises:
            ValueError: If it cannot be read.
        """
        return self.numbers_of(self.read_mask())

    def read_mask(self) -> Pixels:
        """Returns the pixels of the mask file."""
        return read_pixels(self.mask, self.reading, self.page, as_labels=True)

    def labels_of(self, mask: Pixels) -> np.ndarray:
        """Returns the labels (H, W) that the pixels of the mask file mean.

        Raises:
            ValueError: If they have no meaning.
        """
        try:
            return self.labels.objects(self.numbers_of(mask))
        except ValueError as error:
            prefix = "" if str(error).startswith(str(self.mask)) else f"{self.mask}: "
            raise ValueError(f"{prefix}{error}") from error

    def numbers_of(self, mask: Pixels) -> np.ndarray:
        """Returns the integers (H, W) of the mask file."""
        return labels_of(mask, self.mask)


class ColouredPair(FilePair):
    """An image file and a mask file with one colour per object."""

    def read_mask(self) -> Pixels:  # noqa: D102, as in FilePair
        return read_pixels(self.mask, ImageReading(pages=self.reading.pages), self.page)

    def numbers_of(self, mask: Pixels) -> np.ndarray:  # noqa: D102, as in FilePair
        if mask.values.dtype.itemsize > 1:
            raise ValueError(
                f"{self.mask}: expected colours of 8 bits for --color-masks, which masks of numbers do without."
            )
        return numbers_of_colours(rgb_of(mask, ImageReading(), self.mask), self.mask)


@dataclass(eq=False)
class ObjectFiles(Source):
    """An image file and a mask file for each object in it."""

    image: Path
    masks: list[Path]
    reading: ImageReading = ImageReading()
    labels: LabelReading = LabelReading()

    def __post_init__(self) -> None:
        self.name = str(self.image)

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
        pixels = read_pixels(self.image, self.reading)
        image = rgb_of(pixels, self.reading, self.image)
        notes: set[str] = set()
        size = image.shape[0], image.shape[1]
        labels = layers_of(self.objects(pixels, notes), size, len(self.masks))
        empty = len(self.masks) - np.count_nonzero(np.unique(labels))
        left_out = Counter({"mask files are left out: they are empty": empty})
        return LabelledImage(image, labels, left_out=left_out, notes=Counter(notes))

    def objects(self, image: Pixels, notes: set[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields a number and a mask (H, W) for each file that is not empty.

        Args:
            image: The image, with which masks are turned.
            notes: Takes up what was done to masks.

        Raises:
            ValueError: If a file has another size, or more than one object.
        """
        height, width = image.values.shape[:2]
        for number, path in enumerate(self.masks, start=1):
            mask = read_pixels(path, self.reading, as_labels=True)
            notes.update(filter(None, [turn_with_image(mask, image, self.labels.turn_masks)]))
            labels = labels_of(mask, path)
            if self.labels.threshold is not None:
                labels = labels >= self.labels.threshold
            if labels.shape != (height, width):
                raise ValueError(
                    f"{path}: expected a mask of {width} x {height} pixels, got {labels.shape[1]} x {labels.shape[0]}."
                )
            values = np.unique(labels[labels > 0])
            if len(values) > 1:
                raise ValueError(
                    f"{path}: expected one object (0 and another value), got the values {values[:5]}. A * in "
                    "--mask-pattern stands for one file per object; for soft edges, say --threshold 128."
                )
            yield number, labels > 0


def numbers_of_colours(colours: np.ndarray, path: Path) -> np.ndarray:
    """Returns the number 65536 * red + 256 * green + blue (H, W) of the pixels of a picture (H, W, 3) uint8.

    Raises:
        ValueError: If there are more colours than objects could have.
    """
    numbers = colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    if (count := len(np.unique(numbers))) > MAX_COLOURS:
        raise ValueError(
            f"{path}: has {count} colours, and --color-masks expects one per object: save masks without JPEG "
            "compression, soft edges or resizing that blurs."
        )
    return numbers


def paired_files(
    images: Path,
    masks: Path,
    image_pattern: str | None = None,
    mask_pattern: str | None = None,
    color_masks: bool = False,
    reading: ImageReading = ImageReading(),
    labels: LabelReading = LabelReading(),
) -> SourceList:
    """Pairs image and mask files, by default of the same name (without suffix), in two folders and those below.

    Args:
        images: Folder of the images.
        masks: Folder of the masks; it may be the same one.
        image_pattern: As `{stem}_img.png`; None for all files.
        mask_pattern: As `{stem}_mask.png`; with a `*`, as in `{stem}/*.png`, each file is one object. None for files
            that are named as the images.
        color_masks: Whether each colour but black is an object.
        reading: How pixels become RGB, and which pages are images.
        labels: What the numbers in masks mean.

    Raises:
        DataError: With every file that has no partner, or more than one; or with questions on the masks.
    """
    if images == masks and not mask_pattern:
        raise DataError([f"--images and --masks are both {images}: expected --mask-pattern, as in {{stem}}_mask.png."])
    mask_files = NamedFiles(masks, mask_pattern, IMAGE_SUFFIXES if color_masks else MASK_SUFFIXES, images)
    image_files = NamedFiles(images, image_pattern, IMAGE_SUFFIXES, masks)
    if images == masks:
        image_files.paths = [path for path in image_files.paths if not mask_files.keys(path)]
    by_image = image_files.by_key()
    by_mask = mask_files.by_key(by_image)
    several = mask_files.pattern.is_of_several
    problems = [
        *image_files.unsupported(),
        *mask_files.unsupported(),
        *doubled(by_image),
        *([] if several else doubled(by_mask)),
        *mask_files.missing(by_image, by_mask),
        *image_files.missing(by_mask, by_image),
    ]
    if not problems and not by_image:
        problems = [f"{images} holds no image {image_pattern or ''} ({', '.join(IMAGE_SUFFIXES)})."]
    if problems:
        raise DataError(problems)
    if several:
        return SourceList([ObjectFiles(path, by_mask[key], reading, labels) for key, (path,) in by_image.items()])
    pairs = [(path, by_mask[key][0]) for key, (path,) in by_image.items()]
    pages = [(image, mask, page) for image, mask in pairs for page in pages_of(image, mask, reading)]
    kind = ColouredPair if color_masks else FilePair
    sources = [kind(image, mask, page, reading, labels) for image, mask, page in pages]
    labels, notes = interpret_masks([(source.mask_name, source.numbers) for source in sources], labels)
    return SourceList([replace(source, labels=labels) for source in sources], notes=notes)


def pages_of(image: Path, mask: Path, reading: ImageReading) -> list[int | None]:
    """Returns the pages, from 0, that are images of their own; None for files of one image.

    Raises:
        DataError: If image and mask have different numbers of pages.
    """
    if reading.pages != "each":
        return [None]
    try:
        count, of_mask = (number_of_pages(path, reading) for path in (image, mask))
    except ValueError:
        return [None]  # reported with all other problems, when the files are read
    if count != of_mask:
        raise DataError([f"--pages each: {image} has {number_of(count, 'page')}, and {mask} has {of_mask}."])
    return list(range(count)) if count > 1 else [None]


class NamedFiles:
    """The files in a folder and those below it, and the pattern of their names.

    Args:
        folder: The folder.
        pattern: What names to look for; None for all.
        suffixes: Those that can be read.
        other: A folder whose files are of another kind.

    Raises:
        DataError: If there is no such folder.
    """

    def __init__(self, folder: Path, pattern: str | None, suffixes: tuple[str, ...], other: Path):
        self.folder = checked_folder(folder)
        self.takes_all = pattern is None
        self.pattern = Pattern(pattern or "{stem}.*")
        self.suffixes = suffixes
        self.paths = files_in(folder)
        if other != folder and other.is_relative_to(folder):
            self.paths = [path for path in self.paths if not path.is_relative_to(other)]

    def keys(self, path: Path) -> list[str]:
        """What a file has in common with others, likeliest first."""
        return self.pattern.keys(path.relative_to(self.folder).as_posix())

    def by_key(self, known: Container[str] = ()) -> dict[str, list[Path]]:
        """Returns the files by what they have in common with others: what is `known`, if possible."""
        files = defaultdict(list)
        for path in self.paths:
            if path.suffix.lower() in self.suffixes and (keys := self.keys(path)):
                files[next((key for key in keys if key in known), keys[0])].append(path)
        return dict(files)

    def unsupported(self) -> Iterator[str]:
        """Yields a problem for each file that cannot be read, if no pattern says that there may be others."""
        for path in self.paths if self.takes_all else []:
            if path.suffix.lower() not in self.suffixes:
                expected = ", ".join(self.suffixes)
                yield f"{path}: unsupported file type, expected one of {expected}. Convert it or remove it."

    def missing(self, wanted: dict[str, list[Path]], existing: Container[str]) -> Iterator[str]:
        """Yields a problem for each of the other files that has no partner here."""
        for key, paths in wanted.items():
            if key not in existing:
                yield f"{paths[0]}: no file {self.pattern.filled(key)} in {self.folder}."


def doubled(files: dict[str, list[Path]]) -> Iterator[str]:
    """Yields a problem for each file that has another's place."""
    for first, *more in files.values():
        for path in more:
            yield f"{path}: has the same name as {first}."
