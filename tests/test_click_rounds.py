"""How the model is asked about objects: against stock SAM, asked step by step."""

import itertools

import numpy as np
import pytest
import torch
from conftest import assert_same_outputs
from labelled_images import MASK_SIDE, Array, blocks
from torch.utils.data import default_collate
from transformers.models.sam.modeling_sam import SamImageSegmentationOutput

from finetuning.click_rounds import REFINEMENT, Prediction, Prompting, Round, Rounds, clicks
from finetuning.prompts import ItemEncoder, Prompts, TrainingSet
from image_data.samples import Sample


SIDE = 64  # of the tiny models' images


@pytest.fixture
def batch(processor) -> dict[str, torch.Tensor]:
    sample = Sample(Array(blocks()), np.s_[:, :], np.unique(blocks())[1:])
    items = TrainingSet([sample], ItemEncoder(processor, MASK_SIDE, Prompts(clicks=8)), size=2, objects=3)
    return default_collate([items[0], items[1]])


@pytest.fixture
def encoded(load) -> tuple[torch.nn.Module, list]:
    """A model, and a list that grows by one whenever its vision encoder runs."""
    model, calls = load(), []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    return model, calls


def assert_same_prediction(expected: SamImageSegmentationOutput, actual: Prediction) -> None:
    assert_same_outputs({name: expected[name] for name in actual._fields}, actual._asdict())


@torch.no_grad()
def test_first_prompts(batch, encoded, stock):
    model, calls = encoded
    first, clicked = Prompting().predict(model, batch, batch["labels"], Rounds("point"))
    assert len(calls) == 1 and not clicked
    pixels, points = batch["pixel_values"], {name: batch[name] for name in ("input_points", "input_labels")}
    assert_same_prediction(stock(pixels, **points, multimask_output=True), first["point"])
    boxes = stock(pixels, input_boxes=batch["input_boxes"], multimask_output=False)
    assert_same_prediction(boxes, first["box"])


@torch.no_grad()
@pytest.mark.parametrize("start", ["point", "box"])
@pytest.mark.parametrize("shows_mask", [True, False])
def test_rounds_add_clicks_where_the_last_mask_is_wrong(start, shows_mask, batch, encoded, stock):
    model, calls = encoded
    first, clicked = Prompting().predict(model, batch, batch["labels"], Rounds(start, (Round(shows_mask),) * 3))
    assert len(calls) == 1 and len(clicked) == 3
    last = first[start]
    names = ("input_points", "input_labels") if start == "point" else ("input_boxes",)
    prompts = {name: batch[name] for name in names}
    for number, prediction in enumerate(clicked):
        best = last.iou_scores.argmax(-1)
        logits = torch.stack(
            [masks[i] for masks, i in zip(last.pred_masks.flatten(0, 1), best.flatten(), strict=True)]
        )
        targets = batch["labels"].flatten(0, 1)
        new = []
        for logit, target, draw in zip(logits, targets, batch["draws"][..., number].flatten(), strict=True):
            wrong = torch.nonzero(((logit > 0) != (target > 0)) & (target >= 0))
            row, column = wrong[int(draw * len(wrong))].tolist()
            new.append([2 * column + 0.5, 2 * row + 0.5, int(target[row, column] > 0)])  # images of 64, masks of 32
        new = torch.tensor(new).view(2, 3, 1, 3)
        points = new[..., :2]
        labels = new[..., 2].long()
        if "input_points" in prompts:
            points = torch.cat([prompts["input_points"], points], 2)
            labels = torch.cat([prompts["input_labels"], labels], 2)
        prompts |= {"input_points": points, "input_labels": labels}
        for place in np.ndindex(2, 3):  # one object after the other
            alone = {name: tensor[place][None, None] for name, tensor in prompts.items()}
            mask = logits.view(2, 3, 1, *logits.shape[-2:])[place][None] if shows_mask else None
            expected = stock(batch["pixel_values"][place[0], None], **alone, input_masks=mask, multimask_output=False)
            actual = Prediction(*(part[place][None, None] for part in prediction))
            assert_same_prediction(expected, actual)
        last = prediction


@pytest.mark.parametrize(("multimask", "masks"), [(None, (3, 1, 1)), (True, (3, 3, 3)), (False, (1, 1, 1))])
@torch.no_grad()
def test_number_of_masks(multimask, masks, batch, load):
    first, clicked = Prompting(multimask=multimask).predict(
        load(), batch, batch["labels"], Rounds("point", (Round(False),))
    )
    assert tuple(each.pred_masks.shape[2] for each in (*first.values(), *clicked)) == masks


