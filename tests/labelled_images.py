"""Small images with labelled objects, in memory and as files."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from finetuning.sources import LabelledImage, Source


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
