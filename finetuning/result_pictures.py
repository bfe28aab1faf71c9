"""Pictures of what a run learns: masks beside the true ones, in files and in trackers, and the course of training."""

import importlib
import io
from pathlib import Path
from typing import IO, Any

import matplotlib


matplotlib.use("Agg")  # no window is opened, and none is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from image_data.overlaps import mask_of
from segmentation.overlays import distinct_colours, draw_segments
from segmentation.predicted_masks import best_rated
from segmentation.segments import segment_of

from .click_rounds import POINT, Prompting, Rounds
from .prompts import OUTSIDE, ValidationSet


NUM_PICTURES = 3
TAG = "eval/masks"
TRACKERS = ("tensorboard", "trackio", "wandb")  # those of transformers' that show pictures


def write_pictures(folder: Path, trainer: Any, masks: dict[str, list[np.ndarray]], metrics: dict[str, Any]) -> None:
    """Draws masks, in a column for each title, and the course of training."""
    rows = [
        picture_row(trainer.eval_dataset, index, trainer.prompting, {title: masks[title][row] for title in masks})
        for row, index in enumerate(items_to_show(trainer.eval_dataset))
    ]
    plot_masks(rows, folder / "masks.png")
    plot_curves(metrics["history"], metrics["before"]["iou"], folder / "curves.png")
    print(f"Pictures: {folder / 'masks.png'}, {folder / 'curves.png'}")


def masks_to_show(model: PreTrainedModel, trainer: Any) -> list[np.ndarray]:
    """Returns the masks that `model` predicts for the validation items that are shown."""
    validation, prompting = trainer.eval_dataset, trainer.prompting
    return [predict(model, validation, index, prompting)[0] for index in items_to_show(validation)]


class MaskPictures(TrainerCallback):
    """Sends a picture of some validation images to the trackers of a run, each time that it is evaluated.

    Args:
        trainer: Whose model, prompts and trackers they are.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws on rank 0, and only where it has a whole model."""
        trainer = self.trainer
        if not state.is_world_process_zero or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        model, validation = trainer.accelerator.unwrap_model(trainer.model), trainer.eval_dataset
        rows = []
        for index in items_to_show(validation):
            masks, _ = predict(model, validation, index, trainer.prompting)
            rows.append(picture_row(validation, index, trainer.prompting, {"prediction": masks}))
        file = io.BytesIO()
        plot_masks(rows, file)
        self.send(np.asarray(Image.open(file).convert("RGB")), state.global_step)

    def send(self, picture: np.ndarray, step: int) -> None:
        """Sends a picture (H, W, 3) to each tracker, beside the metrics of the same step."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer.add_image(TAG, picture, step, dataformats="HWC")
        for name in {"trackio", "wandb"} & {*self.trainer.args.report_to}:
            tracker = importlib.import_module(name)
            tracker.log({TAG: tracker.Image(picture), "train/global_step": step})


def items_to_show(validation: ValidationSet) -> list[int]:
    """Returns some items, spread over all."""
    return np.unique(np.linspace(0, len(validation) - 1, NUM_PICTURES).astype(int)).tolist()


@torch.no_grad()
def predict(
    model: PreTrainedModel, validation: ValidationSet, index: int, prompting: Prompting
) -> tuple[np.ndarray, torch.Tensor]:
    """Returns, per object, the best rated mask for its first prompt (objects, H, W), at image size, and all logits."""
    batch = {name: tensor.to(model.device) for name, tensor in default_collate([validation[index]]).items()}
    labels = batch.pop("labels")
    first, _ = prompting.predict(model, batch, labels, Rounds(prompting.first))
    prediction = first[prompting.first]
    _, logits = best_rated(*prediction)  # (1, objects, mask_side, mask_side)
    height, width = ((labels[0, 0] != OUTSIDE).any(axis).sum() for axis in (1, 0))
    image, _ = validation.items[index][0].read()
    masks = F.interpolate(logits[..., :height, :width], image.shape[:2], mode="bilinear")
    return (masks[0] > 0).cpu().numpy(), prediction.pred_masks


def picture_row(
    validation: ValidationSet, index: int, prompting: Prompting, masks: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns one item's row for `plot_masks`: first prompts, ground truth and `masks`."""
    sample, ids = validation.items[index]
    image, labels = sample.read()
    item = validation[index]
    scale = max(image.shape[:2]) / validation.encode.processor.image_processor.size["longest_edge"]
    row: dict[str, Any] = {"image": image, "points": [], "boxes": []}
    if prompting.first == POINT:
        row["points"] = scale * item["input_points"].numpy()[item["input_labels"].numpy() == 1]
    else:
        row["boxes"] = scale * item["input_boxes"].numpy()
    return {**row, "masks": {"ground truth": np.array([mask_of(labels, label) for label in ids]), **masks}}


def plot_masks(rows: list[dict[str, Any]], file: Path | IO[bytes]) -> None:
    """Saves a row of pictures for each image: its prompts, and its masks by name.

    Args:
        rows: `image` (H, W, 3), `points` (n, 2) and `boxes` (n, 4) to draw, and `masks` (objects, H, W) by title.
        file: Where to save.
    """
    titles = list(rows[0]["masks"])
    figure, grid = plt.subplots(
        len(rows), 1 + len(titles), figsize=(4 * (1 + len(titles)), 5 * len(rows)), layout="constrained", squeeze=False
    )
    for axes, row in zip(grid, rows, strict=True):
        colours = distinct_colours(list(map(segment_of, row["masks"][titles[0]])))  # of each object, in all masks
        axes[0].imshow(row["image"])
        axes[0].set_title("image and prompts")
        for axis, title in zip(axes[1:], titles, strict=True):
            axis.imshow(draw_segments(row["image"], list(map(segment_of, row["masks"][title])), colours=colours))
            axis.set_title(title)
        for axis in axes:
            axis.plot(*np.reshape(row["points"], (-1, 2)).T, "r*", markeredgecolor="white", markersize=10)
            for left, top, right, bottom in np.reshape(row["boxes"], (-1, 4)):
                axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color="red"))
            axis.axis("off")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_curves(history: list[dict[str, float]], before: float, path: Path) -> None:
    """Saves loss and validation IoU over the steps, as `Trainer` logged them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, label in ((left, "loss", "training loss"), (right, "eval_iou", "validation mean IoU")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if key == "eval_iou":
            points.insert(0, (0, before))
        axis.plot(*zip(*points, strict=True), "o-" if key == "eval_iou" else "-")
        axis.set(xlabel="step", ylabel=label)
    figure.savefig(path, dpi=120)
    plt.close(figure)
