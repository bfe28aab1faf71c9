"""Finds all objects of an image, from a grid of points.

The image is encoded once. Each point of the grid gives three masks; those that the model rates low, or that are not
stable, are left out. What remains is cleaned (largest component, holes filled), and of masks that show the same object
the best rated is kept. All this happens at the resolution of the mask decoder; only the masks that are kept are scaled
up to the size of the image.

    segments = automatic_segments(predictor, predictor.encode(image), settings).segments

or, to try out thresholds without running the model again:

    candidates = find_candidates(predictor, predictor.encode(image), grid=32)
    segments = scaled_up(predictor, candidates, choose(candidates, settings))
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .predictor import EncodedImage, ObjectPrompts, Predictor
from .segments import Segment, clean, distinct, segment_of
from .settings import SegmentationSettings


POINTS_PER_BATCH = 64
MASKS_PER_BATCH = 16  # at the size of the image


@dataclass(frozen=True, eq=False)
class Candidates:
    """The masks of all points of a grid, at the resolution of the mask decoder.

    Args:
        encoded: The image.
        logits: (n, h, w).
        masks: bool (n, rows, columns): the cleaned masks, without the padding.
        ratings: IoU that the model predicts, (n,).
        stabilities: Stability scores, (n,).
        best_rating: Highest rating of all masks, also of those left out.
        best_stability: Highest stability score of the masks with a sufficient rating.
    """

    encoded: EncodedImage
    logits: torch.Tensor
    masks: np.ndarray
    ratings: np.ndarray
    stabilities: np.ndarray
    best_rating: float
    best_stability: float


@dataclass(frozen=True)
class AutomaticSegments:
    """What was found, best rated first, and what is needed to tell why it is not more.

    Args:
        segments: The objects.
        best_rating: Highest rating of all masks, also of those left out.
        best_stability: Highest stability score of the masks with a sufficient rating.
    """

    segments: list[Segment]
    best_rating: float
    best_stability: float


def automatic_segments(
    predictor: Predictor, encoded: EncodedImage, settings: SegmentationSettings
) -> AutomaticSegments:
    """Returns all objects of an image, or of a tile."""
    candidates = find_candidates(predictor, encoded, settings.grid, settings.min_iou, settings.min_stability)
    segments = scaled_up(predictor, candidates, choose(candidates, settings))
    return AutomaticSegments(segments, candidates.best_rating, candidates.best_stability)


def find_candidates(
    predictor: Predictor, encoded: EncodedImage, grid: int, min_iou: float = 0.0, min_stability: float = 0.0
) -> Candidates:
    """Returns the masks of a grid of points whose rating and stability are sufficient.

    Args:
        predictor: The model.
        encoded: The image.
        grid: Points along a side of the grid.
        min_iou: Lowest rating.
        min_stability: Lowest stability score.
    """
    parts = []
    best_rating = best_stability = 0.0
    for points in grid_points(encoded.size, grid):
        all_ratings, all_logits = predictor.decode(encoded, ObjectPrompts(points=points), multimask=True)
        best_rating = max(best_rating, all_ratings.max().item())
        rated = all_ratings >= min_iou
        logits, ratings = all_logits[rated], all_ratings[rated]  # (n, h, w), (n,)
        stabilities = stability_scores(predictor.without_padding(encoded, logits))
        best_stability = max([best_stability, *stabilities.tolist()])
        stable = stabilities >= min_stability
        logits, ratings, stabilities = logits[stable], ratings[stable], stabilities[stable]
        masks = clean((predictor.without_padding(encoded, logits) > 0).cpu().numpy())
        parts.append((logits.cpu(), masks, ratings.cpu().numpy(), stabilities.cpu().numpy()))
    kept_logits, *arrays = zip(*parts, strict=True)
    masks, kept_ratings, kept_stabilities = map(np.concatenate, arrays)
    return Candidates(
        encoded, torch.cat(kept_logits), masks, kept_ratings, kept_stabilities, best_rating, best_stability
    )


def grid_points(size: tuple[int, int], grid: int) -> Iterator[list[list[list[float]]]]:
    """Yields `grid` x `grid` points, evenly spread over an image (H, W), in batches: one (x, y) for each object."""
    height, width = size
    steps = (np.arange(grid) + 0.5) / grid
    points = np.stack(np.meshgrid(steps * width, steps * height), -1).reshape(-1, 1, 2)
    for start in range(0, len(points), POINTS_PER_BATCH):
        yield points[start : start + POINTS_PER_BATCH].tolist()


def stability_scores(logits: torch.Tensor) -> torch.Tensor:
    """IoU of the masks (n, h, w) at a high and at a low threshold, 1 and -1; 0 where both are empty.

    As in https://github.com/facebookresearch/segment-anything/blob/dca509f/segment_anything/utils/amg.py, but before
    the masks are scaled up.
    """
    high, low = ((logits > threshold).sum((-2, -1)) for threshold in (1.0, -1.0))
    return high / low.clamp(min=1)


def choose(candidates: Candidates, settings: SegmentationSettings) -> np.ndarray:
    """Returns the indices of the candidates to keep, best rated first: above the thresholds, and each object once."""
    enough = (
        (candidates.ratings >= settings.min_iou)
        & (candidates.stabilities >= settings.min_stability)
        & candidates.masks.any((1, 2))
    )
    indices = np.flatnonzero(enough)
    return indices[distinct(candidates.masks[indices], candidates.ratings[indices], settings.max_overlap)]


def scaled_up(predictor: Predictor, candidates: Candidates, indices: np.ndarray) -> list[Segment]:
    """Returns some of the candidates at the size of the image."""
    segments = []
    for start in range(0, len(indices), MASKS_PER_BATCH):
        part = indices[start : start + MASKS_PER_BATCH]
        masks = clean(predictor.full_size(candidates.encoded, candidates.logits[part]))
        for index, mask in zip(part, masks, strict=True):
            if mask.any():  # a mask of a few pixels may vanish where the image is smaller than the model's
                rating, stability = (float(scores[index]) for scores in (candidates.ratings, candidates.stabilities))
                segments.append(segment_of(mask, rating, stability))
    return segments
