"""Losses and metrics of masks."""

from types import SimpleNamespace

import pytest
import torch

from finetuning.loss_and_metrics import MaskLoss, MaskMetrics, StepLoss, dice, focal, object_scores


def random_outputs(objects: int = 4) -> tuple[SimpleNamespace, torch.Tensor]:
    outputs = SimpleNamespace(pred_masks=torch.randn(2, objects, 3, 8, 8), iou_scores=torch.rand(2, objects, 3))
    labels = (torch.rand(2, objects, 8, 8) > 0.6).to(torch.int8)
    labels[..., 6:] = -1
    return outputs, labels


def test_focal_loss():
    """At gamma 0 it is weighted cross-entropy; elsewhere as the paper's formula says, in its own symbols."""
    logits, targets = torch.randn(5, 7, dtype=torch.float64), (torch.rand(5, 7) > 0.5).double()
    p = torch.where(targets > 0, logits.sigmoid(), 1 - logits.sigmoid())
    alpha = torch.where(targets > 0, 0.25, 0.75)
    torch.testing.assert_close(focal(logits, targets), -alpha * (1 - p) ** 2 * p.log())
    torch.testing.assert_close(focal(logits, targets, gamma=0.0), -alpha * p.log())


def test_dice_loss():
    targets, counts = torch.tensor([1.0, 1, 0, 0, 1]), torch.tensor([1.0, 1, 1, 1, 0])
    assert dice(200 * targets - 100, targets, counts) == 0
    assert dice(100 - 200 * targets, targets, counts) == pytest.approx(1 - 1 / 5)
    assert dice(torch.tensor([100.0, -100, -100, -100, 100]), targets, counts) == pytest.approx(1 - 3 / 4)


@pytest.mark.parametrize("kind", ["focal", "cross-entropy"])
def test_loss_counts_the_best_mask_and_every_rating(kind):
    outputs, labels = random_outputs()
    loss = MaskLoss(kind)
    perfect = SimpleNamespace(
        pred_masks=outputs.pred_masks.clone(), iou_scores=torch.tensor([0.0, 1.0, 0.0]).expand(2, 4, 3)
    )
    perfect.pred_masks[:, :, 1] = 200.0 * (labels > 0) - 100
    perfect.pred_masks[:, :, 0] = perfect.pred_masks[:, :, 2] = -200.0 * (labels > 0) + 100
    assert loss(perfect, labels) == pytest.approx(0, abs=1e-6)
    perfect.iou_scores = torch.tensor([0.0, 1.0, 0.6]).expand(2, 4, 3)
    assert loss(perfect, labels) == pytest.approx(0.36 / 3, abs=1e-6)


def test_loss_ignores_what_is_beyond_the_image():
    outputs, labels = random_outputs()
    before = MaskLoss()(outputs, labels)
    outputs.pred_masks[..., 6:] = 50
    assert MaskLoss()(outputs, labels) == before


def test_loss_of_parts_adds_up_to_that_of_the_step():
    outputs, labels = random_outputs()
    whole = MaskLoss()(outputs, labels)
    parts = [
        MaskLoss()(
            SimpleNamespace(pred_masks=outputs.pred_masks[i, None], iou_scores=outputs.iou_scores[i, None]),
            labels[i, None],
            labels.ne(-100).sum(),
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_loss_of_a_step_is_the_mean_over_predictions():
    (first, labels), (second, _) = random_outputs(), random_outputs()
    outputs = {name: (getattr(first, name), getattr(second, name)) for name in ("iou_scores", "pred_masks")}
    expected = (MaskLoss()(first, labels) + MaskLoss()(second, labels)) / 2
    torch.testing.assert_close(StepLoss()(outputs, labels), expected)


def test_metrics():
    """Two objects, one of them half segmented from a point, and a padding object; boxes are answered perfectly."""
    labels = torch.zeros(1, 3, 2, 4, dtype=torch.int8)
    labels[0, 0, :, :2], labels[0, 1], labels[0, 2] = 1, 1, -100
    masks = torch.full((1, 3, 2, 2, 4), -1.0)
    masks[0, 0, 1, :, :2], masks[0, 1, 1, 0] = 1, 1
    ratings = torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.0, 1.0]]])
    perfect, certain = labels[:, :, None] * 2.0 - 1, torch.ones(1, 3, 1)
    metrics = MaskMetrics(("point", "box"))
    predictions = (ratings, certain), (masks, perfect)
    prediction = SimpleNamespace(predictions=object_scores(predictions, labels))
    for _ in range(2):  # a second validation starts anew
        assert metrics(prediction, compute_result=False) == {}
        result = metrics(prediction, compute_result=True)
        assert result.pop("objects") == 2 * 2
        expected = {"iou": 0.875, "iou_point": 0.75, "iou_box": 1, "dice": (5 / 6 + 1) / 2}
        expected |= {"share_over_iou_0.5": 0.75, "share_over_iou_0.75": 0.75}
        assert result == pytest.approx({**expected, "iou_head_error": (0.1 + 0.3) / 4})
