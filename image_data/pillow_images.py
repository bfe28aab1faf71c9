"""Decodes image files with Pillow, within limits of size, and chooses among their pages."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .intensities import IntensityError, parse_intensity


MAX_PIXELS = 178_956_970  # at which Pillow raises DecompressionBombError
ORIENTATION = 0x0112  # the EXIF and TIFF tag: 1 is upright
NUMBER_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow with one number per pixel
MOST_PROBLEMS = 20  # lines of an error
PILLOW_LIMIT = threading.Lock()  # held while it is lifted


class DataError(ValueError):
    """Problems with the input files, one line per problem."""

    def __init__(self, problems: Iterable[str]):
        problems = list(problems)
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        self.lines = [*problems[:MOST_PROBLEMS], *more]
        super().__init__("\n".join(self.lines))


@dataclass(frozen=True)
class ImageReading:
    """How the pixels of a file become RGB with 8 bits. The fields are as JSON has them.

    Args:
        channels: Numbers, from 1, of the bands that are red, green and blue; one number for grey, two for red and
            green. None for files that say which of their bands are colours.
        pages: `each` if every page of a file is an image, or the number of a page, from 1; None for files of one page.
        intensity: `percentile LOW HIGH`, `min-max` or `dtype`: which intensities become 0 and 255, where pixels are
            not integers from 0 to 255.
        max_pixels: Largest number of pixels to decode; a pixel of more than 4 bytes counts as several.

    Raises:
        DataError: If a field is out of range.
    """

    channels: tuple[int, ...] | None = None
    pages: str | None = None
    intensity: str = "percentile 1 99.8"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
            if not 1 <= len(self.channels) <= 3 or not all(isinstance(n, int) and n > 0 for n in self.channels):
                given = " ".join(map(str, self.channels))
                raise DataError([f"--channels {given}: expected one to three numbers of bands, from 1."])
        if self.pages not in (None, "each") and not (str(self.pages).isdecimal() and int(str(self.pages)) > 0):
            raise DataError([f"--pages {self.pages}: expected each, or the number of a page, from 1."])
        if not (isinstance(self.max_pixels, int) and self.max_pixels > 0):
            raise DataError([f"--max-pixels {self.max_pixels}: expected a whole number above 0."])
        try:
            parse_intensity(self.intensity)
        except IntensityError as error:
            raise DataError([f"--intensity {self.intensity}: {error}"]) from error


@dataclass
class Pixels:
    """The pixels of an image, upright.

    Args:
        values: (H, W) or (H, W, bands), as the file has them.
        bands_are_colours: Whether the bands are red, green and blue.
        orientation: The file's orientation tag, which has been applied: 1 if the pixels are as stored.
    """

    values: np.ndarray
    bands_are_colours: bool = False
    orientation: int = 1


@contextlib.contextmanager
def open_image(path: Path, reading: ImageReading) -> Iterator[Image.Image]:
    """Opens a file with Pillow, with `max_pixels` in place of Pillow's limit, which is one for the whole process.

    Raises:
        ValueError: If it is too large.
    """
    with path.open("rb") as stream, PILLOW_LIMIT:  # Pillow maps TIFFs opened by path, and garbles turned ones
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(stream) as file:
                require_size(file.height, file.width, len(file.getbands()), reading)
                yield file
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def require_size(height: int, width: int, bytes_per_pixel: float, reading: ImageReading) -> None:
    """Raises an error if an image is too large to decode."""
    if height * width * max(1.0, bytes_per_pixel / 4) > reading.max_pixels:
        large = f" of {bytes_per_pixel:g} bytes" if bytes_per_pixel > 4 else ""
        raise ValueError(
            f"{width} x {height} pixels{large} are more than --max-pixels {reading.max_pixels}: cut it into smaller "
            "files, or raise --max-pixels if you trust it and have the memory."
        )


def page_count(file: Image.Image) -> int:
    """The number of pages or frames. The further images of an MPO, as phones write, are previews and depth maps."""
    return 1 if file.format == "MPO" else getattr(file, "n_frames", 1)


def page_index(count: int, reading: ImageReading, page: int | None, is_mask: bool = False) -> int:
    """Returns which of the pages to read, from 0. A mask of one page may belong to a page of an image.

    Raises:
        ValueError: If there is no such page, or several and nothing says which.
    """
    if is_mask and count == 1:
        return 0
    if page is None and reading.pages not in (None, "each"):
        page = int(str(reading.pages)) - 1
    if page is None and count > 1:
        if reading.pages == "each":
            raise ValueError(
                f"it has {count} pages, and --pages each is for training with mask files of as many pages. Save each "
                "page as a file of its own, or use --pages 1 for the first alone."
            )
        raise ValueError(
            f"it has {count} pages. Use --pages each if every page is an image, or --pages 1 for the first alone."
        )
    if page is not None and page >= count:
        raise ValueError(f"--pages {page + 1}: it has {number_of(count, 'page')}.")
    return page or 0


def pillow_pixels(file: Image.Image, index: int, as_labels: bool) -> Pixels:
    """Returns the pixels of a page of an open file."""
    file.seek(index)
    step = {"L;2": 85, "L;4": 17}.get(raw_mode(file)[:3], 1)  # between grey values of 2 or 4 bits
    orientation = file.getexif().get(ORIENTATION, 1)
    if orientation in range(2, 9):
        image = ImageOps.exif_transpose(file)
    else:
        image, orientation = file, 1
    if image.mode in NUMBER_MODES:
        values = np.array(image)
        return Pixels(values.astype(values.dtype.newbyteorder("=")), orientation=orientation)
    if not as_labels:
        image = image if image.mode == "RGB" else image.convert("RGB")
        return Pixels(np.array(image), bands_are_colours=True, orientation=orientation)
    if image.mode == "PA":
        image = image.getchannel(0)
    return Pixels(np.array(image) // step if step > 1 else np.array(image), orientation=orientation)


def raw_mode(file: Image.Image) -> str:
    """How Pillow describes the stored pixels of an open file that it has not decoded yet; may be empty."""
    tiles: Any = getattr(file, "tile", None)  # WebP has none
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors stored pixels (H, W, ...) as the orientation tag says (EXIF 2.32, section 4.6.4)."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values


def number_of(number: int, thing: str) -> str:
    """`1 page`, `2 pages`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
