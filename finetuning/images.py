"""Reads image and mask files into arrays."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps


TIFF_SUFFIXES = (".tif", ".tiff")
MASK_SUFFIXES = (".png", *TIFF_SUFFIXES)
IMAGE_SUFFIXES = (".jpg", ".jpeg", *MASK_SUFFIXES)


def read_image(path: Path) -> np.ndarray:
    """Returns an image file as (H, W, 3) uint8; 16-bit pixels are scaled linearly from [min, max] to [0, 255].

    Raises:
        ValueError: If it cannot be read, or is no such image.
    """
    pixels = read_pixels(path, convert_palette=True)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] > 4):
        raise ValueError(f"{path}: expected one grey, RGB or RGBA image, got an array of shape {pixels.shape}.")
    pixels = as_rgb(pixels)
    if pixels.dtype == np.uint16:
        low, high = int(pixels.min()), int(pixels.max())
        pixels = ((pixels.astype(np.float32) - low) * (255 / max(high - low, 1)) + 0.5).astype(np.uint8)
    elif pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype != np.uint8:
        raise ValueError(f"{path}: expected uint8 or uint16 pixels, got {pixels.dtype}.")
    return pixels


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey (H, W), or (H, W, channels) with or without alpha, as (H, W, 3)."""
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        grey = pixels if pixels.ndim == 2 else pixels[..., 0]
        return np.stack([grey] * 3, axis=-1)
    return np.ascontiguousarray(pixels[..., :3])


def read_mask(path: Path) -> np.ndarray:
    """Returns a label image (H, W).

    Raises:
        ValueError: If it cannot be read, or its pixels are not one integer each.
    """
    labels = read_pixels(path, convert_palette=False)
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[..., 0]
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(
            f"{path}: expected a 2-D integer mask (0 = background, one number per object), got shape {labels.shape} "
            f"and dtype {labels.dtype}."
        )
    if labels.size and labels.min() < 0:
        raise ValueError(f"{path}: negative label {labels.min()}; labels must be 0 (background) or positive.")
    return labels.astype(np.int64)


def read_pixels(path: Path, convert_palette: bool) -> np.ndarray:
    """Returns the pixels of an image file unchanged, except that EXIF orientation is applied.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        if path.suffix.lower() in TIFF_SUFFIXES:
            return read_tiff(path)
        with Image.open(path) as file:
            if file.mode != "I;16" and str(file.tile[0][3]).endswith(";16B"):  # Pillow would drop the lower 8 bits
                raise ValueError("it has 16 bits per colour; save it as TIFF, or with 8.")
            image = ImageOps.exif_transpose(file)
            if image.mode == "CMYK" or (convert_palette and image.mode == "P"):
                image = image.convert("RGB")
            return np.array(image)  # a copy, as torchvision warns of arrays that are not writable
    except Exception as error:  # decoders raise many exception types
        raise ValueError(f"{path}: cannot be read: {error}") from error


def read_tiff(path: Path) -> np.ndarray:
    """Returns the pixels of a TIFF file of one page, (H, W) or (H, W, channels)."""
    with tifffile.TiffFile(path) as file:
        if len(file.pages) != 1:
            raise ValueError(f"it has {len(file.pages)} pages; expected one.")
        page = file.pages.first
        one_plane_after_the_other = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.ndim == 3
        return np.moveaxis(page.asarray(), 0, 2) if one_plane_after_the_other else page.asarray()
