"""How well predicted objects agree with labelled ones, from the IoU of each pair.

Definitions: T labelled and P predicted objects are matched one to one, so that as many pairs as possible have an IoU
of at least a threshold. Segmentation accuracy (SA) is the number of such pairs divided by that of all objects, matched
or not: TP / (TP + FP + FN), as in https://www.kaggle.com/c/data-science-bowl-2018/overview/evaluation. mSA is its mean
over the thresholds 0.5, 0.55, ... 0.95.
"""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from scipy.optimize import linear_sum_assignment

from segmentation.segments import Segment, coco_annotation


THRESHOLDS = np.arange(50, 100, 5) / 100
MOST_DETECTIONS = 1000  # an image may show more than COCO's 100 objects


def match(iou: np.ndarray, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Returns the pairs (labelled, predicted) with at least this IoU: as many as possible, and of those the best.

    Args:
        iou: (T, P).
        threshold: Lowest IoU of a pair.
    """
    enough = iou >= threshold
    if not enough.any():
        return []
    rows, columns = linear_sum_assignment(enough + iou / (2 * min(iou.shape)), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True) if enough[row, column]]


def segmentation_accuracy(iou: np.ndarray, threshold: float) -> float:
    """Returns TP / (TP + FP + FN) at one threshold; 1 for an image without objects in which none are found."""
    matched = len(match(iou, threshold))
    objects = sum(iou.shape) - matched
    return matched / objects if objects else 1.0


def mean_segmentation_accuracy(iou: np.ndarray) -> float:
    """Returns the mean of `segmentation_accuracy` over `THRESHOLDS`."""
    return float(np.mean([segmentation_accuracy(iou, threshold) for threshold in THRESHOLDS]))


def dice_of(iou: np.ndarray) -> np.ndarray:
    """Returns the Dice coefficients of pairs with these IoU."""
    return 2 * iou / (1 + iou)


def detection_metrics(matrices: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns the agreement of the objects of several images.

    Args:
        matrices: IoU (T, P) of each image.

    Returns:
        `msa`, `sa50`, `sa75`: means over the images. `f1`: 2 TP / (2 TP + FP + FN) over all images, at an IoU of 0.5.
        `labelled`, `predicted`, `missed`, `false`: numbers of objects in all images, at an IoU of 0.5. `count_error`:
        mean over the images of the absolute difference between the predicted and the labelled number of objects.
    """
    labelled, predicted = (sum(matrix.shape[axis] for matrix in matrices) for axis in (0, 1))
    matched = sum(len(match(matrix)) for matrix in matrices)
    return {
        "msa": float(np.mean([mean_segmentation_accuracy(matrix) for matrix in matrices])),
        "sa50": float(np.mean([segmentation_accuracy(matrix, 0.5) for matrix in matrices])),
        "sa75": float(np.mean([segmentation_accuracy(matrix, 0.75) for matrix in matrices])),
        "f1": 2 * matched / (labelled + predicted) if labelled + predicted else 1.0,
        "labelled": labelled,
        "predicted": predicted,
        "missed": labelled - matched,
        "false": predicted - matched,
        "count_error": float(np.mean([abs(matrix.shape[1] - matrix.shape[0]) for matrix in matrices])),
    }


def average_precision(
    truth: Sequence[Sequence[Segment]], predicted: Sequence[Sequence[Segment]], sizes: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Returns COCO's `ap` (mean over IoU 0.5 to 0.95) and `ap50`, with up to 1,000 detections an image.

    Classes are not told apart, as SAM predicts none. Both are NaN if nothing is labelled.

    Args:
        truth: Labelled objects of each image.
        predicted: Predicted objects of each image; their ratings are the scores.
        sizes: Height and width of each image.
    """
    annotations, detections = (
        [
            {**coco_annotation(segment, size), "image_id": image, "category_id": 1, "score": segment.rating}
            for image, (segments, size) in enumerate(zip(groups, sizes, strict=True), start=1)
            for segment in segments
        ]
        for groups in (truth, predicted)
    )
    if not annotations:
        return {"ap": float("nan"), "ap50": float("nan")}
    if not detections:
        return {"ap": 0.0, "ap50": 0.0}
    images = [{"id": image, "height": size[0], "width": size[1]} for image, size in enumerate(sizes, start=1)]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    labelled = COCO({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]})
    evaluation = COCOeval_faster(labelled, labelled.loadRes(detections), "segm", print_function=lambda *_: None)
    evaluation.params.maxDets = [1, 10, MOST_DETECTIONS]
    evaluation.run()
    return {"ap": float(evaluation.stats_as_dict["AP_all"]), "ap50": float(evaluation.stats_as_dict["AP_50"])}
