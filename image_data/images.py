"""Reads image and mask files into arrays: with Pillow where it can, with tifffile what Pillow cannot."""

from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tifffile import TiffFileError

from .intensities import IntensityError, with_8_bits
from .pillow_images import (
    ImageReading,
    Pixels,
    number_of,
    open_image,
    page_count,
    page_index,
    pillow_pixels,
    raw_mode,
    upright,
)
from .tiff import read_tiff, tiff_page_count


TIFF_SUFFIXES = (".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".webp", *TIFF_SUFFIXES)
IMAGE_SUFFIXES = (".jpg", ".jpeg", *MASK_SUFFIXES)


def read_image(path: Path, reading: ImageReading = ImageReading(), page: int | None = None) -> np.ndarray:
    """Returns an image as (H, W, 3) uint8, upright, with the colours of Pillow's `convert("RGB")`.

    Args:
        path: The file.
        reading: How to read it.
        page: Which page of the file, from 0; None for what `reading` says.

    Raises:
        ValueError: If it cannot be read, or it is not clear which of its pages or bands are the image.
    """
    return rgb_of(read_pixels(path, reading, page), reading, path)


def rgb_of(pixels: Pixels, reading: ImageReading, path: Path) -> np.ndarray:
    """Returns pixels as (H, W, 3) uint8.

    Raises:
        ValueError: If it is not clear which bands are red, green and blue.
    """
    values = pixels.values if pixels.values.ndim == 3 else pixels.values[..., None]
    bands = values.shape[2]
    together = pixels.bands_are_colours  # one scale for all three, which keeps the hues
    if reading.channels:
        if max(reading.channels) > bands:
            given = " ".join(map(str, reading.channels))
            raise ValueError(f"{path}: --channels {given}: the image has {number_of(bands, 'band')}.")
        values = values[..., [channel - 1 for channel in reading.channels]]
    elif bands > 1 and not pixels.bands_are_colours:
        raise ValueError(
            f"{path}: it has {bands} bands, and does not say which are colours. Choose red, green and blue with "
            f"--channels, as in --channels {'1 2' if bands == 2 else '1 2 3'}, or one of them for grey: --channels 1."
        )
    try:
        values = with_8_bits(values, reading.intensity, together)
    except IntensityError as error:
        raise ValueError(f"{path}: {error}") from error
    return as_rgb(values)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey (H, W), or one to three bands (H, W, bands), as (H, W, 3). Of two bands, blue is 0."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.shape[2] == 2:
        return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=2)
    return np.ascontiguousarray(pixels)


def read_mask(path: Path, reading: ImageReading = ImageReading(), page: int | None = None) -> np.ndarray:
    """Returns a label image (H, W) of integers, as the file has them, upright.

    Raises:
        ValueError: If it cannot be read, or its pixels are not one integer each.
    """
    return labels_of(read_pixels(path, reading, page, as_labels=True), path)


def labels_of(pixels: Pixels, path: Path) -> np.ndarray:
    """Returns the one integer (H, W) of each pixel. Bands that are all equal are one.

    Raises:
        ValueError: If the pixels are not one integer each.
    """
    labels = pixels.values
    if labels.ndim == 3:
        if labels.shape[2] in (2, 4) and (labels[..., -1] == np.iinfo(labels.dtype).max).all():
            labels = labels[..., :-1]  # opaque
        if labels.shape[2] in (1, 3) and (labels == labels[..., :1]).all():
            labels = labels[..., 0]
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        advice = " If each colour is an object, say --color-masks." if labels.ndim == 3 else " Save it as integers."
        raise ValueError(
            f"{path}: expected a 2-D integer mask (0 = background, one number per object), got shape {labels.shape} "
            f"and dtype {labels.dtype}.{advice}"
        )
    return labels


def turn_with_image(mask: Pixels, image: Pixels, also_if_it_fits: bool = False) -> str | None:
    """Turns a mask without an orientation tag as its image, if it has the image's stored size, and returns a note.

    Args:
        mask: What may be turned.
        image: An image that may have been turned.
        also_if_it_fits: Whether a mask is turned that has the image's size either way, too.
    """
    if image.orientation == 1 or mask.orientation != 1:
        return None
    turned, size = upright(mask.values, image.orientation), image.values.shape[:2]
    if turned.shape[:2] == size and (also_if_it_fits or mask.values.shape[:2] != size):
        mask.values = turned
        return "images were turned upright, as their EXIF orientation says, and their masks with them"
    if turned.shape[:2] != size:
        return "images were turned upright, as their EXIF orientation says; their masks fit as they are"
    return "images were turned upright, as their EXIF orientation says, but not their masks (--turn-masks)"


def number_of_pages(path: Path, reading: ImageReading) -> int:
    """Returns how many images are in a file.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        if path.suffix.lower() in TIFF_SUFFIXES:
            return tiff_page_count(path)
        with open_image(path, reading) as file:
            return page_count(file)
    except Exception as error:  # decoders raise many exception types
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    """Returns an error that says why a file cannot be read."""
    is_no_image = isinstance(error, UnidentifiedImageError | TiffFileError)
    reason = "it is damaged, or no image of the kind that its name says" if is_no_image else error
    return ValueError(f"{path}: cannot be read: {reason}{'' if str(reason).endswith('.') else '.'}")


def read_pixels(path: Path, reading: ImageReading, page: int | None = None, as_labels: bool = False) -> Pixels:
    """Returns the pixels of an image file, upright; with `as_labels`, those of a palette as indices.

    Raises:
        ValueError: If it cannot be read, is too large, or has several pages.
    """
    try:
        if path.suffix.lower() in TIFF_SUFFIXES:
            return read_tiff(path, reading, page, as_labels)
        with open_image(path, reading) as file:
            index = page_index(page_count(file), reading, page, as_labels)
            if file.mode != "I;16" and raw_mode(file).endswith(";16B"):  # Pillow would drop the lower 8 bits
                raise ValueError("it has 16 bits per colour; save it as TIFF, or with 8.")
            if as_labels and file.format in ("JPEG", "MPO"):
                raise ValueError("it is a JPEG, whatever its name says, and JPEG changes numbers: save masks as PNG.")
            return pillow_pixels(file, index, as_labels)
    except Exception as error:  # decoders raise many exception types
        raise unreadable(path, error) from error
