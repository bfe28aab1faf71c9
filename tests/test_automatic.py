"""Finding all objects of an image from a grid of points."""

import numpy as np
import pytest
import torch
from conftest import stock_model
from scipy import ndimage
from skimage import measure
from transformers import AutoProcessor, SamModel

from checkpoint_tools.checkout import SAM_TINY
from pretraining.drawn_scenes import draw_scene
from segmentation.automatic import automatic_segments, choose, find_candidates, grid_points, stability_scores
from segmentation.predictor import ObjectPrompts, Predictor
from segmentation.segments import as_labels, clean, distinct, segment_of, segments_of
from segmentation.settings import SegmentationSettings


def random_masks(number: int, seed: int = 0) -> np.ndarray:
    """Blobs with islands and holes."""
    noise = np.random.default_rng(seed).standard_normal((number, 41, 53))
    return ndimage.gaussian_filter(noise, (0, 2, 2)) > 0.1


@pytest.fixture(scope="module")
def tiny() -> Predictor:
    return Predictor(SamModel.from_pretrained(SAM_TINY).eval(), AutoProcessor.from_pretrained(SAM_TINY))


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return draw_scene(np.random.default_rng(3), 128, difficulty=0.5)[0][:100]  # not square: masks have padding


def test_cleaned_masks_are_the_largest_components_without_holes():
    masks = np.concatenate([random_masks(8), np.zeros((1, 41, 53), bool), np.ones((1, 41, 53), bool)])
    for mask, cleaned in zip(masks, clean(masks), strict=True):
        regions = measure.regionprops(measure.label(mask, connectivity=2))
        expected = np.zeros_like(mask)
        if regions:
            largest = max(regions, key=lambda region: region.area)
            expected[largest.slice] = ndimage.binary_fill_holes(largest.image)
        np.testing.assert_array_equal(cleaned, expected)
    assert clean(masks[:0]).shape == (0, 41, 53)


@pytest.mark.parametrize("max_overlap", [0.2, 0.4, 0.9])
def test_of_masks_of_one_object_the_best_rated_is_kept(max_overlap):
    masks = np.concatenate([random_masks(12), random_masks(12) ^ (random_masks(12, 1) & random_masks(12, 2))])
    ratings = np.random.default_rng(0).random(len(masks))
    chosen: list[int] = []
    for index in np.argsort(-ratings):
        if all((masks[index] & masks[o]).sum() / (masks[index] | masks[o]).sum() <= max_overlap for o in chosen):
            chosen.append(index)
    assert distinct(masks, ratings, max_overlap).tolist() == chosen
    assert max_overlap == 0.2 or len(chosen) > 1


def test_segments_and_label_images_hold_the_same_masks():
    labels = np.zeros((30, 40), int)
    labels[3:9, 4:10], labels[20:, 30:], labels[5, 6] = 7, 300, 9
    segments = segments_of(labels)
    assert [segment.area for segment in segments] == [35, 1, 100]
    assert segments[2].box == (30, 20, 40, 30)
    np.testing.assert_array_equal(segments[0].full(labels.shape), labels == 7)
    np.testing.assert_array_equal(as_labels(segments, labels.shape), np.searchsorted([0, 7, 9, 300], labels))
    shifted = segment_of(labels == 300, offset=(100, 200))
    assert shifted.box == (230, 120, 240, 130)
    assert segment_of(labels == 5).area == 0
    assert as_labels(segments[:1] * 70_000, labels.shape).max() == 70_000


def test_candidates_are_the_masks_of_the_grid(tiny, scene):
    """As one call of the stock model for each point gives them."""
    encoded = tiny.encode(scene)
    candidates = find_candidates(tiny, encoded, grid=9)
    assert len(candidates.masks) == 9 * 9 * 3
    inputs = tiny.processor(
        scene, input_points=[[[scene.shape[1] / 18, scene.shape[0] * 3 / 18]]], return_tensors="pt"
    )
    with torch.no_grad():
        outputs = tiny.model(
            **{k: v.float() if v.is_floating_point() else v for k, v in inputs.items() if "siz" not in k}
        )
    mine = slice(27, 30)  # the first point of the second row
    torch.testing.assert_close(torch.tensor(candidates.ratings[mine]), outputs.iou_scores[0, 0])
    torch.testing.assert_close(candidates.logits[mine], outputs.pred_masks[0, 0], atol=1e-4, rtol=1e-4)
    rows = -(-outputs.pred_masks.shape[-2] * 100 // 128)
    logits = outputs.pred_masks[0, 0][:, :rows]
    expected = (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2))
    torch.testing.assert_close(torch.tensor(candidates.stabilities[mine]), expected)
    assert candidates.masks.shape[1:] == logits.shape[1:]
    assert candidates.best_rating == candidates.ratings.max()


def test_thresholds_leave_the_same_masks_out_before_and_after(tiny, scene):
    encoded = tiny.encode(scene)
    settings = SegmentationSettings(min_iou=0.5, min_stability=0.7, grid=12)
    everything, above = find_candidates(tiny, encoded, 12), find_candidates(tiny, encoded, 12, 0.5, 0.7)
    assert 0 < len(above.masks) < len(everything.masks)
    assert above.best_rating == everything.best_rating
    first, second = (each.ratings[choose(each, settings)] for each in (everything, above))
    np.testing.assert_array_equal(first, second)


