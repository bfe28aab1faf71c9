"""Writes the results of fine-tuning: metrics, pictures, model card, exported models; uploads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel, SamModel

from checkpoint_tools.comparison import relative_error
from checkpoint_tools.masks import best_rated
from checkpoint_tools.outputs import staged

from .model import load_base, trained
from .pictures import plot_curves, plot_masks
from .prompts import OUTSIDE, Collator, ValidationSet
from .settings import ModelSettings, Settings, TrainingSettings


NUM_PICTURES = 3


def write_results(settings: Settings, weights: Path, metrics: dict[str, Any], validation: ValidationSet) -> None:
    """Writes metrics, pictures and exports of what is in `weights` to the output folder, and prints their paths."""
    output, multimask = settings.folder, settings.prompts.multimask
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    card(settings.model, metrics, is_adapter=weights.name == "adapter").save(weights / "README.md")
    before, after = metrics["before"]["iou"], metrics["after"]["iou"]
    print(f"Mean IoU on the validation objects: {before:.3f} before, {after:.3f} after.")
    print(f"{weights.name.capitalize()}: {weights}")

    base, processor = load_base(settings.model.base, settings.model.revision, image_size=settings.model.image_size)
    shown = np.unique(np.linspace(0, len(validation) - 1, NUM_PICTURES).astype(int)).tolist()
    masks = {"before": [predict(base, validation, index, multimask)[0] for index in shown]}
    model = trained(base, weights).eval()
    if weights.name == "model":
        processor.save_pretrained(weights)
    masks["after"] = [predict(model, validation, index, multimask)[0] for index in shown]
    rows = [
        picture_row(validation, index, {title: masks[title][row] for title in masks})
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
        pairs = [[predict(each, validation, index, multimask) for each in (model, stock)] for index in shown]
        same = all(np.array_equal(ours, theirs) for (ours, _), (theirs, _) in pairs)
        error = max(relative_error(theirs, ours) for (_, ours), (_, theirs) in pairs)
        print(
            f"Back in stock SamModel ({output / 'sam'}): {'the same masks' if same else 'OTHER MASKS'}, "
            f"logits differ by {error:.1e} at most, relative to the largest."
        )
    if settings.training.hub_model_id:
        push(weights, settings.training.hub_model_id, settings.training)


def push(folder: Path, repo_id: str, settings: TrainingSettings) -> None:
    """Uploads `folder` to a model repo, which is created if missing."""
    hub = HfApi(token=settings.hub_token)
    hub.create_repo(repo_id, private=settings.hub_private_repo, exist_ok=True)
    print(f"Uploaded: {hub.upload_folder(repo_id=repo_id, folder_path=folder, revision=settings.hub_revision)}")


@torch.no_grad()
def predict(
    model: PreTrainedModel, validation: ValidationSet, index: int, multimask: bool
) -> tuple[np.ndarray, torch.Tensor]:
    """Returns, per object, the mask with the highest predicted IoU (objects, H, W), at image size, and all logits."""
    batch = Collator(multimask)([validation[index]])
    labels = batch.pop("labels")[0]
    outputs = model(**batch)
    _, logits = best_rated(outputs.iou_scores, outputs.pred_masks)  # (1, objects, mask_side, mask_side)
    height, width = ((labels[0] != OUTSIDE).any(axis).sum() for axis in (1, 0))
    image, _ = validation.items[index][0].read()
    masks = F.interpolate(logits[..., :height, :width], image.shape[:2], mode="bilinear")
    return (masks[0] > 0).numpy(), outputs.pred_masks


def picture_row(validation: ValidationSet, index: int, masks: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns one item's row for `plot_masks`."""
    image, _ = validation.items[index][0].read()
    item = validation[index]
    scale = max(image.shape[:2]) / item["pixel_values"].shape[-1]
    points, boxes = (scale * item[name].numpy() if name in item else [] for name in ("input_points", "input_boxes"))
    if "input_labels" in item:
        points = points[item["input_labels"].numpy() == 1]
    return {"image": image, "points": points, "boxes": boxes, "masks": masks}


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
        for name in ("iou", "dice", "share_over_iou_0.5", "share_over_iou_0.75", "iou_head_error")
    ]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base}, fine-tuned",
        f"{'Adapter for the split SAM of' if is_adapter else 'Split SAM, from'} `{base}`"
        f"{f', revision `{settings.revision}`' if settings.revision else ''}. Data: {metrics['data']}, "
        f"{metrics['objects']['train']} training objects, {metrics['objects']['validation']} validation objects.",
        f"Best of {metrics['steps']} steps, prompts: {metrics['prompt']}. On the validation objects, at the "
        "resolution of the model's masks:",
        "\n".join(["| | before | after |", "|---|---|---|", *rows]),
    ]
    return ModelCard("\n\n".join(lines) + "\n")
