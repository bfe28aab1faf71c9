"""Reads prompts from files: boxes and categories of COCO annotations, such as a detector writes, and rough masks."""

import json
from pathlib import Path

import numpy as np

from image_data.images import read_mask

from .segmenter import PromptedObject
from .segments import segments_of


class PromptFileError(ValueError):
    """A file that holds no prompts."""


def coco_boxes(path: Path) -> dict[str, list[PromptedObject]]:
    """Returns the boxes, and their categories, of a COCO file, by the images' file names.

    Raises:
        PromptFileError: If the file is not COCO.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        categories = {category["id"]: str(category["name"]) for category in content.get("categories", ())}
        objects: dict[str, list[PromptedObject]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            left, top, width, height = map(float, annotation["bbox"])
            box = (left, top, left + width, top + height)
            category = categories.get(annotation.get("category_id"))
            objects[names[annotation["image_id"]]].append(PromptedObject(box=box, category=category))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptFileError(
            f"{path}: expected COCO annotations with images and boxes: {type(error).__name__} {error}."
        ) from error
    return objects


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
