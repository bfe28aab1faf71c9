"""Masks are read as the objects that they show, or the run stops and asks."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from image_data.labels import VOID, LabelReading
from image_data.mask_facts import examine
from image_data.mask_interpretation import interpret
from image_data.pillow_images import DataError


def discs(seed: int = 0, number: int = 6, side: int = 120) -> np.ndarray:
    """Labels of discs that do not touch, on 0."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), dtype=np.uint8)
    rows, columns = np.mgrid[:side, :side]
    for place, label in zip(rng.permutation(9)[:number], range(1, number + 1), strict=True):
        centre = 20 + 40 * np.array(divmod(int(place), 3)) + rng.integers(-3, 4, 2)
        labels[np.hypot(rows - centre[0], columns - centre[1]) < rng.uniform(7, 12)] = label
    return labels


def read(masks: list[np.ndarray], **options) -> tuple[list[np.ndarray], list[str]]:
    """Returns the labels of each mask, and the notes."""
    reading = LabelReading(**options)
    examined = masks if reading.threshold is None else [mask >= reading.threshold for mask in masks]
    interpreted, notes = interpret([examine(mask, f"{n}.png") for n, mask in enumerate(examined)], reading)
    return [interpreted.objects(mask) for mask in masks], notes


def question(masks: list[np.ndarray], **options) -> str:
    with pytest.raises(DataError) as raised:
        read(masks, **options)
    return str(raised.value)


def count(labels: list[np.ndarray]) -> int:
    return sum(np.count_nonzero(np.unique(one) > 0) for one in labels)


DISCS = [discs(seed) for seed in range(4)]


def test_objects_keep_their_numbers_and_nothing_is_said():
    labels, notes = read(DISCS)
    assert notes == []
    for one, expected in zip(labels, DISCS, strict=True):
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(one, expected)
    wide, _ = read([mask.astype(np.int64) * 300 for mask in DISCS])
    assert wide[0].dtype == np.uint16
    np.testing.assert_array_equal(wide[0], DISCS[0] * 300.0)
    huge, _ = read([mask.astype(np.int64) * 10**12 for mask in DISCS])
    assert huge[0].dtype == np.uint8
    np.testing.assert_array_equal(huge[0], DISCS[0])


def with_rings(mask: np.ndarray, void: int, dtype: type) -> np.ndarray:
    """As in VOC: a line without a label around each object."""
    ring = ndimage.binary_dilation(mask > 0, iterations=3) & (mask == 0)
    return np.where(ring, dtype(void), mask.astype(dtype))


@pytest.mark.parametrize(("void", "dtype"), [(255, np.uint8), (65535, np.uint16), (255, np.int32)])
def test_void_around_objects_is_ignored_and_said(void, dtype):
    masks = [with_rings(mask, void, dtype) for mask in DISCS]
    labels, notes = read(masks)
    assert notes == [
        f"{void} lies around the objects in 4 of 4 masks: its pixels do not count (--void none if it is an object)"
    ]
    for one, mask, expected in zip(labels, masks, DISCS, strict=True):
        np.testing.assert_array_equal(one == VOID, mask == void)
        np.testing.assert_array_equal(np.maximum(one, 0), expected)
        assert one.dtype == np.int8
    labels, notes = read(masks, void=(), instances="labels")
    assert count(labels) == count(DISCS) + 4 and notes == []


def test_void_elsewhere_is_asked_about():
    masks = [mask.copy() for mask in DISCS]
    for mask in masks[1:3]:
        mask[:10, 40:60] = 255
    text = question(masks)
    assert "255 is in 2 of 4 masks, as in 1.png, beside numbers up to 6." in text
    assert "--void 255;" in text and "--void none" in text
    assert count(read(masks, void=(255,))[0]) == count(DISCS)
    assert count(read(masks, void=())[0]) == count(DISCS) + 2


def test_other_numbers_around_objects_are_asked_about():
    """A trimap, as of the Oxford pets: 1 is the object, 2 the background, 3 a line between them."""
    trimaps = [
        np.where(with_rings(mask > 0, 3, np.uint8) == 0, 2, with_rings(mask > 0, 3, np.uint8)) for mask in DISCS
    ]
    text = question(trimaps, instances="components")
    assert "3 is in 4 of 4 masks, as in 0.png, around the others" in text and "--void 3;" in text
    labels, notes = read(trimaps, instances="components", void=(3,))
    assert count(labels) == 24 and "2 surrounds all else" in notes[0]
    other = [np.where(mask == 3, 128, np.where(mask == 1, 255, 0)).astype(np.uint8) for mask in trimaps]
    assert "255 is in 4 of 4 masks, as in 0.png, beside numbers up to 128" in question(other)


def test_255_may_be_one_of_many_objects():
    counted = [np.where(mask > 0, mask + 249, 0).astype(np.uint8) for mask in DISCS]  # up to 255
    evenly = [discs(seed, 3) * 85 for seed in range(4)]  # 85, 170, 255
    assert read(counted)[1] == []
    assert read(evenly)[1] == []


@pytest.mark.parametrize("number", [1, 7, 255])
def test_a_background_that_surrounds_all_else_is_found_where_0_is_in_no_mask(number):
    masks = [np.where(mask > 0, mask + 10, number).astype(np.uint8) for mask in DISCS]
    labels, notes = read(masks)
    assert count(labels) == count(DISCS)
    assert notes == [
        f"0 is in no mask; {number} surrounds all else, and is the background (--background 0 if it is an object)"
    ]
    assert count(read(masks, background=(0,), void=())[0]) == count(DISCS) + 4