def test_segments_are_whole_distinct_and_on_the_objects(tiny):
    scene, labels = draw_scene(np.random.default_rng(3), 128, difficulty=0.1)
    segments = automatic_segments(
        tiny, tiny.encode(scene), SegmentationSettings(min_iou=0.6, min_stability=0.6, grid=16)
    ).segments
    assert len(segments) > 1
    masks = np.array([segment.full(scene.shape[:2]) for segment in segments])
    np.testing.assert_array_equal(masks, clean(masks))
    assert sorted((segment.rating for segment in segments), reverse=True) == [s.rating for s in segments]
    overlaps = [
        (first & second).sum() / (first | second).sum() for i, first in enumerate(masks) for second in masks[:i]
    ]
    assert max(overlaps) < 0.6, "0.5 at the resolution of the decoder"
    objects = [labels == label for label in np.unique(labels)[1:]]
    best = [max((mask & thing).sum() / (mask | thing).sum() for mask in masks) for thing in objects]
    assert np.median(best) > 0.8


def test_nothing_found_is_no_error(tiny, scene):
    settings = SegmentationSettings(min_iou=1.0, grid=4)
    result = automatic_segments(tiny, tiny.encode(scene), settings)
    assert result.segments == []
    assert 0 < result.best_rating < 1
    assert result.best_stability == 0


def test_stability_of_empty_masks_is_zero():
    assert stability_scores(torch.tensor([[[-5.0]], [[0.0]], [[5.0]]])).tolist() == [0, 0, 1]


def test_the_grid_is_that_of_the_pipeline():
    points = np.concatenate([np.reshape(batch, (-1, 2)) for batch in grid_points((30, 60), 10)])
    steps = [(i + 0.5) / 10 for i in range(10)]
    np.testing.assert_allclose(points, [[60 * x, 30 * y] for y in steps for x in steps])


class TestPredictor:
    """Prompts of all kinds, against a call of the stock model with the processor's inputs."""

    def stock(self, processor, image, multimask=False, masks=None, **prompts):
        model = stock_model()
        inputs = processor(image, return_tensors="pt", **prompts)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        names = {"pixel_values", "input_points", "input_labels", "input_boxes"} & set(inputs)
        tensors = {name: inputs[name] if "labels" in name else inputs[name].float() for name in names}
        with torch.no_grad():
            outputs = model(**tensors, input_masks=masks, multimask_output=multimask)
        return model, outputs, processor.post_process_masks(outputs.pred_masks, *sizes)[0]

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ({"points": [[[9, 20]], [[40, 3]]]}, {"input_points": [[[[9, 20]], [[40, 3]]]]}),
            (
                {"points": [[[9, 20], [30, 31]], [[40, 3]]], "labels": [[1, 0], [1]]},
                {"input_points": [[[[9, 20], [30, 31]], [[40, 3], [0, 0]]]], "input_labels": [[[1, 0], [1, -10]]]},
            ),
            ({"boxes": [[3, 4, 30, 40], [10, 0, 50, 30]]}, {"input_boxes": [[[3, 4, 30, 40], [10, 0, 50, 30]]]}),
            (
                {"boxes": [[3, 4, 30, 40]], "points": [[[9, 20]]]},
                {"input_boxes": [[[3, 4, 30, 40]]], "input_points": [[[[9, 20]]]]},
            ),
        ],
        ids=["points", "several points", "boxes", "box and point"],
    )
    @pytest.mark.parametrize("multimask", [False, True])
    def test_prompts_give_the_outputs_of_stock_sam(self, ours, theirs, multimask, processor):
        image = np.random.default_rng(0).integers(0, 255, (44, 52, 3), dtype=np.uint8)
        model, outputs, full = self.stock(processor, image, multimask, **theirs)
        predictor = Predictor(model, processor)
        encoded = predictor.encode(image)
        ratings, logits = predictor.decode(encoded, ObjectPrompts(**ours), multimask)
        torch.testing.assert_close(ratings, outputs.iou_scores[0])
        torch.testing.assert_close(logits, outputs.pred_masks[0])
        best = outputs.iou_scores[0].argmax(-1)
        masks, best_ratings, _ = predictor.predict(encoded, ObjectPrompts(**ours), multimask)
        np.testing.assert_array_equal(masks, full[torch.arange(len(best)), best].numpy())
        np.testing.assert_allclose(best_ratings, outputs.iou_scores[0].max(-1).values, rtol=1e-5)

    def test_masks_of_several_objects(self, processor):
        """One call of the stock model for each: it takes one mask an image."""
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        masks, boxes = torch.randn(2, 32, 32), [[3, 4, 30, 40], [10, 0, 50, 30]]
        predictor = Predictor(stock_model(), processor)
        ratings, logits = predictor.decode(
            predictor.encode(image), ObjectPrompts(boxes=boxes, masks=masks), multimask=False
        )
        alone, _ = predictor.decode(predictor.encode(image), ObjectPrompts(masks=masks), multimask=False)
        assert (alone != ratings).any()
        for index, box in enumerate(boxes):
            _, outputs, _ = self.stock(processor, image, masks=masks[index][None, None], input_boxes=[[box]])
            torch.testing.assert_close(ratings[index], outputs.iou_scores[0, 0])
            torch.testing.assert_close(logits[index], outputs.pred_masks[0, 0])

    def test_a_single_point_may_mean_several_objects(self):
        assert ObjectPrompts(points=[[[1, 2]], [[3, 4]]]).is_single_point
        assert not ObjectPrompts(points=[[[1, 2]], [[3, 4], [5, 6]]]).is_single_point
        assert not ObjectPrompts(points=[[[1, 2]]], boxes=[[1, 2, 3, 4]]).is_single_point
        assert not ObjectPrompts(boxes=[[1, 2, 3, 4]]).is_single_point
