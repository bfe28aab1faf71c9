"""Segments one image: encodes it, or each of its tiles, once, and answers any number of prompts.

segmenter = ImageSegmenter(Predictor(model, processor), image, SegmentationSettings.load(adapter))
segments = segmenter.prompted([PromptedObject(points=[(120, 80), (40, 60)], labels=[1, 0])])
segments = segmenter.prompted([PromptedObject(box=(10, 20, 200, 180))])  # as fast as the mask decoder
segments = segmenter.everything().segments
labels = as_labels(segments, image.shape[:2])
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from image_data.tiles import Window

from .automatic import MASKS_PER_BATCH, AutomaticSegments, automatic_segments, stability_scores
from .joining_tiles import joined, tile_windows
from .predictor import EncodedImage, ObjectPrompts, Predictor
from .segments import Segment, segment_of
from .settings import SegmentationSettings


CONFIDENT = 0.999  # probability of a pixel of a mask that is a prompt, as in micro-sam


@dataclass(frozen=True, eq=False)
class PromptedObject:
    """What is known of an object, in pixels of the image.

    Args:
        points: (x, y) of points.
        labels: Of each point: 1 inside of the object, 0 outside; all are inside if there are no labels.
        box: Left, top, right and bottom.
        mask: A rough mask. SAM expects a box or points beside it.
        category: Name of its class, which its segment gets.
    """

    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] | None = None
    box: Sequence[float] | None = None
    mask: Segment | None = None
    category: str | None = None

    @property
    def kind(self) -> tuple[bool, ...]:
        """Objects of the same kind can be predicted together."""
        return len(self.points) > 0, len(self.points) > 1, self.box is not None, self.mask is not None

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the points inside, the box and the mask."""
        labels = self.labels or [1] * len(self.points)
        inside = [point for point, label in zip(self.points, labels, strict=True) if label == 1] or self.points
        boxes = [*([self.box] if self.box is not None else []), *([self.mask.box] if self.mask else [])]
        corners = [*inside, *(corner for box in boxes for corner in (box[:2], box[2:]))]
        left, top = np.min(corners, axis=0)
        right, bottom = np.max(corners, axis=0)
        return left, top, right, bottom


