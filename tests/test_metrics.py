"""Agreement of predicted with labelled objects: hand-made pairs with known values, and other people's code."""

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from scipy import ndimage

from evaluation.metrics import (
    THRESHOLDS,
    average_precision,
    detection_metrics,
    dice_of,
    match,
    mean_segmentation_accuracy,
    segmentation_accuracy,
)
from segmentation.segments import Segment, coco_annotation, iou_matrix, segments_of


SIZE = (20, 40)


def strip(*spans: tuple[int, int]) -> list[Segment]:
    """Objects of ten rows, each from one column to another; a later one may overlap an earlier one."""
    return [Segment(start, 5, np.ones((10, stop - start), bool), 1.0, 1.0) for start, stop in spans]


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Label images that agree in part."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((60, 80)), 3)
    other = ndimage.gaussian_filter(noise + 0.04 * ndimage.gaussian_filter(rng.standard_normal((60, 80)), 1), 0.5)
    return ndimage.label(noise > 0.03)[0], ndimage.label(other > 0.03)[0]


@pytest.mark.parametrize(
    ("truth", "predicted", "accuracies", "f1", "count_error"),
    [
        ([(0, 10), (20, 30)], [(0, 10), (20, 30)], (1, 1, 1), 1, 0),
        # IoU 8/10: right at 0.5 to 0.8, seven of ten thresholds
        ([(0, 10)], [(0, 8)], (0.7, 1, 1), 1, 0),
        # one of two found, one false: 1/3 at each threshold
        ([(0, 10), (20, 30)], [(0, 10), (12, 18)], (1 / 3, 1 / 3, 1 / 3), 0.5, 0),
        # a second copy of the only object is false: 1/2 at each threshold
        ([(0, 10)], [(0, 10), (0, 10)], (0.5, 0.5, 0.5), 2 / 3, 1),
        # one mask over two objects: IoU 1/2 with each, and it counts for one of them
        ([(0, 10), (10, 20)], [(0, 20)], (0.05, 0.5, 0), 2 / 3, 1),
        ([(0, 10), (20, 30)], [], (0, 0, 0), 0, 2),
        ([], [(0, 10)], (0, 0, 0), 0, 1),
        ([], [], (1, 1, 1), 1, 0),
    ],
    ids=["equal", "a little small", "missed and false", "twice", "merged", "nothing found", "no objects", "empty"],
)
def test_known_pairs(truth, predicted, accuracies, f1, count_error):
    iou = iou_matrix(strip(*truth), strip(*predicted))
    scores = detection_metrics([iou])
    assert [scores[name] for name in ("msa", "sa50", "sa75")] == pytest.approx(accuracies)
    assert scores["f1"] == pytest.approx(f1)
    assert scores["count_error"] == count_error
    assert scores["missed"] == len(truth) - len(match(iou))
    assert scores["false"] == len(predicted) - len(match(iou))


def test_as_many_pairs_as_possible_are_matched():
    """Not the best first: that would leave the second object alone."""
    iou = np.array([[0.9, 0.6], [0.8, 0.1]])
    assert match(iou) == [(0, 1), (1, 0)]
    assert match(iou, 0.85) == [(0, 0)]


def test_iou_is_that_of_whole_masks():
    labels, predicted = random_pair(0)
    matrix = iou_matrix(segments_of(labels), segments_of(predicted))
    expected = [
        [((labels == i) & (predicted == j)).sum() / ((labels == i) | (predicted == j)).sum() for j in range(1, k)]
        for k in [predicted.max() + 1]
        for i in range(1, labels.max() + 1)
    ]
    np.testing.assert_allclose(matrix, expected)
    np.testing.assert_allclose(dice_of(np.array([0.0, 0.5, 1.0])), [0, 2 / 3, 1])


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_those_of_stardist(seed):
    matching = pytest.importorskip("stardist.matching").matching
    labels, predicted = random_pair(seed)
    iou = iou_matrix(segments_of(labels), segments_of(predicted))
    assert 0 < mean_segmentation_accuracy(iou) < 1
    for threshold in THRESHOLDS:
        theirs = matching(labels, predicted, threshold)
        assert segmentation_accuracy(iou, threshold) == pytest.approx(theirs.accuracy)
    assert detection_metrics([iou])["f1"] == pytest.approx(matching(labels, predicted, 0.5).f1)


def test_average_precision_of_known_pairs():
    objects, size = strip((0, 10), (20, 30)), [SIZE]
    assert average_precision([objects], [objects], size) == {"ap": 1, "ap50": 1}
    assert average_precision([objects], [[]], size) == {"ap": 0, "ap50": 0}
    assert average_precision([objects, []], [[], objects], size * 2) == {"ap": 0, "ap50": 0}, "of another image"
    assert math.isnan(average_precision([[]], [objects], size)["ap"])
    # more objects than COCO's 100, which pycocotools would not count
    many = [Segment(i % 40, i // 40, np.ones((1, 1), bool), 1.0, 1.0) for i in range(800)]
    assert average_precision([many], [many], size) == {"ap": 1, "ap50": 1}


def test_average_precision_is_that_of_torchmetrics():
    pytest.importorskip("torchvision", reason="torchmetrics asks for it")
    from torchmetrics.detection import MeanAveragePrecision

    theirs = MeanAveragePrecision(iou_type="segm", backend="faster_coco_eval", max_detection_thresholds=[1, 10, 1000])
    truth, predicted = [], []
    for seed in range(3):
        labels, other_labels = random_pair(seed)
        ratings = np.random.default_rng(seed).random(other_labels.max())
        truth.append(segments_of(labels))
        predicted.append(
            [
                Segment(s.left, s.top, s.crop, float(r), 1.0)
                for s, r in zip(segments_of(other_labels), ratings, strict=True)
            ]
        )
        masks = [
            {"masks": torch.tensor(np.array([s.full(labels.shape) for s in group]))}
            for group in (predicted[-1], truth[-1])
        ]
        ours, expected = [{**m, "labels": torch.ones(len(m["masks"]), dtype=torch.int64)} for m in masks]
        theirs.update([{**ours, "scores": torch.tensor(ratings)}], [expected])
    result = theirs.compute()
    ours = average_precision(truth, predicted, [(60, 80)] * 3)
    assert 0 < ours["ap"] < ours["ap50"] < 1
    assert ours == {"ap": pytest.approx(result["map"].item()), "ap50": pytest.approx(result["map_50"].item())}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_coco_annotations_hold_the_mask():
    labels, _ = random_pair(0)
    for number, segment in enumerate(segments_of(labels), start=1):
        annotation = coco_annotation(segment, labels.shape)
        np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), labels == number)
        assert annotation["area"] == (labels == number).sum()
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
