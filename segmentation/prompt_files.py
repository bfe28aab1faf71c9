"""Reads prompts from files: boxes and categories of COCO annotations, such as a detector writes, and rough masks."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from image_data.coco import base_name, by_id, category_names, identity, read_json, spellings
from image_data.images import read_mask
from image_data.pillow_images import DataError

from .segmenter import PromptedObject
from .segments import segments_of


def coco_boxes(file: Path, images: Collection[str]) -> dict[str, list[PromptedObject]]:
    """Returns the boxes in a COCO file, but for those of crowds, and their categories, by the names of `images`.

    As where such files are read to train on, an image that is not listed by its path is the only one of its name.

    Raises:
        ValueError: If the file is not COCO with boxes, or does not list one of the images.
    """
    content = read_json(file)
    problems: list[str] = []
    listed = by_id(content["images"], problems)
    categories = category_names(content.get("categories"), (), file)
    objects: dict[str, list[PromptedObject]] = {key: [] for key in listed}
    for number, annotation in enumerate(content["annotations"], start=1):
        try:
            left, top, width, height = map(float, annotation["bbox"])
            key, category = (identity(annotation.get(name)) for name in ("image_id", "category_id"))
        except (AttributeError, KeyError, TypeError, ValueError):
            problems.append(f"annotation {number} of the list: expected a bbox of left, top, width and height.")
            continue
        if key not in objects:
            problems.append(f"annotation {number} of the list refers to image {key}, which is not listed.")
        elif not annotation.get("iscrowd"):
            box = (left, top, left + width, top + height)
            objects[key].append(PromptedObject(box=box, category=categories.get(category or "")))
    ids = ids_of(images, {key: entry["file_name"] for key, entry in listed.items()})
    if missing := [name for name in images if name not in ids]:
        problems.append(f"lists no image {missing[0]} ({len(missing)} of {len(images)} are missing).")
    if problems:
        raise DataError(f"{file}: {problem}" for problem in problems)
    return {name: objects[ids[name]] for name in images}


def ids_of(images: Collection[str], listed: Mapping[str, str]) -> dict[str, str]:
    """Returns the ids of images, by name, as far as they are `listed`: the paths or URLs of the files by id."""
    ids = {spelling: key for key, name in listed.items() for spelling in spellings(name) if spelling in images}
    with_name = Counter(base_name(name) for name in images)
    listed_with_name: dict[str, list[str]] = {}
    for key in listed.keys() - set(ids.values()):
        listed_with_name.setdefault(base_name(listed[key]), []).append(key)
    for name in images:
        keys = listed_with_name.get(base_name(name), [])
        if name not in ids and len(keys) == 1 and with_name[base_name(name)] == 1:
            ids[name] = keys[0]
    return ids


def rough_masks(path: Path, size: tuple[int, int]) -> list[PromptedObject]:
    """Returns the objects of a label image (H, W), each to be refined from its mask and box.

    Raises:
        ValueError: If the file cannot be read, or has another size.
    """
    labels = read_mask(path)
    if labels.shape != size:
        raise ValueError(
            f"{path}: expected a label image of {size[1]} x {size[0]} pixels (the image's size), "
            f"got {labels.shape[1]} x {labels.shape[0]}."
        )
    return [
        PromptedObject(box=np.subtract(segment.box, (0, 0, 1, 1)).tolist(), mask=segment)
        for segment in segments_of(labels)
    ]