class ImageSegmenter:
    """An image, and the model that segments it.

    Args:
        predictor: The model.
        image: (H, W, 3) uint8.
        settings: How to use the model.
    """

    def __init__(self, predictor: Predictor, image: np.ndarray, settings: SegmentationSettings):
        self.predictor = predictor
        self.image = image
        self.settings = settings
        self.size = image.shape[:2]
        self.windows = tile_windows(self.size, settings.tile, settings.overlap)
        self._encoded: dict[tuple[int, ...], EncodedImage] = {}

    def encoded(self, window: Window) -> EncodedImage:
        """Returns the encoded window of the image; the encoder runs once for each."""
        key = tuple(edge for part in window for edge in (part.start, part.stop))
        if key not in self._encoded:
            self._encoded[key] = self.predictor.encode(self.image[window])
        return self._encoded[key]

    def everything(self) -> AutomaticSegments:
        """Returns all objects, best rated first."""
        results = [
            (window, automatic_segments(self.predictor, self.encoded(window), self.settings))
            for window in self.windows
        ]
        groups = [
            (window, [segment.moved(window[0].start, window[1].start) for segment in result.segments])
            for window, result in results
        ]
        return AutomaticSegments(
            joined(groups, self.size, self.settings.max_overlap),
            max(result.best_rating for _, result in results),
            max(result.best_stability for _, result in results),
        )

    def prompted(self, objects: Sequence[PromptedObject]) -> list[Segment]:
        """Returns the best rated mask of each object, in the same order. It may be empty.

        In an image of several tiles, the one that shows most around an object is used.
        """
        segments: dict[int, Segment] = {}
        groups: dict[tuple, list[int]] = {}
        windows = [self.window_of(each) for each in objects]
        for index, (each, window) in enumerate(zip(objects, windows, strict=True)):
            edges = (window[0].start, window[0].stop, window[1].start, window[1].stop)
            groups.setdefault((edges, each.kind), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), MASKS_PER_BATCH):
                part = indices[start : start + MASKS_PER_BATCH]
                predicted = self._predict([objects[index] for index in part], windows[part[0]])
                segments.update(zip(part, predicted, strict=True))
        return [segments[index] for index in range(len(objects))]

    def window_of(self, prompted: PromptedObject) -> Window:
        """Returns the tile that shows most of the image around an object, or a window made for a larger one."""
        left, top, right, bottom = prompted.extent

        def room(window: Window) -> float:
            edges = zip((top, left), (bottom, right), window, self.size, strict=True)
            return min(
                min(low - part.start if part.start else np.inf, part.stop - high if part.stop < whole else np.inf)
                for low, high, part, whole in edges
            )

        best = max(self.windows, key=room)
        if room(best) >= 0:
            return best
        margin = 0.25 * max(right - left, bottom - top)
        rows, columns = (
            slice(max(0, int(low - margin)), min(whole, int(high + margin) + 1))
            for low, high, whole in zip((top, left), (bottom, right), self.size, strict=True)
        )
        return rows, columns

    def _predict(self, objects: Sequence[PromptedObject], window: Window) -> list[Segment]:
        """Returns the segments of objects of one kind, in one window."""
        encoded, offset = self.encoded(window), (window[0].start, window[1].start)
        prompts = self._prompts(objects, window)
        multimask = self.settings.multimask
        three = multimask == "always" or (multimask == "single-point" and prompts.is_single_point)
        masks, ratings, logits = self.predictor.predict(encoded, prompts, three)
        stabilities = stability_scores(self.predictor.without_padding(encoded, logits)).tolist()
        return [
            segment_of(mask, float(rating), stability, offset, each.category)
            for each, mask, rating, stability in zip(objects, masks, ratings, stabilities, strict=True)
        ]

    def _prompts(self, objects: Sequence[PromptedObject], window: Window) -> ObjectPrompts:
        """Returns the prompts of objects of one kind, in pixels of a window."""
        origin = np.array([window[1].start, window[0].start])
        has_points, _, has_box, has_mask = objects[0].kind
        prompts = ObjectPrompts()
        if has_points:
            points = [(np.asarray(each.points, dtype=float) - origin).tolist() for each in objects]
            labels = [each.labels or [1] * len(each.points) for each in objects]
            prompts = replace(prompts, points=points, labels=labels)
        if has_box:
            boxes = [(np.asarray(each.box, dtype=float) - np.tile(origin, 2)).tolist() for each in objects]
            prompts = replace(prompts, boxes=boxes)
        if has_mask:
            masks = [each.mask.full(self.size)[window] for each in objects if each.mask]
            prompts = replace(prompts, masks=self._mask_logits(np.array(masks), self.encoded(window)))
        return prompts

    def _mask_logits(self, masks: np.ndarray, encoded: EncodedImage) -> torch.Tensor:
        """Returns masks (n, H, W) of a window as the mask decoder takes them: logits (n, h, w)."""
        height, width = (4 * side for side in encoded.embedding.shape[-2:])
        probabilities = torch.zeros(len(masks), height, width)
        inside = self.predictor.without_padding(encoded, probabilities)
        inside += F.interpolate(torch.from_numpy(masks)[None].float(), inside.shape[-2:], mode="area")[0]
        return probabilities.clamp(1 - CONFIDENT, CONFIDENT).logit().to(encoded.embedding.device)


def check_prompts(objects: Sequence[PromptedObject], size: tuple[int, int]) -> None:
    """Checks that prompts lie in an image (H, W).

    Raises:
        ValueError: If one does not.
    """
    height, width = size
    for each in objects:
        box = each.box
        corners = [] if box is None else [box[:2], box[2:]]
        for x, y in (*each.points, *corners):
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(f"({x:g}, {y:g}) is outside of the image of {width} x {height} pixels.")
        if box is not None and (box[0] >= box[2] or box[1] >= box[3]):
            numbers = " ".join(f"{edge:g}" for edge in box)
            raise ValueError(f"box {numbers}: expected left < right and top < bottom.")
