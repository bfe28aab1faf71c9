"""Asks the model about the objects of a batch like a user: with first prompts, then with rounds of corrective clicks.

As in Segment Anything (https://arxiv.org/abs/2304.02643, appendix A): a single point gets three masks, as it may mean
several objects; a box, or several prompts, get one. Each round adds clicks where the last mask is wrong, and half of
the rounds show the model its last mask, too. The image is encoded once.

There, each of eight rounds adds one click, and two more rounds show the last mask and add none. Here, the default is
one round that adds one to eight clicks at once: that, too, shows the model many clicks, without which each further
click makes masks worse, and takes one pass of the decoder instead of ten.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from segmentation.corrective_clicks import corrective_click
from segmentation.predicted_masks import best_rated


POINT, BOX, CLICKS = "point", "box", "clicks"
FIRST_PROMPTS = {POINT: (POINT,), BOX: (BOX,), "mixed": (POINT, BOX)}
VALIDATION_ROUNDS = 3
MOST_CLICKS = 8  # of a training step, unless it has more rounds


class Prediction(NamedTuple):
    """Predicted IoU (B, objects, masks), and mask logits (B, objects, masks, h, w)."""

    iou_scores: torch.Tensor
    pred_masks: torch.Tensor


class Round(NamedTuple):
    """One more prediction for each object, with `clicks` more of them, and with the last mask if it `shows_mask`."""

    shows_mask: bool
    clicks: int = 1


REFINEMENT = Round(shows_mask=True, clicks=0)


@dataclass(frozen=True)
class Rounds:
    """The first prompt, `point` or `box`, and the rounds that correct its mask."""

    first: str
    each: tuple[Round, ...] = ()


@dataclass(frozen=True)
class Prompting:
    """How objects are asked for.

    Args:
        prompts: `point`, `box`, or `mixed` for both.
        rounds: Rounds of corrective clicks in a training step.
        multimask: Whether three masks are predicted for each prompt; None for a single point only.
        seed: Of what is drawn for each step.
    """

    prompts: str = "mixed"
    rounds: int = 0
    multimask: bool | None = None
    seed: int = 0

    @property
    def first(self) -> str:
        """The first prompt that validation corrects, and that pictures show."""
        return FIRST_PROMPTS[self.prompts][0]

    @property
    def validated(self) -> tuple[str, ...]:
        """What is validated: the prompts that are trained, and corrective clicks unless one prompt alone is wanted."""
        clicks = (CLICKS,) if self.prompts == "mixed" or self.rounds else ()
        return (*FIRST_PROMPTS[self.prompts], *clicks)

    @property
    def most_clicks(self) -> int:
        """Most corrective clicks of a training step."""
        return max(MOST_CLICKS, self.rounds) if self.rounds else 0

    def training_rounds(self, step: int) -> Rounds:
        """Returns the rounds of a step. They depend on nothing else, so all batches of the step have the same."""
        rng = np.random.default_rng([self.seed, 3, step])
        first = rng.choice(FIRST_PROMPTS[self.prompts])
        if not self.rounds:
            return Rounds(str(first))
        shows_mask = rng.random(self.rounds) < 0.5
        clicks = int(rng.integers(1, self.most_clicks // self.rounds, endpoint=True))
        rounds = [Round(bool(shows), clicks) for shows in shows_mask]
        if self.rounds >= MOST_CLICKS:
            rounds.insert(int(rng.integers(1, self.rounds)), REFINEMENT)
            rounds.append(REFINEMENT)
        return Rounds(str(first), tuple(rounds))

    def predict_to_train(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], targets: torch.Tensor, step: int
    ) -> list[Prediction]:
        """Returns the predictions for each first prompt, and those of each round."""
        first, clicked = self.predict(model, batch, targets, self.training_rounds(step))
        return [*first.values(), *clicked]

    def predict_to_validate(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], targets: torch.Tensor
    ) -> dict[str, Prediction]:
        """Returns the predictions for all that is `validated`. Each click is in the middle of the largest error."""
        rounds = (Round(shows_mask=False),) * VALIDATION_ROUNDS if CLICKS in self.validated else ()
        first, clicked = self.predict(model, batch, targets, Rounds(self.first, rounds))
        return {**first, CLICKS: clicked[-1]} if clicked else first

    def predict(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], targets: torch.Tensor, rounds: Rounds
    ) -> tuple[dict[str, Prediction], list[Prediction]]:
        """Returns the predictions for each first prompt, and those of each round.

        Args:
            model: Stock or split SAM, bare or wrapped.
            batch: `pixel_values` (B, 3, side, side) or `image_embeddings`; first prompts: `input_points`,
                `input_labels` and `input_boxes`; and `draws` (B, objects, clicks), if they are drawn.
            targets: (B, objects, h, w): 1 = object, 0 = background, negative = ignored.
            rounds: The rounds after the prompt that they correct.
        """
        names = {POINT: ("input_points", "input_labels"), BOX: ("input_boxes",)}
        image = {name: batch[name] for name in ("pixel_values", "image_embeddings") if name in batch}
        first = {}
        for kind in FIRST_PROMPTS[self.prompts]:
            prompts = {name: batch[name] for name in names[kind]}
            with image_embeddings_of(model) as embeddings:
                outputs = model(**image, **prompts, multimask_output=self.wants_three(prompts))
            first[kind] = Prediction(outputs.iou_scores, outputs.pred_masks)
            image = {"image_embeddings": embeddings[0]} if embeddings else image
        prompts = {name: batch[name] for name in names[rounds.first]}
        prediction, clicked = first[rounds.first], []
        side, click = part(model, "prompt_encoder").input_image_size, itertools.count()
        for each in rounds.each:
            logits = best_rated(*prediction)[1].detach()
            for _ in range(each.clicks):
                draws = batch["draws"][..., next(click)] if "draws" in batch else None
                prompts = with_clicks(prompts, clicks(logits, targets, draws), side / targets.shape[-1])
            masks = logits if each.shows_mask else None
            prediction = self.predict_each(model, image["image_embeddings"], prompts, masks)
            clicked.append(prediction)
        return first, clicked

    def predict_each(
        self,
        model: torch.nn.Module,
        image_embeddings: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        masks: torch.Tensor | None,
    ) -> Prediction:
        """Returns the predictions for prompts that include a mask (B, objects, h, w) of each object.

        The decoder takes one mask for each image of a batch, so each object becomes an image of its own.
        """
        inputs, number = dict(prompts), next(iter(prompts.values())).shape[1]
        if masks is not None:
            inputs = {name: tensor.flatten(0, 1).unsqueeze(1) for name, tensor in prompts.items()}
            inputs["input_masks"] = masks.flatten(0, 1).unsqueeze(1)
            image_embeddings = image_embeddings.repeat_interleave(number, 0)
        outputs = model(image_embeddings=image_embeddings, **inputs, multimask_output=self.wants_three(prompts))
        parts = outputs.iou_scores, outputs.pred_masks
        return Prediction(
            *(each.unflatten(0, (-1, number)).squeeze(2) if masks is not None else each for each in parts)
        )

    def wants_three(self, prompts: dict[str, torch.Tensor]) -> bool:
        """Whether three masks are predicted for each object."""
        is_single_point = "input_boxes" not in prompts and prompts["input_points"].shape[2] == 1
        return is_single_point if self.multimask is None else self.multimask


def clicks(
    logits: torch.Tensor, targets: torch.Tensor, draws: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a pixel (column, row) in which each mask (B, objects, h, w) is wrong, and its label.

    The shapes are (B, objects, 1, 2) and (B, objects, 1). With `draws` (B, objects), numbers from 0 to less than 1,
    any wrong pixel is as likely.
    """
    wanted, inside = (targets > 0).cpu().numpy(), (targets >= 0).cpu().numpy()
    masks = (logits > 0).cpu().numpy() & inside
    pixels, labels = np.zeros((*masks.shape[:2], 1, 2)), np.zeros((*masks.shape[:2], 1))
    for place in np.ndindex(masks.shape[:2]):
        draw = None if draws is None else draws[place].item()
        (row, column), labels[place] = corrective_click(masks[place], wanted[place], draw)
        pixels[place] = column, row
    return torch.from_numpy(pixels).float().to(logits.device), torch.from_numpy(labels).long().to(logits.device)


