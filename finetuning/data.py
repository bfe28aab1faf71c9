"""Reads images and the labels of the objects in them: files in pairs, COCO, and a photograph of coins.

Labels are arrays (H, W) of integers, 0 for background and another number for each object.
"""

import contextlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage
from skimage import data, filters, measure, morphology, segmentation


TIFF_SUFFIXES = (".tif", ".tiff")
MASK_SUFFIXES = (".png", *TIFF_SUFFIXES)
IMAGE_SUFFIXES = (".jpg", ".jpeg", *MASK_SUFFIXES)


class DataError(ValueError):
    """Problems with the input files, one line per problem."""

    def __init__(self, problems: Iterable[str], most: int = 20):
        problems = list(problems)
        more = [f"and {len(problems) - most} more"] if len(problems) > most else []
        super().__init__("\n".join([*problems[:most], *more]))


class Source(ABC):
    """A source of one image and its labels."""

    name: str

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the image (H, W, 3) uint8 and its labels (H, W).

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

    def read(self) -> tuple[np.ndarray, np.ndarray]:  # noqa: D102, as in Source
        return read_image(self.image), read_mask(self.mask)


@dataclass(eq=False)
class CocoImage(Source):
    """An image file and its COCO annotations."""

    image: Path
    size: tuple[int, int]
    coco: COCO
    annotations: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        self.name = str(self.image)

    def read(self) -> tuple[np.ndarray, np.ndarray]:  # noqa: D102, as in Source
        image = read_image(self.image)
        if image.shape[:2] != self.size:
            raise ValueError(
                f"{self.image}: expected {self.size[1]} x {self.size[0]} pixels (from the annotations), "
                f"got {image.shape[1]} x {image.shape[0]}."
            )
        labels = np.zeros(self.size, dtype=np.int64)
        annotation: dict[str, Any] = {}
        try:
            areas = []
            for annotation in self.annotations:
                areas.append(int(coco_mask.area(self.coco.annToRLE(annotation))))
            # Smallest last, otherwise a larger outline would cover an object inside it.
            order = sorted(range(len(areas)), key=areas.__getitem__, reverse=True)
            for number, index in enumerate(order, start=1):
                annotation = self.annotations[index]
                labels[self.coco.annToMask(annotation).astype(bool)] = number
        except Exception as error:  # pycocotools raises many exception types from its C code
            raise ValueError(
                f"{self.image}: invalid segmentation in annotation {annotation.get('id')}: {error}"
            ) from error
        return image, labels


class Coins(Source):
    """The photograph of coins that comes with scikit-image, labelled by watershed.

    As in https://scikit-image.org/docs/0.26.x/auto_examples/applications/plot_coins_segmentation.html.
    """

    name = "skimage.data.coins()"

    def read(self) -> tuple[np.ndarray, np.ndarray]:  # noqa: D102, as in Source
        image = data.coins()
        markers = np.zeros_like(image)
        markers[image < 30], markers[image > 150] = 1, 2
        filled = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
        return as_rgb(image), measure.label(morphology.remove_small_objects(filled, max_size=200))


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


def coco_images(images: Path, annotations: Path) -> tuple[list[Source], list[str]]:
    """Reads the polygons and run-length masks of a COCO file; regions marked as crowds are left out.

    Returns:
        The images that have annotations, and notes on what was left out.

    Raises:
        DataError: If the file is not COCO, or names images that are not there.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
            coco = COCO(str(annotations))
        objects = {
            image["id"]: [a for a in coco.imgToAnns[image["id"]] if not a.get("iscrowd")]
            for image in coco.imgs.values()
        }
        sources = [
            CocoImage(images / image["file_name"], (image["height"], image["width"]), coco, tuple(objects[key]))
            for key, image in coco.imgs.items()
            if objects[key]
        ]
    except (OSError, json.JSONDecodeError, AssertionError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise DataError([f"{annotations}: not a COCO annotation file: {type(error).__name__} {error}."]) from error
    problems = [
        f"{source.image}: listed in {annotations}, but the file does not exist."
        for source in sources
        if not source.image.is_file()
    ]
    unknown = {a["image_id"] for a in coco.anns.values()} - set(coco.imgs)
    problems += [f"{annotations}: annotations refer to image {key}, which is not listed." for key in sorted(unknown)]
    if not sources:
        problems.append(f"{annotations}: annotates no object.")
    if problems:
        raise DataError(problems)
    left_out = (
        (len(coco.imgs) - len(sources), "images without annotations left out"),
        (len(coco.anns) - sum(map(len, objects.values())), "crowd annotations left out"),
    )
    return list(sources), [f"{number} {what}" for number, what in left_out if number]


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
