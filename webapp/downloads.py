"""Files of what was segmented: a label image, an overlay, and COCO annotations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from finetuning.pictures import overlay
from finetuning.segments import Segment, as_labels


def write_files(image: np.ndarray, name: str, segments: Sequence[Segment], folder: Path) -> list[Path]:
    """Writes all three and returns their paths."""
    stem, size = Path(name).stem, image.shape[:2]
    paths = [folder / f"{stem}-{ending}" for ending in ("labels.png", "masks.png", "coco.json")]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(as_labels(segments, size)).save(paths[0])
    Image.fromarray(overlay(image, np.array([segment.full(size) for segment in segments]))).save(paths[1])
    paths[2].write_text(json.dumps(coco_of(segments, size, name)) + "\n", encoding="utf-8")
    return paths


def coco_of(segments: Sequence[Segment], size: tuple[int, int], name: str) -> dict[str, Any]:
    """Returns COCO annotations of one image (https://cocodataset.org/#format-data), with run lengths and ratings."""
    annotations = []
    for number, segment in enumerate(segments, start=1):
        runs = coco_mask.encode(np.asfortranarray(segment.full(size), dtype=np.uint8))
        left, top, right, bottom = segment.box
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "segmentation": {"size": list(size), "counts": runs["counts"].decode("ascii")},
                "area": segment.area,
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
                "score": round(segment.rating, 4),
            }
        )
    return {
        "images": [{"id": 1, "file_name": name, "height": size[0], "width": size[1]}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": annotations,
    }
