"""Shows masks of validation images beside the true ones: in pictures, and to the trackers that a run reports to."""

import importlib
import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from checkpoint_tools.masks import best_rated
from image_data.overlaps import mask_of

from .plots import plot_masks
from .prompts import OUTSIDE, ValidationSet
from .rounds import POINT, Prompting, Rounds


NUM_PICTURES = 3
TAG = "eval/masks"
TRACKERS = ("tensorboard", "trackio", "wandb")  # those of transformers' that show pictures


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