def test_a_background_beside_0_is_asked_about():
    inverted = [np.where(mask > 0, 0, 255).astype(np.uint8) for mask in DISCS]
    text = question(inverted)
    assert "In 4 of 4 masks, 255 surrounds all else, as in 0.png" in text
    assert "say --background 255; if it is an object, --background 0" in text
    labels, _ = read(inverted, background=(255,), instances="components")
    assert count(labels) == count(DISCS)
    for one, mask in zip(labels, DISCS, strict=True):
        np.testing.assert_array_equal(one > 0, mask > 0)


def test_objects_at_the_sides_are_no_background():
    """A large object in a corner, objects without background between them, and one close-up of an object."""
    corner = DISCS[0].copy()
    corner[60:, :110] = 9
    cells = np.arange(9, dtype=np.uint8).reshape(3, 3).repeat(40, 0).repeat(40, 1) + 1
    close_up = np.ones((120, 120), dtype=np.uint8)
    close_up[50:60, 50:60] = 0
    _, notes = read([corner, cells, *DISCS])
    assert notes == []
    _, notes = read([close_up, *DISCS])
    assert notes == ["in 1 of 5 masks, one object surrounds or fills all: 0.png"]


def test_one_label_that_fills_everything_is_named():
    full = np.full((50, 60), 255, dtype=np.uint8)
    text = question([full, full, DISCS[0]])
    assert "In 2 of 3 masks, 255 fills the image, as in 0.png (100% of the pixels)" in text
    assert "--background 0 255;" in text and "--background 0." in text
    assert count(read([full, full], background=(0,))[0]) == 2
    assert count(read([full, full, DISCS[0]], background=(0, 255))[0]) == count(DISCS[:1])


@pytest.mark.parametrize("values", [(255, np.uint8), (1, np.uint8), (1, bool)])
def test_one_label_over_many_parts_is_asked_about(values):
    masks = [((mask > 0) * values[0]).astype(values[1]) for mask in DISCS]
    text = question(masks)
    assert "The masks have 4 labels in 24 separate parts; 0.png has 1 in 6." in text
    assert "--instances components; " in text and "--instances labels" in text
    labels, _ = read(masks, instances="components")
    assert count(labels) == 24
    for one, expected in zip(labels, DISCS, strict=True):
        pairs = np.unique(np.stack([one.ravel(), expected.ravel()]), axis=1)
        assert pairs.shape[1] == 7, "every part is one disc"
    assert count(read(masks, instances="labels")[0]) == 4


def test_classes_over_many_parts_are_asked_about():
    classes = [np.where(mask > 0, 1 + mask % 3, 0).astype(np.uint8) for mask in DISCS]
    assert "The masks have 12 labels in 24 separate parts" in question(classes)
    assert count(read(classes, instances="components")[0]) == 24


def test_few_objects_of_several_parts_and_specks_are_said_at_most():
    masks = [mask.copy() for mask in DISCS]
    masks[0][0, 0] = masks[1][5, 5] = 1  # specks
    assert read(masks)[1] == []
    masks[0][masks[0] == 2] = 1
    assert read(masks)[1] == [
        "1 of 23 objects have several separate parts (--instances components if each is an object)"
    ]


def as_jpeg(mask: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def resized(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((150, 150), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("spoil", [as_jpeg, resized])
def test_soft_edges_are_no_objects(spoil):
    masks = [spoil(((mask > 0) * 255).astype(np.uint8)) for mask in DISCS]
    text = question(masks)
    assert ".png: " in text and "different numbers" in text and "4 of 4 masks are like this" in text
    assert "say --threshold 128" in text
    labels, _ = read(masks, threshold=128, instances="components")
    assert count(labels) == 24
    assert "--instances components" in question(masks, threshold=128)
    numbered = [spoil(mask * 40) for mask in DISCS]
    text = question(numbered)
    assert "nearest neighbour" in text and "--threshold" not in text
    assert count(read(numbered, instances="labels", void=(), background=(0,))[0]) > 100


def test_many_tiny_objects_are_objects():
    rng = np.random.default_rng(0)
    mask = np.zeros((200, 200), dtype=np.uint16)
    mask.reshape(50, 4, 50, 4)[:, 1, :, 1:3] = 1 + rng.permutation(2500).reshape(50, 50, 1)
    labels, notes = read([mask])
    assert count(labels) == 2500 and notes == []


def test_negative_numbers_are_refused_unless_they_are_void():
    mask = DISCS[0].astype(np.int16)
    mask[:5] = -1
    with pytest.raises(ValueError, match=r"negative label -1; .* say --void -1"):
        LabelReading().objects(mask)
    labels = LabelReading(void=(-1,)).objects(mask)
    assert (labels[:5] == VOID).all() and count([labels]) == 6


def test_0_is_an_object_on_another_background_unless_it_is_void():
    mask = np.full((20, 30), 7, dtype=np.uint8)
    mask[2:8, 2:8], mask[12:18, 12:18] = 0, 26
    labels = LabelReading(background=(7,)).objects(mask)
    assert len(np.unique(labels[labels > 0])) == 2
    labels = LabelReading(background=(7,), void=(0,)).objects(mask)
    assert (labels[2:8, 2:8] == VOID).all() and set(np.unique(labels)) == {VOID, 0, 26}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"instances": "parts"}, "--instances parts: expected labels or components"),
        ({"threshold": 0}, "--threshold 0"),
    ],
)
def test_settings_out_of_range_are_named(changes, problem):
    with pytest.raises(DataError, match=problem):
        replace(LabelReading(), **changes)


def test_empty_masks_ask_nothing():
    assert read([np.zeros((5, 6), np.uint8)] * 3)[1] == []
    assert read([]) == ([], [])
