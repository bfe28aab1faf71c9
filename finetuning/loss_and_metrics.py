"""Training loss and validation metrics, per object, at the resolution of the predicted masks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from segmentation.predicted_masks import best_rated, mask_iou

from .click_rounds import Prediction


class MaskLoss:
    """(Focal or cross-entropy) + dice loss of the best mask, plus the squared error of the predicted IoU of all masks.

    As in Segment Anything (https://arxiv.org/abs/2304.02643, appendix A), where focal loss has weight 20.

    Args:
        kind: `focal` or `cross-entropy`.
    """

    def __init__(self, kind: str = "cross-entropy"):
        self.kind = kind

    def __call__(
        self,
        outputs: Prediction,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns this batch's share of the mean over all objects of the optimizer step.

        Args:
            outputs: With masks (B, objects, masks, H, W).
            labels: Targets (B, objects, H, W): 1 = object, 0 = background, negative = ignored.
            num_items_in_batch: Number of `labels` entries in the whole optimizer step (all accumulated batches
                and ranks); None if this batch is the whole step.
        """
        logits = outputs.pred_masks.float().flatten(-2)
        labels = labels.unsqueeze(2).flatten(-2)
        targets, counts = (labels > 0).float().expand_as(logits), (labels >= 0).float()
        pixels = 20 * focal(logits, targets) if self.kind == "focal" else cross_entropy(logits, targets)
        mask_losses = (pixels * counts).sum(-1) / counts.sum(-1) + dice(logits, targets, counts)
        rating_errors = (outputs.iou_scores.float() - intersection_over_union(logits, labels)).square()
        objects = mask_losses.min(-1).values + rating_errors.mean(-1)
        num_objects = objects.numel() if num_items_in_batch is None else num_items_in_batch / labels.shape[-1]
        return objects.sum() / num_objects


class StepLoss:
    """The mean of `MaskLoss` over several predictions for the same objects.

    Args:
        kind: `focal` or `cross-entropy`.
    """

    def __init__(self, kind: str = "cross-entropy"):
        self.mask_loss = MaskLoss(kind)

    def __call__(
        self,
        outputs: dict[str, tuple[torch.Tensor, ...]],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns this batch's share of the step's loss; `outputs` have a tensor for each prediction."""
        pairs = zip(outputs["iou_scores"], outputs["pred_masks"], strict=True)
        losses = [self.mask_loss(Prediction(*pair), labels, num_items_in_batch) for pair in pairs]
        return torch.stack(losses).mean()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each pixel."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal(logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss of each pixel, equation 5 of https://arxiv.org/abs/1708.02002."""
    entropy = cross_entropy(logits, targets)
    probability_of_target = torch.exp(-entropy)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * (1 - probability_of_target) ** gamma * entropy


def dice(logits: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """One minus the Dice coefficient of each mask (V-Net, https://arxiv.org/abs/1606.04797), smoothed by 1.

    The denominator has plain sums, as is usual for SAM; V-Net has squares.
    """
    probabilities, targets = logits.sigmoid() * counts, targets * counts
    overlap = (probabilities * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)


@torch.no_grad()
def intersection_over_union(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """IoU of masks (..., pixels) and labels; pixels with negative labels are ignored."""
    return mask_iou((logits > 0) & (labels >= 0), labels > 0)


def object_scores(predictions: tuple[tuple[torch.Tensor, ...], ...], labels: torch.Tensor) -> torch.Tensor:
    """Scores, per object, the mask with the highest predicted IoU. `Trainer` then gathers scores instead of masks.

    Args:
        predictions: For each kind of prompt, IoU ratings (B, objects, masks); and masks (B, objects, masks, H, W).
        labels: (B, objects, H, W), -100 for padding objects: added where another rank's image has more objects.

    Returns:
        (B, objects, kinds, 2): IoU, and the absolute error of the predicted IoU; NaN for padding objects.
    """
    labels, scores = labels.flatten(-2), []
    for ratings, masks in (best_rated(*pair) for pair in zip(*predictions, strict=True)):
        iou = intersection_over_union(masks.flatten(-2), labels)
        scores.append(torch.stack([iou, (ratings.float() - iou).abs()], -1))
    is_padding = labels[..., 0, None, None] == -100
    return torch.stack(scores, 2).masked_fill(is_padding, torch.nan)


class MaskMetrics:
    """Collects `object_scores` batch by batch, for `Trainer` with `batch_eval_metrics`, and averages them.

    Args:
        kinds: Names of the kinds of prompts.
        others: Returns more metrics, by name.
    """

    def __init__(self, kinds: Sequence[str], others: Callable[[], dict[str, float]] | None = None) -> None:
        self.kinds = kinds
        self.others = others
        self.scores: list[torch.Tensor] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Returns the metrics over all objects after the last batch: of all kinds together, and the IoU of each."""
        self.scores.append(torch.as_tensor(prediction.predictions).flatten(0, 1))
        if not compute_result:
            return {}
        scores = torch.cat(self.scores).cpu().double()  # MPS has no float64
        self.scores.clear()
        is_padding = scores[..., 0].isnan().any(1)  # ratings are NaN, too, if training diverged
        iou, rating_error = scores[~is_padding].unbind(-1)  # (objects, kinds)
        return {
            "iou": iou.mean().item(),
            **{f"iou_{kind}": column.mean().item() for kind, column in zip(self.kinds, iou.T, strict=True)},
            "dice": (2 * iou / (1 + iou)).mean().item(),
            "share_over_iou_0.5": (iou > 0.5).double().mean().item(),
            "share_over_iou_0.75": (iou > 0.75).double().mean().item(),
            "iou_head_error": rating_error.mean().item(),
            "objects": len(iou),
            **(self.others() if self.others else {}),
        }