def test_gradients_reach_the_encoder_from_every_round(batch, load):
    model = load().train()
    predictions = Prompting(rounds=3).predict_to_train(model, batch, batch["labels"], step=0)
    assert len(predictions) == 2 + 3
    for prediction in predictions:
        model.zero_grad()
        prediction.pred_masks.sum().backward(retain_graph=True)
        assert model.vision_encoder.patch_embed.projection.weight.grad.abs().max() > 0


def test_a_step_decides_for_itself():
    prompting = Prompting(rounds=8)
    steps = [prompting.training_rounds(step) for step in range(200)]
    assert steps == [prompting.training_rounds(step) for step in range(200)]
    assert np.mean([rounds.first == "box" for rounds in steps]) == pytest.approx(0.5, abs=0.1)
    for rounds in steps:
        assert sorted(each.clicks for each in rounds.each) == [0, 0, *[1] * 8]
        assert rounds.each[0].clicks == 1 and rounds.each[-1] == REFINEMENT
    assert len({[each.clicks for each in rounds.each].index(0) for rounds in steps}) > 6, "the other is anywhere"
    shown = [each.shows_mask for rounds in steps for each in rounds.each if each.clicks]
    assert np.mean(shown) == pytest.approx(0.5, abs=0.05)
    for number, numbers_of_clicks in {2: {1, 2, 3, 4}, 1: set(range(1, 9)), 0: set()}.items():
        drawn = [Prompting(rounds=number).training_rounds(step).each for step in range(200)]
        assert {len(each) for each in drawn} == {number}
        assert {each.clicks for each in itertools.chain(*drawn)} == numbers_of_clicks
    assert Prompting("box", rounds=1).training_rounds(0).first == "box"


@torch.no_grad()
def test_several_clicks_at_once(batch, load, stock):
    """All are where the same mask is wrong."""
    model, targets = load(), batch["labels"]
    first, (prediction,) = Prompting().predict(model, batch, targets, Rounds("box", (Round(False, clicks=3),)))
    drawn = [clicks(first["box"].pred_masks[:, :, 0], targets, batch["draws"][..., each]) for each in range(3)]
    points, labels = (torch.cat(parts, 2) for parts in zip(*drawn, strict=True))
    points = 2 * points + 0.5  # images of 64, masks of 32
    prompts = {"input_points": points, "input_labels": labels, "input_boxes": batch["input_boxes"]}
    assert_same_prediction(stock(batch["pixel_values"], **prompts, multimask_output=False), prediction)


@torch.no_grad()
def test_a_refinement_shows_the_last_mask_and_adds_no_click(batch, load, stock):
    first, (clicked, refined) = Prompting().predict(
        load(), batch, batch["labels"], Rounds("box", (Round(False), REFINEMENT))
    )
    points, labels = clicks(first["box"].pred_masks[:, :, 0], batch["labels"], batch["draws"][..., 0])
    for place in np.ndindex(2, 3):
        prompts = {"input_points": 2 * points + 0.5, "input_labels": labels, "input_boxes": batch["input_boxes"]}
        alone = {name: tensor[place][None, None] for name, tensor in prompts.items()}
        masks = clicked.pred_masks[place][None]
        expected = stock(batch["pixel_values"][place[0], None], **alone, input_masks=masks, multimask_output=False)
        assert_same_prediction(expected, Prediction(*(each[place][None, None] for each in refined)))


@torch.no_grad()
def test_validation_clicks_the_middle_of_errors(batch, load):
    model, targets = load().eval(), batch["labels"]
    del batch["draws"]
    validated = Prompting().predict_to_validate(model, batch, targets)
    assert list(validated) == list(Prompting().validated) == ["point", "box", "clicks"]
    for seed in (0, 1):
        first, clicked = Prompting(seed=seed).predict(model, batch, targets, Rounds("point", (Round(False),) * 3))
        assert torch.equal(validated["clicks"].pred_masks, clicked[2].pred_masks)
        assert torch.equal(validated["box"].pred_masks, first["box"].pred_masks)
    assert Prompting("box").validated == ("box",) and Prompting("box", rounds=1).validated == ("box", "clicks")


def test_padding_is_never_clicked():
    targets = torch.zeros(1, 1, 8, 8, dtype=torch.int8)
    targets[..., 6:], targets[0, 0, 2, 3] = -1, 1
    logits = torch.full((1, 1, 8, 8), 1.0)
    logits[..., :6] = -1
    points, labels = clicks(logits, targets, draws=None)
    assert points.tolist() == [[[[3, 2]]]] and labels.tolist() == [[[1]]]
