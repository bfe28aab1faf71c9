"""What is cut into tiles, left out, and held out for validation."""

import numpy as np
import pytest
from labelled_images import MASK_SIDE, Array, blocks

from image_data.pillow_images import DataError
from image_data.samples import BETWEEN_PARTS, shrink, train_validation_parts
from image_data.sources import Source
from image_data.tiles import tiles


def test_tiles_cover_the_image_and_overlap():
    seen = np.zeros((100, 37), dtype=int)
    windows = list(tiles((slice(0, 100), slice(0, 37)), 40, 0.25))
    for window in windows:
        assert seen[window].shape == (40, 37)
        seen[window] += 1
    assert seen.min() == 1
    assert [window[0].start for window in windows] == [0, 30, 60]


def test_labels_agree_between_tiles():
    labels = blocks()
    parts = train_validation_parts([Array(labels), Array(labels.copy())], MASK_SIDE, 0.5, tile=24, min_area=1)
    for sample in parts.train + parts.validation:
        assert np.array_equal(sample.read()[1], labels[sample.window])
        assert set(sample.ids) == set(np.unique(labels[sample.window])) - {0}
    shown = [label for sample in parts.train for label in sample.ids]
    assert set(shown) == set(np.unique(labels)) - {0}
    assert len(shown) > 6, "overlapping tiles share objects"


def test_tiny_fragments_are_left_out_and_counted():
    labels = blocks()
    labels[0, 0], labels[39, 0] = 1, 2
    parts = train_validation_parts([Array(labels), Array(labels.copy())], MASK_SIDE, 0.5, min_area=4)
    for sample in parts.train + parts.validation:
        assert not {1, 2} & set(sample.ids)
        assert (shrink(labels, MASK_SIDE) == sample.ids[:, None, None]).sum((1, 2)).min() >= 4
    assert 4 in parts.left_out.values()


def test_whole_images_are_kept_for_validation():
    sources: list[Source] = [Array(blocks(), str(number)) for number in range(10)]
    parts = train_validation_parts(sources, MASK_SIDE, 0.3, tile=24)
    names = [{sample.source.name for sample in samples} for samples in (parts.train, parts.validation)]
    assert [len(held) for held in names] == [7, 3]
    assert not names[0] & names[1]
    assert parts.part_side is None
    again = train_validation_parts(sources, MASK_SIDE, 0.3, tile=24)
    assert {sample.source.name for sample in again.validation} == names[1]
    assert {
        sample.source.name for sample in train_validation_parts(sources, MASK_SIDE, 0.3, seed=1).validation
    } != names[1]


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_of_one_image_a_part_is_kept_and_nothing_reaches_into_both(tile, turned):
    labels = blocks().T if turned else blocks()
    parts = train_validation_parts([Array(labels)], MASK_SIDE, 0.5, tile=tile, min_area=1)
    shown = []
    for samples in (parts.train, parts.validation):
        seen = np.zeros(labels.shape, dtype=bool)
        for sample in samples:
            seen[sample.window] = True
        shown.append((seen, {label for sample in samples for label in sample.ids}))
    (train, train_ids), (validation, validation_ids) = shown
    assert not (train & validation).any()
    assert train_ids and validation_ids and not train_ids & validation_ids
    spanning = {310, 340}  # the blocks in the middle
    assert not spanning & (train_ids | validation_ids)
    assert parts.left_out[BETWEEN_PARTS] == 2
    assert parts.part_side == 40, "24 x 40 pixels of 48 x 40"


def test_nothing_to_validate_on_is_said():
    labels = np.zeros((40, 48), dtype=np.int64)
    labels[4:12, 4:12] = 1
    with pytest.raises(DataError, match="No validation objects left"):
        train_validation_parts([Array(labels)], MASK_SIDE)
