"""Writes what was found in images: label images, overlays, COCO annotations and a table."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from .overlays import draw_prompts, draw_segments
from .segmenter import PromptedObject
from .segments import Segment, as_labels, coco_annotation


DEFAULT_CATEGORY = "object"
TABLE_COLUMNS = ("image", "label", "category", "area", "left", "top", "width", "height", "score", "stability")


@dataclass(frozen=True, eq=False)
class SegmentedImage:
    """An image file and what was found in it.

    Args:
        name: Its path below the folder of the images.
        image: (H, W, 3) uint8.
        segments: The objects. Number n in the label image is the n-th of them; some may be empty.
        objects: What was asked for, if there were prompts.
    """

    name: str
    image: np.ndarray
    segments: Sequence[Segment]
    objects: Sequence[PromptedObject] = ()


def write_pictures(result: SegmentedImage, folder: Path) -> tuple[Path, Path]:
    """Writes an overlay and a label image of one image, and returns their paths.

    The label image is a PNG of 16 bits, or a TIFF of 32 if there are more than 65,535 objects.
    """
    stem = folder / Path(result.name).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    overlay_path, labels_path = (stem.with_name(f"{stem.name}-{kind}.png") for kind in ("overlay", "labels"))
    overlay = draw_prompts(draw_segments(result.image, result.segments), result.objects)
    Image.fromarray(overlay).save(overlay_path)
    labels = as_labels(result.segments, result.image.shape[:2])
    if labels.dtype == np.uint16:
        Image.fromarray(labels).save(labels_path)
    else:
        labels_path = labels_path.with_suffix(".tif")
        tifffile.imwrite(labels_path, labels, compression="zlib")
    return overlay_path, labels_path


class Annotations:
    """Collects COCO annotations, and rows of a table, image by image."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories: dict[str, int] = {}

    def add(self, result: SegmentedImage) -> int:
        """Adds the objects of an image, and returns their number; empty ones are left out."""
        height, width = result.image.shape[:2]
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": result.name, "height": height, "width": width})
        shown = [(number, segment) for number, segment in enumerate(result.segments, start=1) if segment.area]
        for number, segment in shown:
            category = self.categories.setdefault(segment.category or DEFAULT_CATEGORY, len(self.categories) + 1)
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    **coco_annotation(segment, (height, width)),
                    "score": round(segment.rating, 4),
                    "stability": round(segment.stability, 4),
                    "label": number,
                }
            )
        return len(shown)

    @property
    def content(self) -> dict[str, Any]:
        """All of it as COCO writes it: https://cocodataset.org/#format-data."""
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}

    def write(self, folder: Path, with_table: bool) -> None:
        """Writes COCO annotations, and a CSV file with one row for each object.

        `score` is the predicted IoU, and `label` the number in the label image.
        """
        (folder / "annotations.json").write_text(json.dumps(self.content) + "\n", encoding="utf-8")
        if not with_table:
            return
        names = {number: name for name, number in self.categories.items()}
        with (folder / "objects.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(TABLE_COLUMNS)
            for row in self.annotations:
                image, category = self.images[row["image_id"] - 1]["file_name"], names[row["category_id"]]
                numbers = (row["area"], *row["bbox"], row["score"], row["stability"])
                table.writerow([image, row["label"], category, *numbers])
