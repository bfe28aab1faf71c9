"""Objects that overlap keep their own masks."""

import numpy as np
import pytest
from labelled_images import MASK_SIDE, Array

from finetuning.prompts import ItemEncoder, Prompts, TrainingSet, ValidationSet
from image_data.overlaps import layers_of, mask_of
from image_data.samples import Sample


def discs(*centres: tuple[int, int], size: tuple[int, int] = (40, 48), radius: int = 10) -> dict[int, np.ndarray]:
    rows, columns = np.indices(size)
    return {
        number: (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
        for number, (row, column) in enumerate(centres, start=1)
    }


def test_masks_return_from_their_layers_as_they_were():
    masks = discs((12, 12), (12, 16), (20, 20), (30, 40), (12, 12))
    labels = layers_of(masks.items(), (40, 48), max(masks))
    assert labels.shape == (4, 40, 48) and labels.dtype == np.uint8, "the fourth disc touches none"
    for number, mask in masks.items():
        np.testing.assert_array_equal(mask_of(labels, number), mask)


def test_objects_that_do_not_overlap_are_a_label_image():
    masks = discs((12, 12), (28, 36)) | {400: np.zeros((40, 48), dtype=bool)}
    labels = layers_of(masks.items(), (40, 48), max(masks))
    assert labels.shape == (40, 48) and labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, masks[1] + 2 * masks[2])
    assert layers_of([], (40, 48), 0).shape == (40, 48)


@pytest.mark.parametrize("augment", ["none", "turn"])
def test_targets_of_overlapping_objects_are_whole(augment, processor):
    """Of two discs on one spot, each is a target of the full size, in training and validation."""
    labels = layers_of(discs((20, 24), (20, 24)).items(), (40, 48), 2)
    sample = Sample(Array(labels), np.s_[:, :], np.array([1, 2]))
    encode = ItemEncoder(processor, MASK_SIDE, Prompts("box", jitter=0))
    item = ValidationSet([sample], encode)[0]
    areas = (item["labels"] == 1).sum((1, 2))
    assert areas[0] == areas[1] == pytest.approx(np.pi * 10**2 * (MASK_SIDE / 48) ** 2, rel=0.1)
    drawn = TrainingSet([sample], encode, size=1, augment=[augment])[0]
    for box, target in zip(drawn["input_boxes"] * MASK_SIDE / 64, drawn["labels"], strict=True):
        rows, columns = np.nonzero(target.numpy() == 1)
        np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=2)
