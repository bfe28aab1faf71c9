"""Reads images and the COCO annotations of the objects in them."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from .images import read_image
from .sources import DataError, LabelledImage, Source


@dataclass(eq=False)
class CocoImage(Source):
    """An image file and its COCO annotations."""

    image: Path
    size: tuple[int, int]
    coco: COCO
    annotations: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        self.name = str(self.image)

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
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
        return LabelledImage(image, labels)


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
