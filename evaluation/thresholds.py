"""Finds the thresholds at which a model finds the objects of images best.

sweep = sweep_thresholds(predictor, labelled_images([*parts.train, *parts.validation]), settings)
print(sweep)
sweep.settings.save(folder)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from image_data.pillow_images import number_of
from image_data.samples import Sample
from segmentation.automatic import Candidates, choose, find_candidates, scaled_up
from segmentation.predictor import Predictor
from segmentation.segments import Segment, iou_matrix, segments_of
from segmentation.settings import SegmentationSettings

from .metrics import mean_segmentation_accuracy


RATINGS = np.arange(30, 100, 2.5) / 100
STABILITIES = np.array([0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975])
ABOUT_AS_GOOD = 0.01  # of mSA


@dataclass(frozen=True, eq=False)
class ThresholdSweep:
    """What each pair of thresholds finds.

    Args:
        settings: With the chosen thresholds; with those given, if no pair finds anything.
        scores: Mean mSA over the images, (ratings, stabilities).
        best_rating: Highest rating of any mask.
        images: Number of images.
    """

    settings: SegmentationSettings
    scores: np.ndarray
    best_rating: float
    images: int

    def __str__(self) -> str:
        """One sentence."""
        if not self.scores.any():
            return (
                f"No thresholds find any of the objects automatically: the best mask is rated {self.best_rating:.2f}. "
                "Train longer, or with more images."
            )
        return (
            f"Thresholds for automatic masks, from {number_of(self.images, 'image')}: "
            f"min_iou {self.settings.min_iou:g}, min_stability {self.settings.min_stability:g} "
            f"(mSA {self.scores.max():.3f})."
        )


def sweep_thresholds(
    predictor: Predictor,
    labelled: Iterable[tuple[np.ndarray, Sequence[Segment]]],
    settings: SegmentationSettings,
) -> ThresholdSweep:
    """Tries thresholds for ratings and stability, and takes the middle of those that are about as good as the best.

    The model runs once for each image; all else happens with its masks.

    Args:
        predictor: The trained model.
        labelled: Images (H, W, 3) uint8, or tiles of them, and the objects in them.
        settings: All but the thresholds.
    """
    scores, ratings = [], []
    for image, truth in labelled:
        candidates = find_candidates(
            predictor, predictor.encode(image), settings.grid, float(RATINGS[0]), float(STABILITIES[0])
        )
        scores.append(scores_of(predictor, candidates, truth, settings))
        ratings.append(candidates.best_rating)
    mean = np.mean(scores, axis=0)
    if mean.any():
        rating, stability = middle(mean)
        settings = replace(settings, min_iou=float(RATINGS[rating]), min_stability=float(STABILITIES[stability]))
    return ThresholdSweep(settings, mean, max(ratings), len(ratings))


def labelled_images(samples: Sequence[Sample], most: int = 8) -> Iterator[tuple[np.ndarray, list[Segment]]]:
    """Yields images or tiles, and the objects that show in them: all, or `most` of them, evenly spread."""
    for index in np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)):
        image, labels = samples[index].read()
        yield image, segments_of(labels)


def scores_of(
    predictor: Predictor, candidates: Candidates, truth: Sequence[Segment], settings: SegmentationSettings
) -> np.ndarray:
    """Returns the mSA of one image at each pair of thresholds, (ratings, stabilities)."""
    scores = np.zeros((len(RATINGS), len(STABILITIES)))
    known: dict[int, np.ndarray] = {}  # the IoU of each candidate with the labelled objects
    for column, stability in enumerate(STABILITIES):
        chosen = choose(candidates, replace(settings, min_iou=0.0, min_stability=float(stability)))
        for index in chosen:
            if index not in known:
                known[index] = iou_matrix(truth, scaled_up(predictor, candidates, np.array([index])))
        # Best first: a higher threshold for ratings takes the first few, and removes no mask that has removed others.
        for row, rating in enumerate(RATINGS):
            above = [known[index] for index in chosen[candidates.ratings[chosen] >= rating]]
            iou = np.concatenate(above, axis=1) if above else np.zeros((len(truth), 0))
            scores[row, column] = mean_segmentation_accuracy(iou)
    return scores


def middle(scores: np.ndarray) -> tuple[int, int]:
    """Returns the cell nearest to the middle of the region around the best cell that is about as good as it."""
    regions, _ = ndimage.label(scores >= scores.max() - ABOUT_AS_GOOD)
    cells = np.argwhere(regions == regions.flat[scores.argmax()])
    row, column = cells[np.square(cells - cells.mean(0)).sum(1).argmin()]
    return int(row), int(column)