def with_clicks(
    prompts: dict[str, torch.Tensor], clicked: tuple[torch.Tensor, torch.Tensor], pixels_per_pixel: float
) -> dict[str, torch.Tensor]:
    """Returns prompts with one more point for each object.

    Args:
        prompts: Points, labels and boxes, in pixels of the model's images.
        clicked: `clicks`, in pixels of its masks.
        pixels_per_pixel: Pixels of images along a pixel of masks.
    """
    points, labels = clicked
    points = (points + 0.5) * pixels_per_pixel - 0.5  # SAM adds 0.5 to what it is given, for the centre of a pixel
    if "input_points" in prompts:
        points = torch.cat([prompts["input_points"], points.to(prompts["input_points"])], 2)
        labels = torch.cat([prompts["input_labels"], labels.to(prompts["input_labels"])], 2)
    return {**prompts, "input_points": points, "input_labels": labels}


@contextmanager
def image_embeddings_of(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list into which the vision encoder's output (B, channels, h, w) is put, as soon as it has run.

    The model must be called as a whole: wrappers for several processes do their work in its forward.
    """
    embeddings: list[torch.Tensor] = []
    hook = part(model, "vision_encoder").register_forward_hook(
        lambda module, inputs, output: embeddings.append(output.last_hidden_state)
    )
    try:
        yield embeddings
    finally:
        hook.remove()


class LastImage:
    """Remembers the image that was encoded last, so that its other objects need no pass of the encoder.

    The model's weights must not change in between: `forget` before they are used again.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets the image."""
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # pixels and embeddings

    @contextmanager
    def encoded_once(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the batch, with `image_embeddings` in the place of `pixel_values` if they are those of last time."""
        pixel_values = batch.get("pixel_values")
        if pixel_values is None:
            yield batch
        elif self.last is not None and torch.equal(pixel_values, self.last[0]):
            prompts = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
            yield {**prompts, "image_embeddings": self.last[1]}
        else:
            with image_embeddings_of(model) as embeddings:
                yield batch
            self.last = pixel_values, embeddings[0]


def part(model: torch.nn.Module, name: str) -> Any:
    """Returns the module `name` of SAM, whatever `model` is wrapped in."""
    return next(module for path, module in model.named_modules() if path.rpartition(".")[2] == name)
