"""Tells what the data looks like to the recipe: in numbers, and in a picture."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_data.pillow_images import number_of
from image_data.samples import Sample, TrainValidationParts, lines
from image_data.sources import Source

from .data_pictures import draw_samples


PICTURE, FILE = "data.png", "data.json"
PURPOSES = {"train": "to learn from", "validation": "to validate on", "test": "to test on"}
ADJECTIVES = {"train": "training", "validation": "validation", "test": "test"}
ENOUGH_PIXELS = 25  # of an object in the predicted masks: with fewer, its outline cannot be told


@dataclass
class PartSummary:
    """Training or validation data.

    Args:
        objects_per_image: The number of objects of each image.
        areas: The pixels of each object, in the image.
        mask_areas: Its pixels in the masks that the model predicts.
        samples: The number of images, or of tiles.
    """

    objects_per_image: np.ndarray
    areas: np.ndarray
    mask_areas: np.ndarray
    samples: int

    @classmethod
    def of(cls, samples: list[Sample]) -> "PartSummary":
        """Counts the objects of samples; of those that several tiles show, where they show most."""
        places: dict[Source, int] = {}
        images = np.concatenate([np.full(len(one.ids), places.setdefault(one.source, len(places))) for one in samples])
        ids, areas, mask_areas = (
            np.concatenate([getattr(one, name) for one in samples]) for name in ("ids", "areas", "mask_areas")
        )
        order = np.lexsort((mask_areas, areas, ids, images))
        images, ids, areas, mask_areas = images[order], ids[order], areas[order], mask_areas[order]
        is_last = np.append((np.diff(images) != 0) | (np.diff(ids) != 0), True)
        return cls(np.bincount(images[is_last]), areas[is_last], mask_areas[is_last], len(samples))


@dataclass
class DataSummary:
    """What the recipe learns from and validates on.

    Args:
        about: Where the data comes from.
        parts: What it learns from (`train`), validates on (`validation`) and tests on (`test`, if there is any).
        sides: The longer side of each window, in pixels.
        mask_side: Pixels along a side of the masks that the model predicts.
        left_out: How many objects, images and tiles are left out, by reason.
        notes: Further remarks on how the data was read.
    """

    about: str
    parts: dict[str, PartSummary]
    sides: list[int]
    mask_side: int
    left_out: Counter[str]
    notes: list[str]

    @classmethod
    def of(cls, parts: TrainValidationParts, about: str, mask_side: int) -> "DataSummary":
        """Summarizes samples."""
        samples = {name: getattr(parts, name) for name in PURPOSES if getattr(parts, name)}
        sides = [max(span.stop - span.start for span in one.window) for of_part in samples.values() for one in of_part]
        summaries = {name: PartSummary.of(of_part) for name, of_part in samples.items()}
        return cls(about, summaries, sides, mask_side, parts.left_out, parts.notes)

    @property
    def objects(self) -> dict[str, int]:
        """The number of objects of each part."""
        return {name: len(part.areas) for name, part in self.parts.items()}

    def __str__(self) -> str:
        """The numbers, and what to do about them, in some lines."""
        objects = ", ".join(f"{number} {ADJECTIVES[name]} objects" for name, number in self.objects.items())
        images = ", ".join(f"{len(part.objects_per_image)} {PURPOSES[name]}" for name, part in self.parts.items())
        tiles = sum(part.samples for part in self.parts.values())
        if tiles > len(self.all_of("objects_per_image")):
            images += f", cut into {tiles} tiles"
        table = {
            "images": images,
            "sides": f"{spread(self.sides)} pixels",
            "objects per image": spread(self.all_of("objects_per_image")),
            "pixels per object": f"{spread(self.all_of('areas'))} in the image",
            "": f"{spread(self.all_of('mask_areas'))} in the model's masks of {self.mask_side} x {self.mask_side}",
        }
        return "\n".join(
            [
                f"{self.about}: {objects}.",
                *(f"  {name:18} {value}" for name, value in table.items()),
                *(f"  left out: {line}" for line in lines(self.left_out)),
                *(f"  note: {note}" for note in [*self.notes, *self.advice()]),
            ]
        )

    def all_of(self, name: str) -> np.ndarray:
        """The numbers of all parts together."""
        return np.concatenate([getattr(part, name) for part in self.parts.values()])

    def advice(self) -> list[str]:
        """What to do about sizes and numbers that make training hard."""
        median = float(np.median(self.parts["train"].mask_areas))
        advice = []
        if median < ENOUGH_PIXELS and (tile := self.tile_for(4 * ENOUGH_PIXELS)) < max(self.sides):
            advice.append(
                f"half of the objects have fewer than {ENOUGH_PIXELS} pixels in the model's masks, too few for their "
                f"outlines: --tile {tile} shows them larger"
            )
        if self.objects["validation"] < 10:
            advice.append(
                f"{number_of(self.objects['validation'], 'validation object')} will say little about how good the "
                "model is: label more images, or hold out a larger share with --validation"
            )
        return advice

    def tile_for(self, mask_area: int) -> int:
        """Returns the side of tiles in which half of the objects have so many pixels in the model's masks, or more."""
        side = self.mask_side * math.sqrt(float(np.median(self.parts["train"].areas)) / mask_area)
        return max(128, 2 ** round(math.log2(side)))

    def save(self, folder: Path, parts: TrainValidationParts) -> None:
        """Writes the numbers as `data.json`, and a picture of some images as `data.png`."""
        content = {
            "images": {name: len(part.objects_per_image) for name, part in self.parts.items()},
            "objects": self.objects,
            "left_out": dict(self.left_out),
            "notes": [*self.notes, *self.advice()],
        }
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        draw_samples({ADJECTIVES[name]: getattr(parts, name) for name in self.parts}).save(folder / PICTURE)


def spread(numbers: Sequence[int] | np.ndarray) -> str:
    """`1 to 20 (median 5)`, or the only number."""
    low, middle, high = min(numbers), float(np.median(numbers)), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,.0f})"
