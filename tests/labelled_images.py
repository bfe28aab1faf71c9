"""Small images with labelled objects, in memory and as files."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_masks

from image_data.sources import LabelledImage, Source


MASK_SIDE = 32  # of the tiny models


class Array(Source):
    """An image and labels in memory."""

    def __init__(self, labels: np.ndarray, name: str = "array"):
        self.name = name
        self.labels = labels
        front = (labels if labels.ndim == 2 else labels.max(0)).astype(int)
        self.image = np.stack([front * 20 % 256] * 3, -1).astype(np.uint8)

    def read(self) -> LabelledImage:
        return LabelledImage(self.image, self.labels)


def blocks(height: int = 40, width: int = 48) -> np.ndarray:
    """Labels of six blocks of 8 x 10 pixels, numbered with gaps."""
    labels = np.zeros((height, width), dtype=np.int64)
    for number in range(6):
        row, column = divmod(number, 3)
        labels[4 + 20 * row : 12 + 20 * row, 3 + 16 * column : 13 + 16 * column] = 10 * number + 300
    return labels


def save_pair(folder: Path, stem: str, labels: np.ndarray) -> tuple[Path, Path]:
    paths = folder / "images" / f"{stem}.png", folder / "masks" / f"{stem}.png"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([labels * 20 % 256] * 3, -1).astype(np.uint8)).save(paths[0])
    Image.fromarray(labels.astype(np.uint16)).save(paths[1])
    return paths


def save_coco(file: Path, image: str, labels: np.ndarray) -> None:
    """Writes the objects of one image as COCO annotations."""
    height, width = labels.shape
    content = {
        "images": [{"id": 1, "file_name": image, "height": height, "width": width}],
        "annotations": [
            {"id": int(number), "image_id": 1, "segmentation": run_lengths(labels == number)}
            for number in np.unique(labels[labels > 0])
        ],
    }
    file.write_text(json.dumps(content))


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """As pycocotools writes them."""
    encoded = coco_masks.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def png(height: int, width: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand, of kinds that Pillow does not write."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
