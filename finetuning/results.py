"""Writes the results of fine-tuning: metrics, pictures, model card, exported models; uploads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch.utils.data import default_collate
from transformers import PreTrainedModel, SamModel

from checkpoint_tools.comparison import relative_error
from checkpoint_tools.masks import best_rated
from checkpoint_tools.outputs import staged

from .model import load_base, trained
from .overlaps import mask_of
from .pictures import plot_curves, plot_masks
from .predictor import Predictor
from .prompts import OUTSIDE, ValidationSet
from .rounds import POINT, Prompting, Rounds
from .samples import TrainValidationParts
from .settings import ModelSettings, Settings, TrainingSettings
from .thresholds import labelled_images, sweep_thresholds
from .training import PromptTrainer, segmentation_settings


NUM_PICTURES = 3


def write_results(
    settings: Settings, weights: Path, metrics: dict[str, Any], parts: TrainValidationParts, trainer: PromptTrainer
) -> None:
    """Writes metrics, pictures and exports of what is in `weights` to the output folder, and prints their paths."""
    output, validation, prompting = settings.folder, trainer.eval_dataset, trainer.prompting
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    card(settings.model, metrics, is_adapter=weights.name == "adapter").save(weights / "README.md")
    before, after = metrics["before"]["iou"], metrics["after"]["iou"]
    print(f"Mean IoU on the validation objects: {before:.3f} before, {after:.3f} after.")
    if not metrics["better_than_base"]:
        print(f"Warning: {worse_than_base(metrics)}")
    print(f"{weights.name.capitalize()}: {weights}")

    base, processor = load_base(settings.model.base, settings.model.revision, image_size=settings.model.image_size)
    shown = np.unique(np.linspace(0, len(validation) - 1, NUM_PICTURES).astype(int)).tolist()
    masks = {"before": [predict(base, validation, index, prompting)[0] for index in shown]}
    model = trained(base, weights).eval()
    if weights.name == "model":
        processor.save_pretrained(weights)
    how_to_segment = segmentation_settings(settings)
    sweep = sweep_thresholds(
        Predictor(model.to(settings.training.device), processor),
        labelled_images([*parts.train, *parts.validation]),
        how_to_segment,
    )
    sweep.settings.save(weights)
    print(sweep)
    model.cpu()
    masks["after"] = [predict(model, validation, index, prompting)[0] for index in shown]
    rows = [
        picture_row(validation, index, prompting, {title: masks[title][row] for title in masks})
        for row, index in enumerate(shown)
    ]
    plot_masks(rows, output / "masks.png")
    plot_curves(metrics["history"], before, output / "curves.png")
    print(f"Pictures: {output / 'masks.png'}, {output / 'curves.png'}")

    if "merged" in settings.output.export:
        with staged(output / "merged", "split model", force=True) as target:
            model.save_pretrained(target)
            processor.save_pretrained(target)
        print(f"Merged: {output / 'merged'}")
    if "stock" in settings.output.export:
        with staged(output / "sam", "stock model", force=True) as target:
            model.to_sam().save_pretrained(target)
            processor.save_pretrained(target)
        stock = SamModel.from_pretrained(output / "sam").eval()
        pairs = [[predict(each, validation, index, prompting) for each in (model, stock)] for index in shown]
        same = all(np.array_equal(ours, theirs) for (ours, _), (theirs, _) in pairs)
        error = max(relative_error(theirs, ours) for (_, ours), (_, theirs) in pairs)
        print(
            f"Back in stock SamModel ({output / 'sam'}): {'the same masks' if same else 'OTHER MASKS'}, "
            f"logits differ by {error:.1e} at most, relative to the largest."
        )
    if settings.training.hub_model_id:
        push(weights, settings.training.hub_model_id, settings.training)


def worse_than_base(metrics: dict[str, Any]) -> str:
    """A sentence."""
    name = metrics["selected_by"]
    return (
        f"no checkpoint is better than the base by {name.replace('_', ' ')}: {metrics['before'][name]:.3f} before, "
        f"{metrics['after'][name]:.3f} after. Train with more images, for more steps, or with a lower --learning-rate."
    )


def push(folder: Path, repo_id: str, settings: TrainingSettings) -> None:
    """Uploads `folder` to a model repo, which is created if missing."""
    hub = HfApi(token=settings.hub_token)
    hub.create_repo(repo_id, private=settings.hub_private_repo, exist_ok=True)
    print(f"Uploaded: {hub.upload_folder(repo_id=repo_id, folder_path=folder, revision=settings.hub_revision)}")


@torch.no_grad()
def predict(
    model: PreTrainedModel, validation: ValidationSet, index: int, prompting: Prompting
) -> tuple[np.ndarray, torch.Tensor]:
    """Returns, per object, the best rated mask for its first prompt (objects, H, W), at image size, and all logits."""
    batch = default_collate([validation[index]])
    labels = batch.pop("labels")
    first, _ = prompting.predict(model, batch, labels, Rounds(prompting.first))
    prediction = first[prompting.first]
    _, logits = best_rated(*prediction)  # (1, objects, mask_side, mask_side)
    height, width = ((labels[0, 0] != OUTSIDE).any(axis).sum() for axis in (1, 0))
    image, _ = validation.items[index][0].read()
    masks = F.interpolate(logits[..., :height, :width], image.shape[:2], mode="bilinear")
    return (masks[0] > 0).numpy(), prediction.pred_masks


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


def card(settings: ModelSettings, metrics: dict[str, Any], is_adapter: bool) -> ModelCard:
    """Returns the model card: data, settings and metrics."""
    base = Path(settings.base).name if Path(settings.base).is_dir() else settings.base
    data = ModelCardData(
        base_model=None if Path(settings.base).is_dir() else settings.base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="mask-generation",
        tags=["segment-anything", "sam", *(["lora"] if is_adapter else ["custom_code"])],
    )
    rows = [
        f"| {name.replace('_', ' ')} | {metrics['before'][name]:.3f} | {metrics['after'][name]:.3f} |"
        for name in metrics["before"]
        if name not in ("loss", "objects")
    ]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base}, fine-tuned",
        f"{'Adapter for the split SAM of' if is_adapter else 'Split SAM, from'} `{base}`"
        f"{f', revision `{settings.revision}`' if settings.revision else ''}. Data: {metrics['data']}, "
        f"{metrics['objects']['train']} training objects, {metrics['objects']['validation']} validation objects.",
        *(
            [f"Images are scaled to a side of {side} pixels: load the base with `image_size={side}`."]
            if (side := settings.image_size)
            else []
        ),
        f"Best of {metrics['steps']} steps, prompts: {metrics['prompts']}. On the validation objects, at the "
        "resolution of the model's masks:",
        *([] if metrics["better_than_base"] else [f"**Do not use it:** {worse_than_base(metrics)}"]),
        "\n".join(["| | before | after |", "|---|---|---|", *rows]),
    ]
    return ModelCard("\n\n".join(lines) + "\n")
