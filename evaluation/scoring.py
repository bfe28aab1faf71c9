"""Evaluates a model on labelled images, before and after fine-tuning, as its users meet it.

Masks are compared at the size of the images. The same functions segment as in `segment.py`.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from image_data.samples import Sample, areas_of
from segmentation.corrective_clicks import corrective_click, deepest
from segmentation.predictor import Predictor
from segmentation.segmenter import ImageSegmenter, PromptedObject
from segmentation.segments import Segment, iou_matrix, segments_of
from segmentation.settings import SegmentationSettings

from .metrics import average_precision, detection_metrics, dice_of, match


POINTS, BOXES, CLICKS, AUTOMATIC = MODES = ("points", "boxes", "clicks", "automatic")


@dataclass(frozen=True, eq=False)
class EvaluationImage:
    """An image, or a part of one, and the objects in it.

    Args:
        sample: Where they are read from. What is not among its objects does not count.
        size: Height and width.
        objects: What is to be found.
    """

    sample: Sample
    size: tuple[int, int]
    objects: Sequence[Segment]

    @property
    def name(self) -> str:
        """The file, or whatever the image is called."""
        return self.sample.source.name

    @property
    def image(self) -> np.ndarray:
        """The pixels, (H, W, 3) uint8."""
        return self.sample.read()[0]

    @property
    def ignored(self) -> np.ndarray:
        """The pixels without a label, and those of objects that do not count, bool (H, W).

        Automatic masks that lie there for the larger part are not false.
        """
        labels = np.atleast_3d(self.sample.read()[1].T).T  # (layers, H, W)
        return np.any(~np.isin(labels, [0, *self.sample.ids]), axis=0)


def evaluation_image(sample: Sample) -> EvaluationImage:
    """Returns what is to be found in a sample.

    Raises:
        ValueError: If it cannot be read.
    """
    _, labels = sample.read()
    numbers, _ = areas_of(labels)
    counted = set(sample.ids.tolist())
    segments = zip(numbers.tolist(), segments_of(labels, sample.categories), strict=True)
    return EvaluationImage(sample, labels.shape[-2:], [segment for number, segment in segments if number in counted])


@dataclass(eq=False)
class Scores:
    """What one model reaches.

    Args:
        ious: For each way of prompting (`points`, `boxes`, `clicks 1` ...), the IoU of each object, image by image.
        segments: For each way of prompting, the predicted objects, in the same order.
        matrices: IoU of labelled and automatically found objects, (T, P), of each image.
        automatic: The automatically found objects of each image.
        seconds: Of each mode, and of encoding (`encoder`), in all.
    """

    ious: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    segments: dict[str, list[Segment]] = field(default_factory=lambda: defaultdict(list))
    matrices: list[np.ndarray] = field(default_factory=list)
    automatic: list[list[Segment]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def automatic_ious(self) -> list[float]:
        """Returns the IoU of each labelled object with the automatic mask that is matched to it, or 0."""
        ious = []
        for matrix in self.matrices:
            best = np.zeros(len(matrix))
            for row, column in match(matrix, threshold=1e-6):
                best[row] = matrix[row, column]
            ious += best.tolist()
        return ious


def evaluate_images(
    predictor: Predictor,
    images: Sequence[EvaluationImage],
    settings: SegmentationSettings,
    modes: Sequence[str] = MODES,
    clicks: int = 8,
) -> Scores:
    """Segments all images in all ways, and compares.

    Args:
        predictor: The model.
        images: What to segment.
        settings: How to use the model.
        modes: Of `MODES`. `points` is one point, deepest inside the object; `boxes` are exact; `clicks` are one such
            point and further ones where the last mask is wrong; `automatic` needs no prompts.
        clicks: How many clicks in all.
    """
    scores = Scores()
    for each in images:
        segmenter = ImageSegmenter(predictor, each.image, settings)
        ignored = each.ignored
        with timed(scores, "encoder"):
            for window in segmenter.windows:
                segmenter.encoded(window)
        for mode in modes:
            with timed(scores, mode):
                results = list(predictions(segmenter, each, mode, clicks))
            for way, segments in results:
                if mode == AUTOMATIC:
                    matrix, counted = compared(each.objects, segments, ignored)
                    scores.matrices.append(matrix)
                    scores.automatic.append(counted)
                else:
                    pairs = zip(each.objects, segments, strict=True)
                    scores.ious[way] += [float(iou_matrix([truth], [mask])[0, 0]) for truth, mask in pairs]
                    scores.segments[way] += segments
    return scores


class timed(AbstractContextManager):
    """Adds the time that a block takes to the seconds of `mode`."""

    def __init__(self, scores: Scores, mode: str):
        self.scores, self.mode = scores, mode

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.scores.seconds[self.mode] += time.perf_counter() - self.start


def predictions(
    segmenter: ImageSegmenter, image: EvaluationImage, mode: str, clicks: int
) -> Iterator[tuple[str, list[Segment]]]:
    """Yields each way of prompting that belongs to a mode, and what is predicted."""
    if mode == AUTOMATIC:
        yield mode, segmenter.everything().segments
    elif mode == BOXES:
        boxes = [np.subtract(each.box, (0, 0, 1, 1)).tolist() for each in image.objects]  # the last pixels
        yield mode, segmenter.prompted([PromptedObject(box=box) for box in boxes])
    else:
        prompted = [PromptedObject(points=[first_click(each)], labels=[1]) for each in image.objects]
        for number in range(1, (clicks if mode == CLICKS else 1) + 1):
            segments = segmenter.prompted(prompted)
            yield f"clicks {number}" if mode == CLICKS else mode, segments
            prompted = [with_correction(*each) for each in zip(prompted, segments, image.objects, strict=True)]


def first_click(truth: Segment) -> tuple[int, int]:
    """Returns the pixel (x, y) deepest inside of an object."""
    (row, column), _ = deepest(truth.crop)
    return column + truth.left, row + truth.top


def with_correction(prompted: PromptedObject, predicted: Segment, truth: Segment) -> PromptedObject:
    """Returns the prompts and one more click, in the middle of the largest error."""
    boxes = np.array([each.box for each in (predicted, truth) if each.area])
    (left, top), (right, bottom) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    masks = np.zeros((2, bottom - top, right - left), dtype=bool)
    for mask, each in zip(masks, (predicted, truth), strict=True):
        if each.area:
            mask[each.top - top : each.box[3] - top, each.left - left : each.box[2] - left] = each.crop
    (row, column), label = corrective_click(*masks)
    points = [*prompted.points, (column + int(left), row + int(top))]
    return PromptedObject(points=points, labels=[*(prompted.labels or ()), label])


def compared(
    objects: Sequence[Segment], segments: Sequence[Segment], ignored: np.ndarray
) -> tuple[np.ndarray, list[Segment]]:
    """Returns the IoU (T, P) of labelled and found objects, and those found that count."""
    iou = iou_matrix(objects, segments)
    matched = {column for _, column in match(iou)}
    counted = [
        index
        for index, segment in enumerate(segments)
        if index in matched or ignored[segment.window][segment.crop].mean() <= 0.5
    ]
    return iou[:, counted], [segments[index] for index in counted]


def summary(scores: Scores, images: Sequence[EvaluationImage]) -> dict[str, Any]:
    """Returns the metrics of all modes by name; IoU and Dice are means over the objects."""
    result: dict[str, Any] = {
        way: {"iou": float(np.mean(ious)), "dice": float(np.mean(dice_of(np.array(ious))))}
        for way, ious in scores.ious.items()
        if ious
    }
    if scores.matrices:
        sizes = [each.size for each in images]
        precision = average_precision([each.objects for each in images], scores.automatic, sizes)
        result[AUTOMATIC] = {**detection_metrics(scores.matrices), **precision}
    result["seconds_per_image"] = {mode: seconds / len(images) for mode, seconds in scores.seconds.items()}
    return result


def class_summary(scores: Scores, images: Sequence[EvaluationImage]) -> dict[str, dict[str, float]]:
    """Returns, for each category: how many objects, mean IoU of each way, and the share found automatically."""
    categories = [each.category for image in images for each in image.objects]
    ways = {**scores.ious, **({AUTOMATIC: scores.automatic_ious()} if scores.matrices else {})}
    result = {}
    for category in sorted({each for each in categories if each}):
        chosen = [index for index, each in enumerate(categories) if each == category]
        row: dict[str, float] = {"objects": len(chosen)}
        for way, ious in ways.items():
            values = np.array(ious)[chosen]
            if way == AUTOMATIC:
                row["automatic: share found"] = float((values >= 0.5).mean())
            else:
                row[f"{way}: iou"] = float(values.mean())
        result[category] = row
    return result


def without_adapter(model: Any) -> AbstractContextManager:
    """Returns a block in which a `PeftModel` is the model before training."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
