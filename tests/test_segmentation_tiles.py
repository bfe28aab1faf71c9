"""Objects of an image that is segmented in overlapping tiles."""

from dataclasses import replace

import numpy as np
import pytest

from checkpoint_tools.checkout import SAM_TINY
from evaluation.metrics import detection_metrics
from pretraining.drawn_scenes import draw_scene
from segmentation.adapted_model import load_base
from segmentation.predictor import Predictor
from segmentation.segmenter import ImageSegmenter, PromptedObject
from segmentation.segments import iou_matrix, segments_of
from segmentation.settings import SegmentationSettings


@pytest.fixture(scope="module")
def mosaic() -> tuple[np.ndarray, np.ndarray]:
    """An image of four scenes, and its labels."""
    drawn = [draw_scene(np.random.default_rng(seed), 128, difficulty=0.1) for seed in (3, 4, 5, 6)]
    image, labels = (
        np.concatenate([np.concatenate([scene[part] for scene in drawn[row : row + 2]], 1) for row in (0, 2)])
        for part in (0, 1)
    )
    for number, (row, column) in enumerate(np.ndindex(2, 2)):
        part = labels[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
        part[part > 0] += 100 * number
    return image, labels


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    model, processor = load_base(str(SAM_TINY))
    return Predictor(model.eval(), processor)


@pytest.mark.slow
def test_small_objects_are_found_in_tiles(predictor, mosaic):
    settings = SegmentationSettings(grid=12, min_iou=0.65, min_stability=0.7)
    truth = segments_of(mosaic[1])
    scores = [
        detection_metrics([iou_matrix(truth, ImageSegmenter(predictor, mosaic[0], each).everything().segments)])
        for each in (settings, replace(settings, tile=128))
    ]
    assert scores[1]["msa"] > 1.2 * scores[0]["msa"] > 0


def test_prompts_in_tiles(predictor, mosaic):
    """Each object is predicted in the tile that shows it best, which gives the masks of this tile alone."""
    image, labels = mosaic
    settings = SegmentationSettings(tile=128, overlap=0)
    truth = segments_of(labels)
    objects = [PromptedObject(box=thing.box) for thing in truth]
    whole = ImageSegmenter(predictor, image, settings)
    segments = whole.prompted(objects)
    assert iou_matrix(truth, segments).diagonal().mean() > 0.7
    corner = [index for index, thing in enumerate(truth) if min(thing.box[:2]) >= 128]
    boxes = [np.subtract(truth[index].box, 128).tolist() for index in corner]
    alone = ImageSegmenter(predictor, image[128:, 128:], replace(settings, tile=None))
    for index, other in zip(corner, alone.prompted([PromptedObject(box=box) for box in boxes]), strict=True):
        assert segments[index].box == other.moved(128, 128).box
        np.testing.assert_array_equal(segments[index].crop, other.crop)


def test_an_object_larger_than_a_tile_gets_a_window_of_its_own(predictor, mosaic):
    segmenter = ImageSegmenter(predictor, mosaic[0], SegmentationSettings(tile=64))
    rows, columns = segmenter.window_of(PromptedObject(box=(20, 60, 200, 120)))
    assert (rows.start, rows.stop, columns.start, columns.stop) == (15, 166, 0, 246)
    (segment,) = segmenter.prompted([PromptedObject(box=(20, 60, 200, 120))])
    assert segment.area > 0


def test_each_tile_is_encoded_once(predictor, mosaic, monkeypatch):
    calls = []
    encode = predictor.encode
    monkeypatch.setattr(predictor, "encode", lambda image: calls.append(image.shape) or encode(image))
    segmenter = ImageSegmenter(predictor, mosaic[0], SegmentationSettings(tile=128, overlap=0, grid=2))
    for _ in range(2):
        segmenter.prompted([PromptedObject(points=[(x, y)]) for x in (30, 200) for y in (30, 200)])
        segmenter.everything()
    assert calls == [(128, 128, 3)] * 4
