"""Finds images that are in more than one part of the data, whatever their names."""

import hashlib
from collections import defaultdict

import numpy as np


class Copies:
    """Remembers images by a hash of their pixels."""

    def __init__(self) -> None:
        self.names: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def add(self, image: np.ndarray, part: str, name: str) -> None:
        """Adds an image (H, W, 3) of a part, and its name."""
        digest = hashlib.sha256(str(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
        self.names[digest.digest()][part].append(name)

    def notes(self) -> list[str]:
        """Returns a note for each part that has copies of training images."""
        notes = []
        for part in ("validation", "test"):
            pairs = [
                (copy, names["train"][0])
                for names in self.names.values()
                if "train" in names
                for copy in names.get(part, [])
            ]
            if pairs:
                copy, original = pairs[0]
                notes.append(
                    f"{len(pairs)} of the {part} images have exactly the pixels of a training image, as {copy} those "
                    f"of {original}: their metrics say nothing about new images. Remove the copies, or keep them in "
                    "one part with --group-pattern (--group-column for a data set)"
                )
        return notes
