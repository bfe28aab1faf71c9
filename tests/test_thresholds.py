"""The thresholds that the recipe stores with the weights."""

from dataclasses import replace

import numpy as np
import pytest
from labelled_images import Array, blocks
from transformers import AutoProcessor, SamModel

from checkpoint_tools.checkout import SAM_TINY
from evaluation.metrics import mean_segmentation_accuracy
from evaluation.thresholds import RATINGS, STABILITIES, labelled_images, middle, sweep_thresholds
from image_data.samples import Sample
from pretraining.drawn_scenes import draw_scene
from segmentation.automatic import automatic_segments
from segmentation.predictor import Predictor
from segmentation.segments import iou_matrix, segments_of
from segmentation.settings import SegmentationSettings


SETTINGS = SegmentationSettings(grid=10)


@pytest.fixture(scope="module")
def tiny() -> Predictor:
    return Predictor(SamModel.from_pretrained(SAM_TINY).eval(), AutoProcessor.from_pretrained(SAM_TINY))


@pytest.fixture(scope="module")
def scenes() -> list:
    drawn = [draw_scene(np.random.default_rng(seed), 128, difficulty=0.3) for seed in (3, 4)]
    return [(image, segments_of(labels)) for image, labels in drawn]


@pytest.mark.slow
def test_scores_are_those_of_the_thresholds(tiny, scenes):
    sweep = sweep_thresholds(tiny, scenes, SETTINGS)
    assert sweep.images == 2
    assert 0.5 < sweep.best_rating < 1
    for cell in ((0, 0), (14, 3), (18, 2)):
        settings = replace(SETTINGS, min_iou=float(RATINGS[cell[0]]), min_stability=float(STABILITIES[cell[1]]))
        expected = [
            mean_segmentation_accuracy(
                iou_matrix(truth, automatic_segments(tiny, tiny.encode(image), settings).segments)
            )
            for image, truth in scenes
        ]
        assert sweep.scores[cell] == pytest.approx(np.mean(expected)), cell
    assert sweep.scores.max() > 1.2 * sweep.scores[0, 0] > 0
    chosen = sweep.settings
    score = sweep.scores[np.isclose(RATINGS, chosen.min_iou)][0, np.isclose(STABILITIES, chosen.min_stability)]
    assert score >= sweep.scores.max() - 0.01
    assert replace(chosen, min_iou=SETTINGS.min_iou, min_stability=SETTINGS.min_stability) == SETTINGS
    assert f"min_iou {chosen.min_iou:g}" in str(sweep)


def test_where_nothing_is_found_the_best_rating_is_told(tiny, scenes):
    sweep = sweep_thresholds(tiny, [(scenes[0][0], far_away())], SETTINGS)
    assert sweep.settings == SETTINGS
    assert f"the best mask is rated {sweep.best_rating:.2f}" in str(sweep)


def far_away() -> list:
    """Objects that no mask agrees with."""
    labels = np.zeros((128, 128), int)
    labels[::16, ::16] = np.arange(1, 65).reshape(8, 8)
    return segments_of(labels)


def test_the_middle_of_the_best_region_is_taken():
    scores = np.zeros((7, 9))
    scores[1:6, 2:7] = 0.8
    scores[1, 2] = 0.805  # the best, at a corner
    scores[:, 8] = 0.8  # as good, but apart
    assert middle(scores) == (3, 4)
    scores[:] = 0
    scores[6, 8] = 0.1
    assert middle(scores) == (6, 8)


def test_images_are_spread_over_the_samples():
    samples = [Sample(Array(blocks() * 0 + number), np.s_[0:9, 0:5], np.array([number])) for number in range(1, 31)]
    images = [(image.shape, segments) for image, segments in labelled_images(samples, most=4)]
    assert [shape for shape, _ in images] == [(9, 5, 3)] * 4
    assert [round(segment.area) for _, segments in images for segment in segments] == [45] * 4
    assert len(list(labelled_images(samples[:2]))) == 2
