"""Reads images and the COCO annotations of the objects in them."""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

import numpy as np

from .coco_masks import EmptyMaskError, decode, is_missing, shortened, whole_number
from .images import read_pixels, rgb_of
from .overlaps import layers_of
from .patterns import checked_folder, files_in
from .pillow_images import DataError, ImageReading, number_of, upright
from .sources import LabelledImage, Source, SourceList


MAX_SIDE = 1_000_000  # pixels; more is no size of an image


@dataclass(frozen=True)
class Annotation:
    """An object: how an error names it, its COCO segmentation, and its category."""

    name: str
    segmentation: Any
    category: str | None = None


@dataclass(eq=False)
class CocoImage(Source):
    """An image file and its COCO annotations; `size` (height, width) is None where the annotations give none."""

    image: Path
    size: tuple[int, int] | None
    annotations: list[Annotation]
    reading: ImageReading = ImageReading()

    def __post_init__(self) -> None:
        self.name = str(self.image)

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
        pixels = read_pixels(self.image, self.reading)
        image = rgb_of(pixels, self.reading, self.image)
        height, width = image.shape[:2]
        is_as_stored = pixels.orientation > 4 and self.size == (width, height) and width != height
        if self.size and self.size != (height, width) and not is_as_stored:
            exchanged = " Are width and height exchanged?" if self.size == (width, height) else ""
            raise ValueError(
                f"{self.image}: expected {self.size[1]} x {self.size[0]} pixels (from the annotations), "
                f"got {width} x {height}.{exchanged}"
            )
        if is_as_stored:
            stored = with_objects(image.swapaxes(0, 1), self.annotations, self.name)
            whole = replace(stored, image=image, labels=upright_layers(stored.labels, pixels.orientation))
        else:
            whole = with_objects(image, self.annotations, self.name)
        if pixels.orientation != 1:
            how = "and their annotations with them" if is_as_stored else "but not their annotations"
            whole.notes[f"images were turned upright, as their EXIF orientation says, {how}"] = 1
        return whole


