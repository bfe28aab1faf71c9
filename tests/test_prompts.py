"""What the model is asked about in training and validation."""

import numpy as np
import pytest
import torch
from labelled_images import MASK_SIDE, Array, blocks
from torch.utils.data import default_collate

from finetuning.augmentation import blurred, changed_intensity
from finetuning.prompts import (
    MOST_JITTER,
    OUTSIDE,
    PADDING,
    ItemEncoder,
    Prompts,
    TrainingSet,
    ValidationSet,
    draw_box,
)
from image_data.samples import Sample, train_validation_parts


def training_set(processor, size: int = 12, **changes) -> TrainingSet:
    samples = train_validation_parts([Array(blocks(), str(n)) for n in range(4)], MASK_SIDE, 0.25, min_area=1).train
    kind = changes.pop("prompts", Prompts("mixed", points=2, negative_points=2, clicks=3))
    return TrainingSet(samples, ItemEncoder(processor, MASK_SIDE, kind), size, **changes)


def test_items_depend_on_seed_and_number_alone(processor):
    items = list(map(training_set(processor).__getitem__, range(12)))
    torch.manual_seed(5), np.random.seed(5)
    again = training_set(processor, size=100)
    for number in reversed(range(12)):
        torch.testing.assert_close(again[number], items[number], rtol=0, atol=0)
    other = training_set(processor, seed=1)
    assert not all(torch.equal(other[n]["pixel_values"], items[n]["pixel_values"]) for n in range(12))


def test_each_sample_is_drawn_before_any_is_drawn_again(processor):
    drawn = training_set(processor)
    for turn in range(4):
        assert len({drawn.draw(3 * turn + place).source.name for place in range(3)}) == 3


@pytest.mark.parametrize("kind", ["mixed", "point", "box"])
def test_items_hold_the_prompts_that_are_asked_for(kind, processor):
    batch = default_collate([training_set(processor, prompts=Prompts(kind, points=2))[number] for number in range(3)])
    assert ("input_points" in batch, "input_labels" in batch) == (kind != "box",) * 2
    assert ("input_boxes" in batch) == (kind != "point")
    assert "draws" not in batch
    assert batch["labels"].shape == (3, 6, MASK_SIDE, MASK_SIDE)


def test_box_noise_is_a_tenth_of_the_sides_but_capped():
    rng = np.random.default_rng(0)
    for side, deviation in ((50, 5), (800, MOST_JITTER)):
        box = np.array([100, 100, 100 + side, 100 + side])
        noise = np.array([draw_box(box, (1000, 1000), 0.1, rng) for _ in range(200)]) - box
        assert np.abs(noise).max() <= MOST_JITTER
        assert noise.std() == pytest.approx(deviation, rel=0.15)


@pytest.mark.parametrize("augment", ["none", "crop", "turn"])
def test_prompts_belong_to_the_targets(augment, processor):
    """Positive points lie in the target mask, negative ones beside it, boxes around it."""
    items = training_set(processor, augment=[augment], prompts=Prompts("mixed", points=2, negative_points=2, jitter=0))
    for number in range(12):
        item = items[number]
        for index, target in enumerate(item["labels"]):
            rows, columns = np.nonzero(target.numpy() == 1)
            if "input_boxes" in item:
                box = item["input_boxes"][index].numpy() / 2  # of 64 pixels to masks of 32
                np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=2)
            for (x, y), label in zip(item["input_points"][index], item["input_labels"][index], strict=True):
                near = target[max(0, int(y / 2) - 1) : int(y / 2) + 2, max(0, int(x / 2) - 1) : int(x / 2) + 2]
                assert label == 0 or (near == 1).any()
                assert label == 1 or (near <= 0).any()
    assert (items[0]["labels"] == OUTSIDE).any() == True  # noqa: E712, it is not square


def test_an_object_that_fills_the_image_has_no_points_beside_it(processor):
    everything = Sample(Array(np.ones((40, 40), dtype=np.int64)), np.s_[:, :], np.array([1]))
    encode = ItemEncoder(processor, MASK_SIDE, Prompts("point", points=1, negative_points=1))
    assert ValidationSet([everything], encode)[0]["input_labels"].tolist() == [[1, PADDING]]


def test_validation_asks_for_every_object_once(processor):
    samples = train_validation_parts([Array(blocks(), str(n)) for n in range(4)], MASK_SIDE, 0.5).validation
    items = ValidationSet(samples, ItemEncoder(processor, MASK_SIDE, Prompts("mixed")), objects=4)
    shapes = [len(items[index]["labels"]) for index in range(len(items))]
    assert shapes == [4, 2, 4, 2]
    np.testing.assert_allclose(items[0]["input_points"][0, 0] * 48 / 64, [7, 7], atol=1.5)  # the middle of the block


@pytest.mark.parametrize("kind", ["point", "box"])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_images_of_few_rows_are_not_taken_for_channels_first(rows, kind, processor):
    labels = np.zeros((rows, 40), dtype=np.uint8)
    labels[:, 10:30] = 1
    sample = Sample(Array(labels), np.s_[:, :], np.array([1]))
    item = ValidationSet([sample], ItemEncoder(processor, MASK_SIDE, Prompts(kind)))[0]
    lit = item["pixel_values"][0] != item["pixel_values"][0, -1, -1]
    assert lit.any(1).sum() <= round(rows * 64 / 40) < lit.any(0).sum()


def test_intensity_and_blur_change_the_look_alone(processor):
    plain = training_set(processor)
    for look in ("intensity", "blur"):
        changed, again = (training_set(processor, augment=["turn", look]) for _ in range(2))
        looks = [torch.equal(changed[n]["pixel_values"], plain[n]["pixel_values"]) for n in range(6)]
        assert not all(looks)
        for number in range(3):
            assert torch.equal(changed[number]["labels"][0], again[number]["labels"][0])
            assert torch.equal(changed[number]["pixel_values"], again[number]["pixel_values"])


def test_intensity_is_monotonic_and_blur_keeps_the_mean():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    photo = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    rng = np.random.default_rng(1)
    darker, blurs = [], []
    for _ in range(50):
        values = changed_intensity(ramp, rng)[0, :, 0].astype(int)
        assert (np.diff(values) >= 0).all() and np.ptp(values) > 100
        darker.append(values[128] < 128)
        out = blurred(photo, rng)
        assert abs(out.mean() - photo.mean()) < 1
        blurs.append(out.std() < photo.std())
    assert 0.2 < np.mean(darker) < 0.8 and 0.3 < np.mean(blurs) < 0.7
