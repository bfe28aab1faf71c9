"""The masks that SAM predicts for an object, and how well one agrees with another."""

import torch


def best_rated(iou_scores: torch.Tensor, pred_masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, per object, the mask with the highest predicted IoU, and that IoU.

    Args:
        iou_scores: Ratings (B, objects, masks).
        pred_masks: Logits (B, objects, masks, H, W).

    Returns:
        Ratings (B, objects) and logits (B, objects, H, W).
    """
    best = iou_scores.argmax(-1, keepdim=True)
    return iou_scores.take_along_dim(best, -1).squeeze(-1), pred_masks.take_along_dim(
        best[..., None, None], 2
    ).squeeze(2)


def mask_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns the intersection over union of bool masks (..., pixels)."""
    return (first & second).sum(-1) / (first | second).sum(-1).clamp(min=1)