def upright_layers(labels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns labels (..., H, W) as an orientation tag says."""
    return np.moveaxis(upright(np.moveaxis(labels, (-2, -1), (0, 1)), orientation), (0, 1), (-2, -1))


def with_objects(image: np.ndarray, annotations: Sequence[Annotation], name: str) -> LabelledImage:
    """Returns an image (H, W, 3) with the objects annotated in it, numbered from 1 in the order of the annotations.

    Raises:
        ValueError: If segmentations are invalid: a line for each, which begins with `name`.
    """
    size = image.shape[0], image.shape[1]
    categories: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    problems: list[str] = []

    def masks() -> Iterator[tuple[int, np.ndarray]]:
        seen = set()
        for number, annotation in enumerate(annotations, start=1):
            try:
                mask = decode(annotation.segmentation, size)
            except EmptyMaskError as error:
                left_out[f"annotations are left out: they {error}"] += 1
                continue
            except ValueError as error:
                problems.append(f"{name}: {annotation.name}: {error}.")
                continue
            key = annotation.category, hashlib.sha256(np.packbits(mask).data).digest()
            if key in seen:
                left_out["annotations are left out: they repeat another one"] += 1
                continue
            seen.add(key)
            if annotation.category is not None:
                categories[number] = annotation.category
            yield number, mask

    labels = layers_of(masks(), size, len(annotations))
    if problems:
        raise DataError(problems)
    return LabelledImage(image, labels, categories, left_out)


def coco_images(
    images: Path,
    annotations: Path,
    categories: Sequence[str] = (),
    reading: ImageReading = ImageReading(),
) -> SourceList:
    """Reads the polygons and run-length masks of a COCO file.

    Args:
        images: Folder of the image files.
        annotations: The COCO file.
        categories: Names of the categories to use; empty for all.
        reading: How pixels become RGB.

    Returns:
        The images that have annotations to use.

    Raises:
        DataError: If the file is not COCO, names images that are not there, or has no object.
    """
    content = read_json(annotations)
    problems: list[str] = []
    left_out: Counter[str] = Counter()
    listed = by_id(content["images"], problems)
    if problems:  # annotations of such images would only repeat them
        raise DataError(f"{annotations}: {problem}" for problem in problems)
    names = category_names(content.get("categories"), categories, annotations)
    objects: dict[str, list[Annotation]] = {key: [] for key in listed}
    for number, annotation in enumerate(content["annotations"], start=1):
        key = identity(annotation.get("image_id")) if isinstance(annotation, dict) else None
        if key not in objects:
            problems.append(f"annotation {number} of the list refers to image {key}, which is not listed.")
            continue
        category = identity(annotation.get("category_id"))
        category = None if category is None else names.get(category, f"category {category}")
        if reason := reason_to_skip(annotation, category, categories):
            left_out[f"annotations are left out: they {reason}"] += 1
        else:
            name = f"annotation {shortened(annotation.get('id'))} ({number} of the list)"
            objects[key].append(Annotation(name, annotation["segmentation"], category))
    if not any(objects.values()) and not problems:
        reasons = "; ".join(f"{number} {reason}" for reason, number in left_out.items())
        problems.append(f"has no object to use{f': {reasons}' if reasons else ''}.")
    finder = ImageFinder(images)
    used = {key: entry for key, entry in listed.items() if objects[key]}
    sources = images_of(used, objects, finder, problems, reading)
    if problems:
        raise DataError(f"{annotations}: {problem}" for problem in problems)
    if empty := len(listed) - len(sources):
        left_out["images are left out: they have no annotation to use"] = empty
    by_name = number_of(len(finder.by_name_alone), "image")
    notes = [f"{by_name} found by name, not by path"] if finder.by_name_alone else []
    return SourceList(sources, left_out, notes)


def read_json(file: Path) -> dict[str, Any]:
    """Returns the content of a COCO file, with lists of images and annotations.

    Raises:
        DataError: If it is something else, or cannot be read.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError([f"{file}: cannot be read: {error.strerror}."]) from error
    except (ValueError, RecursionError) as error:
        raise DataError([f"{file}: not a COCO annotation file: {type(error).__name__} {error}."]) from error
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError([f"{file}: not a COCO annotation file: expected an object with a list of {key}."])
    if any(isinstance(annotation, dict) and "segments_info" in annotation for annotation in content["annotations"]):
        raise DataError(
            [
                f"{file}: COCO panoptic annotations, and --coco expects instances. Give the PNG files that belong to "
                "them as --masks, with --color-masks."
            ]
        )
    return content


def identity(value: Any) -> str | None:
    """Returns an id in one form, as files write one id as a number here and as a string there."""
    if value is None or isinstance(value, (list, dict)):
        return None
    number = whole_number(value) if isinstance(value, float) or str(value).endswith(".0") else None
    return str(value).strip() if number is None else str(number)


def by_id(entries: list[Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the listed images by id, and adds problems with them."""
    listed: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries, start=1):
        key = identity(entry.get("id")) if isinstance(entry, dict) else None
        if key is not None:
            entry = {"file_name": entry.get("coco_url"), **entry}  # LVIS has the URL alone
        if key is None or not isinstance(entry.get("file_name"), str):
            problems.append(f"image {number} of the list: expected an id and a file_name.")
        elif key in listed:
            problems.append(f"{entry['file_name']} and {listed[key]['file_name']} have one id, {key}: renumber them.")
        else:
            listed[key] = entry
    return listed


def category_names(entries: Any, chosen: Sequence[str], file: Path) -> dict[str, str]:
    """Returns the name of each category by id.

    Raises:
        DataError: If the list has one id twice, or not the names that are `chosen`.
    """
    names: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        key = identity(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            continue
        name = str(entry.get("name", f"category {key}"))
        if names.setdefault(key, name) != name:
            raise DataError([f"{file}: the categories {names[key]} and {name} have one id, {key}: renumber them."])
    if unknown := set(chosen) - set(names.values()):
        known = ", ".join(sorted(set(names.values()))) or "categories, and it lists none"
        raise DataError([f"--categories {' '.join(sorted(unknown))}: not in {file}; expected some of {known}."])
    return names


def reason_to_skip(annotation: dict[str, Any], category: str | None, chosen: Sequence[str]) -> str | None:
    """Returns why an annotation is not used: what is said of several."""
    if chosen and category not in chosen:
        return "have other categories"
    if whole_number(annotation.get("iscrowd") or 0) != 0:
        return "mark crowds (iscrowd is not 0)"
    if is_missing(annotation.get("segmentation")):
        return "have a box but no mask" if annotation.get("bbox") else "have no segmentation"
    return None


def images_of(
    listed: dict[str, dict[str, Any]],
    objects: dict[str, list[Annotation]],
    finder: "ImageFinder",
    problems: list[str],
    reading: ImageReading,
) -> list[Source]:
    """Returns the images with their objects, and adds problems with their files and sizes."""
    sources: list[Source] = []
    ids: dict[Path, str] = {}
    for key, entry in listed.items():
        try:
            path, size = finder.find(entry["file_name"]), size_of(entry)
        except ValueError as error:
            problems.append(str(error))
            continue
        if (other := ids.setdefault(path.resolve(), key)) != key:
            problems.append(f"{path} is listed as image {other} and as image {key}: merge them.")
        sources.append(CocoImage(path, size, objects[key], reading))
    return sources


def size_of(entry: dict[str, Any]) -> tuple[int, int] | None:
    """Returns the (height, width) that are listed of an image; None if they are missing.

    Raises:
        ValueError: If they are no numbers of pixels.
    """
    given = entry.get("height"), entry.get("width")
    if not any(given):
        return None
    height, width = (whole_number(edge) for edge in given)
    if not height or not width or min(height, width) < 0 or max(height, width) > MAX_SIDE:
        got = shortened(given)
        raise ValueError(f"{entry['file_name']}: expected numbers of pixels as height and width, got {got}.")
    return height, width


class ImageFinder:
    """Finds image files in a folder by the names that an annotation file has for them, and nothing outside of it.

    Tools write paths of other machines, backslashes, upload folders and URLs: where the folder has no such path, the
    only file of that name is taken.
    """

    def __init__(self, folder: Path):
        self.folder = checked_folder(folder)
        self.by_name_alone: list[Path] = []

    def find(self, name: str) -> Path:
        """Returns the file of that name.

        Raises:
            ValueError: If there is none, or more than one.
        """
        for spelling in spellings(name):
            if is_file(self.folder / spelling):
                return self.folder / spelling
        candidates = self.by_name.get(base_name(name), [])
        if not candidates:
            raise ValueError(f"{name}: listed, but the file does not exist in {self.folder}.")
        if len(candidates) > 1:
            raise ValueError(f"{name}: could be {candidates[0]} or {candidates[1]}.")
        self.by_name_alone.append(candidates[0])
        return candidates[0]

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        """All files in the folder and those below, by name."""
        files = defaultdict(list)
        for path in files_in(self.folder):
            files[comparable(path.name)].append(path)
        return dict(files)


def spellings(name: str) -> list[str]:
    """Returns the paths in a folder that a listed name may stand for."""
    slashed = name.replace("\\", "/")
    return [spelling for spelling in (name, slashed, unquote(slashed)) if is_inside(spelling)]


def base_name(name: str) -> str:
    """Returns the file's own name, `comparable`, of a listed path or URL."""
    return comparable(PurePosixPath(unquote(name.replace("\\", "/"))).name)


def comparable(name: str) -> str:
    """A file's name without the differences that other systems make: composed letters, upper case."""
    return unicodedata.normalize("NFC", name).casefold()


def is_inside(name: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
    return not absolute and ".." not in PureWindowsPath(name).parts


def is_file(path: Path) -> bool:
    """Whether there is such a file; names may be too long for a file, or hold what none may hold."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
