"""Samples prompts from labels, and turns images, labels and prompts into model inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import Dataset
from transformers import SamProcessor

from image_data.overlaps import mask_of, void_of
from image_data.samples import Sample, shrink, visible
from image_data.tiles import Window
from segmentation.corrective_clicks import deepest

from .augmentation import blurred, changed_intensity
from .embedding_cache import EmbeddingCache


PADDING = -10  # SAM's label for padding points
MOST_JITTER = 20  # pixels
OUTSIDE = -1  # target value outside the image, and of pixels without a label; ignored by the loss


@dataclass(frozen=True)
class Prompts:
    """What the model is told of an object at first: points inside and outside of it, its box, or both in turn.

    Args:
        kind: `point`, `box`, or `mixed` for both.
        points: Points in the object.
        negative_points: Points beside it.
        clicks: How many random numbers to draw for corrective clicks in training.
        jitter: Standard deviation of the noise on box corners in training, as a share of the box's sides: 10 %, and at
            most `MOST_JITTER` pixels, as in Segment Anything (https://arxiv.org/abs/2304.02643, appendix A).
    """

    kind: str = "mixed"
    points: int = 1
    negative_points: int = 0
    clicks: int = 0
    jitter: float = 0.1


class ItemEncoder:
    """Builds model inputs from an image, its labels, and prompts for some objects.

    Args:
        processor: The model's.
        mask_side: Pixels along a side of the masks that the model predicts.
        prompts: What the model is told of an object.
        embeddings: Where the images' embeddings are, if the encoder is not to run.
    """

    def __init__(
        self, processor: SamProcessor, mask_side: int, prompts: Prompts, embeddings: EmbeddingCache | None = None
    ):
        self.processor = processor
        self.mask_side = mask_side
        self.prompts = prompts
        self.embeddings = embeddings

    def __call__(
        self, image: np.ndarray, labels: np.ndarray, ids: np.ndarray, rng: np.random.Generator, train: bool
    ) -> dict[str, torch.Tensor]:
        """Returns `pixel_values` (3, side, side), prompts for the objects `ids`, and their masks as `labels`.

        With `embeddings`, they take the place of `pixel_values`, as `image_embeddings` (channels, h, w).

        In `labels` (objects, mask_side, mask_side) int8 the object is 1, what else is in the image 0, and `OUTSIDE`
        what is beyond it or has no label.
        """
        prompts, prompt_inputs = self.prompts, {}
        boxes, size = boxes_of(labels, ids), labels.shape[-2:]
        if prompts.kind != "box":
            drawn = [
                draw_points(labels, label, box, prompts.points, prompts.negative_points, rng, central=not train)
                for label, box in zip(ids, boxes, strict=True)
            ]
            prompt_inputs["input_points"], prompt_inputs["input_labels"] = [
                [list(part)] for part in zip(*drawn, strict=True)
            ]
        if prompts.kind != "point":
            prompt_inputs["input_boxes"] = [
                [draw_box(box, size, prompts.jitter if train else 0.0, rng) for box in boxes]
            ]
        inputs = self.processor(
            images=[image], input_data_format="channels_last", return_tensors="pt", **prompt_inputs
        )
        encoded = {name: inputs[name][0] for name in ("pixel_values", *prompt_inputs)}
        for name in {"pixel_values", "input_points", "input_boxes"} & set(encoded):
            encoded[name] = encoded[name].float()
        if self.embeddings:
            del encoded["pixel_values"]
            encoded["image_embeddings"] = self.embeddings.read(image)
        if train and prompts.clicks:
            encoded["draws"] = torch.from_numpy(rng.random((len(ids), prompts.clicks), dtype=np.float32))
        small = shrink(labels, self.mask_side)
        targets = np.full((len(ids), self.mask_side, self.mask_side), OUTSIDE, dtype=np.int8)
        height, width = small.shape[-2:]
        targets[:, :height, :width] = [mask_of(small, label) for label in ids]
        targets[:, :height, :width][:, void_of(small)] = OUTSIDE
        return {**encoded, "labels": torch.from_numpy(targets)}


class TrainingSet(Dataset):
    """The training items in order.

    Item i depends only on the seed and i, so interruptions, worker processes and the number of ranks do not change
    training.

    Args:
        samples: Samples, drawn without replacement in each pass.
        encode: Makes model inputs.
        size: Items to draw in all.
        objects: Objects per item. They may repeat, with different prompts.
        augment: `crop` to draw a part and mirror it, `turn` to turn it as well, `intensity` and `blur` for its look.
        min_area: Objects that show less than this many pixels of the predicted masks are not drawn.
        seed: Of everything drawn.
    """

    def __init__(
        self,
        samples: list[Sample],
        encode: ItemEncoder,
        size: int,
        objects: int = 6,
        augment: Sequence[str] = ("turn",),
        min_area: int = 4,
        seed: int = 0,
    ):
        self.samples = samples
        self.encode = encode
        self.size = size
        self.objects = objects
        self.augment = augment
        self.min_area = min_area
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns item `index` of the drawing."""
        rng = np.random.default_rng([self.seed, 1, index])
        image, labels, ids = self.crop(self.draw(index), rng)
        if "intensity" in self.augment:
            image = changed_intensity(image, rng)
        if "blur" in self.augment:
            image = blurred(image, rng)
        return self.encode(image, labels, rng.choice(ids, self.objects), rng, train=True)

    def draw(self, index: int) -> Sample:
        """The sample of item `index`."""
        turn, place = divmod(index, len(self.samples))
        order = np.random.default_rng([self.seed, 0, turn]).permutation(len(self.samples))
        return self.samples[order[place]]

    def crop(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns an augmented part of the sample (H, W, 3), its labels (..., H, W), and the objects to draw from."""
        image, labels = sample.read()
        if not {"crop", "turn"} & set(self.augment):
            return image, labels, sample.ids
        ids = sample.ids
        window: Window = np.s_[:, :]
        for _ in range(10):  # after ten attempts, use the whole sample
            edges = labels.shape[-2:]
            size = [max(1, int(edge * rng.uniform(0.6, 1))) for edge in edges]
            top, left = (int(rng.integers(full - part + 1)) for full, part in zip(edges, size, strict=True))
            part = np.s_[top : top + size[0], left : left + size[1]]
            shown = np.intersect1d(
                sample.ids, visible(shrink(labels[..., *part], self.encode.mask_side), self.min_area)
            )
            if len(shown):
                ids, window = shown, part
                break
        turns = int(rng.integers(4)) if "turn" in self.augment else 0
        mirror = int(rng.choice([-1, 1]))
        image = np.ascontiguousarray(np.rot90(image[window], turns)[:, ::mirror])
        labels = np.ascontiguousarray(np.rot90(labels[..., *window], turns, axes=(-2, -1))[..., ::mirror])
        return image, labels, ids


class ValidationSet(Dataset):
    """Every object of the samples once, with the same prompts each time: exact boxes, and the points deepest inside.

    Args:
        samples: What to validate on.
        encode: Makes model inputs.
        objects: Maximum objects per item. Images with more objects become several items.
        seed: Seed of the points after the first.
    """

    def __init__(self, samples: list[Sample], encode: ItemEncoder, objects: int = 32, seed: int = 0):
        self.encode = encode
        self.seed = seed
        self.items = [
            (sample, sample.ids[start : start + objects])
            for sample in samples
            for start in range(0, len(sample.ids), objects)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns up to `objects` objects of one image."""
        sample, ids = self.items[index]
        image, labels = sample.read()
        return self.encode(image, labels, ids, np.random.default_rng([self.seed, 2, index]), train=False)


def boxes_of(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the (left, top, right, bottom) pixels (n, 4) of objects in labels (..., H, W)."""
    boxes = {}
    for layer in labels if labels.ndim == 3 else [labels]:
        windows = ndimage.find_objects(layer)  # of all objects at once, as images may be large
        boxes.update({number: window for number, window in enumerate(windows, start=1) if window})
    windows = [boxes[int(number)] for number in ids]
    return np.array([[columns.start, rows.start, columns.stop - 1, rows.stop - 1] for rows, columns in windows])


def draw_points(
    labels: np.ndarray,
    label: int,
    box: np.ndarray,
    positive: int,
    negative: int,
    rng: np.random.Generator,
    central: bool,
) -> tuple[list[list[float]], list[int]]:
    """Returns points (x, y) in an object and within half its size beside it, and their labels.

    Args:
        labels: Labels (..., H, W).
        label: The object's number.
        box: Its (left, top, right, bottom) pixels.
        positive: Number of points in it.
        negative: Number of points beside it, but not where there is no label.
        rng: Draws them.
        central: Whether the first is the one deepest inside.

    Returns:
        The points, and their labels: 1 inside, 0 outside, and -10 (padding) where there is nothing beside it.
    """
    left, top, right, bottom = box.tolist()
    margin = 1 + max(right - left, bottom - top) // 2
    around = np.s_[max(0, top - margin) : bottom + margin + 1, max(0, left - margin) : right + margin + 1]
    mask, void = mask_of(labels[..., *around], label), void_of(labels[..., *around])
    inside = np.argwhere(mask)
    points = inside[rng.integers(len(inside), size=positive)]
    point_labels = [1] * positive
    if central:
        points[0] = deepest(mask)[0]
    if negative:
        beside = np.argwhere(~mask & ~void)
        point_labels += [0 if len(beside) else PADDING] * negative
        beside = beside if len(beside) else np.zeros((1, 2), dtype=int)
        points = np.concatenate([points, beside[rng.integers(len(beside), size=negative)]])
    points = points + np.array([around[0].start, around[1].start])
    return [[float(column), float(row)] for row, column in points], point_labels


def draw_box(box: np.ndarray, size: tuple[int, ...], jitter: float, rng: np.random.Generator) -> list[float]:
    """Returns a box (left, top, right, bottom) with noise, but inside an image of `size` (height, width)."""
    sides = np.tile(box[2:] - box[:2], 2)
    box = box + np.clip(jitter * sides * rng.standard_normal(4), -MOST_JITTER, MOST_JITTER)
    (top, bottom), (left, right) = (
        np.sort(np.clip(box[axis::2], 0, edge - 1)) for axis, edge in ((1, size[0]), (0, size[1]))
    )
    return [float(left), float(top), float(right), float(bottom)]
