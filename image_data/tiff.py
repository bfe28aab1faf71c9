"""Reads the pixels of TIFF files: several bands, more than 8 bits, stacks and pyramids."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, SAMPLEFORMAT, TiffFile

from .pillow_images import (
    ORIENTATION,
    ImageReading,
    Pixels,
    open_image,
    page_index,
    pillow_pixels,
    require_size,
    upright,
)


Page = Any  # TiffPage, or TiffFrame, which has its attributes in `keyframe`
GREY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
SUBSAMPLING = 530  # the tag of YCbCr
PREMULTIPLIED, ALPHA = 1, 2  # kinds of extra samples
COMPRESSIONS = {  # that tifffile decodes by itself
    COMPRESSION.NONE,
    COMPRESSION.ADOBE_DEFLATE,
    COMPRESSION.DEFLATE,
    COMPRESSION.PACKBITS,
    COMPRESSION.LZMA,
}


def read_tiff(path: Path, reading: ImageReading, page: int | None, as_labels: bool) -> Pixels:
    """Returns the pixels of an image in a TIFF file, upright; with `as_labels`, those of a palette as indices.

    Raises:
        ValueError: If there are several images in it, or pixels that cannot be decoded.
    """
    with TiffFile(path) as file:
        images = tiff_images(file)
        if reading.channels and reading.pages is None and page is None and not as_labels:
            images = [[plane for planes in images for plane in planes]]  # pages may be bands, too
        try:
            planes = images[page_index(len(images), reading, page, as_labels)]
        except ValueError as error:
            advice = " If they are bands of one image, choose among them with --channels." if not as_labels else ""
            raise ValueError(f"{error}{advice}") from error
        first = planes[0].keyframe
        size = first.imagelength, first.imagewidth
        require_size(*size, len(planes) * first.nbytes / max(1, math.prod(size)), reading)
        if len(planes) == 1:
            return plane_pixels(path, planes[0], reading, as_labels, raw=reading.channels is not None)
        if any((plane.keyframe.imagelength, plane.keyframe.imagewidth) != size for plane in planes):
            raise ValueError("its pages have different sizes, and can only be images: use --pages each.")
        bands = [plane_pixels(path, plane, reading, as_labels=True, raw=True).values for plane in planes]
        return Pixels(np.dstack(bands), orientation=orientation_of(first))


def tiff_page_count(path: Path) -> int:
    """The number of images in a TIFF file."""
    with TiffFile(path) as file:
        return len(tiff_images(file))


def tiff_images(file: TiffFile) -> list[list[Page]]:
    """Returns the images in a file, without those reduced in size: of each its page, or a page for each band.

    Raises:
        ValueError: If an image is spread over other files.
    """
    images: list[list[Page]] = []
    series: list[Any] = [
        one for one in file.series if not (one.keyframe.is_reduced or one.keyframe.is_mask)
    ] or file.series
    for one in series:
        axes = [(axis, length) for axis, length in zip(one.axes, one.shape, strict=True) if axis not in "YXS"]
        pages = [page for page in one.pages if page is not None]
        if len(pages) != math.prod(length for _, length in axes) or any(page.parent is not file for page in pages):
            raise ValueError(
                "not all pages that it lists are in it: export the images to files of their own, with one directory "
                "for each page."
            )
        grid = np.empty(len(pages), dtype=object)
        grid[:] = pages
        grid = grid.reshape([length for _, length in axes])
        names = [axis for axis, _ in axes]
        grid = np.moveaxis(grid, names.index("C"), -1) if "C" in names else grid[..., None]
        images += grid.reshape(-1, grid.shape[-1]).tolist()
    return images


def plane_pixels(path: Path, plane: Page, reading: ImageReading, as_labels: bool, raw: bool) -> Pixels:
    """Returns the pixels of a page, upright; with `raw`, all of its bands as they are.

    Raises:
        ValueError: If it cannot be decoded.
    """
    page = plane.keyframe
    if as_labels and page.compression == COMPRESSION.JPEG and not raw:
        raise ValueError("it is compressed as JPEG, which changes numbers: save masks with Deflate or LZW.")
    is_decodable = page.compression in COMPRESSIONS and page.bitspersample % 8 == 0
    if pillow_is_exact(page, is_decodable) and not (raw and is_decodable and page.samplesperpixel > 1):
        with open_image(path, reading) as image:
            pixels = pillow_pixels(image, plane.index, as_labels)
        if page.bitspersample > 8 and page.photometric in GREY:
            values = pixels.values.astype(page.dtype)  # mode I has signed numbers only
            pixels.values = inverted(values, page) if page.photometric == PHOTOMETRIC.MINISWHITE else values
        return pixels
    if not is_decodable:
        raise ValueError(
            f"{page.samplesperpixel} bands of {page.bitspersample} bits with {page.compression.name} compression: "
            "save it with Deflate or no compression."
        )
    if page.imagedepth > 1:
        raise ValueError(f"it is a volume of {page.imagedepth} slices in one page: save each slice as a page.")
    values = plane.asarray()
    values = np.moveaxis(values, page.axes.index("S"), -1) if "S" in page.axes else values[..., None]
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        values = inverted(values, page)
    orientation = orientation_of(page)
    values = upright(values, orientation)
    if raw:
        return Pixels(values, orientation=orientation)
    kinds = [kind for kind in page.extrasamples if kind in (PREMULTIPLIED, ALPHA)]
    colours = 3 if page.photometric == PHOTOMETRIC.RGB else 1
    if page.photometric == PHOTOMETRIC.YCBCR and page.tags.valueof(SUBSAMPLING) == (1, 1) and values.dtype == np.uint8:
        bands = [Image.fromarray(values[..., band]) for band in range(3)]
        return Pixels(np.array(Image.merge("YCbCr", bands).convert("RGB")), True, orientation)
    if page.photometric not in (*GREY, PHOTOMETRIC.RGB) and not (as_labels and page.samplesperpixel == 1):
        raise ValueError(f"colours in {page.photometric.name} with {page.bitspersample} bits: save it as RGB.")
    if colours == 1 and values.shape[2] > 1 + len(kinds):
        return Pixels(values, orientation=orientation)
    if PREMULTIPLIED in kinds and values.dtype.kind == "u":
        values = divided_by_alpha(values, colours)
    return Pixels(values[..., :colours], bands_are_colours=True, orientation=orientation)


def pillow_is_exact(page: Page, is_decodable: bool) -> bool:
    """Whether Pillow knows the meaning of the page's bands, and keeps all of their bits."""
    if page.photometric == PHOTOMETRIC.SEPARATED:
        return True
    if page.bitspersample > 8:
        return page.samplesperpixel == 1 and not is_decodable
    if page.photometric in GREY:
        with_alpha = page.samplesperpixel == 2 and tuple(page.extrasamples) == (ALPHA,)
        return page.sampleformat == SAMPLEFORMAT.UINT and (page.samplesperpixel == 1 or with_alpha)
    return page.photometric != PHOTOMETRIC.YCBCR or not is_decodable  # it decodes compressed ones alone


def inverted(values: np.ndarray, page: Page) -> np.ndarray:
    """Returns values of which 0 is white, so that 0 is black.

    Raises:
        ValueError: If they have no largest value.
    """
    if values.dtype.kind != "u":
        raise ValueError(f"0 is white, and there is no black in {values.dtype}: save it with 0 as black.")
    return np.array(2**page.bitspersample - 1, dtype=values.dtype) - values


def divided_by_alpha(values: np.ndarray, colours: int) -> np.ndarray:
    """Returns colours (H, W, colours) that were stored multiplied by alpha, the band after them."""
    largest = np.iinfo(values.dtype).max
    alpha = values[..., colours : colours + 1].astype(float)
    whole = values[..., :colours] * (largest / np.where(alpha, alpha, largest))
    return np.minimum(whole, largest).astype(values.dtype)


def orientation_of(page: Page) -> int:
    """The page's orientation tag, 1 if it has none that is known."""
    orientation = page.tags.valueof(ORIENTATION, default=1)
    return orientation if orientation in range(1, 9) else 1
