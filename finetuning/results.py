"""Writes the results of fine-tuning: metrics, pictures, model card, exported models; uploads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, get_token
from torch.utils.data import default_collate
from transformers import PreTrainedModel, SamModel, SamProcessor

from checkpoint_tools.bases import Base
from checkpoint_tools.comparison import relative_error
from checkpoint_tools.licences import CODE_LICENCE
from checkpoint_tools.masks import best_rated
from checkpoint_tools.outputs import staged
from checkpoint_tools.plain_settings import keep_known_settings
from checkpoint_tools.pushing import FILES, Destination, check_destination
from checkpoint_tools.pushing import push as push_files
from checkpoint_tools.staging import ROOT

from .cards import Kind, card, is_stock, worse_than_base
from .model import load_base, trained
from .overlaps import mask_of
from .pictures import plot_curves, plot_masks
from .predictor import Predictor
from .prompts import OUTSIDE, ValidationSet
from .rounds import POINT, Prompting, Rounds
from .samples import TrainValidationParts
from .settings import Settings, TrainingSettings
from .thresholds import labelled_images, sweep_thresholds
from .training import PromptTrainer, segmentation_settings


NUM_PICTURES = 3
PATTERNS = (*FILES, "adapter_config.json", "adapter_model*.safetensors")  # of what is uploaded


def write_results(
    settings: Settings,
    made_of: Base,
    weights: Path,
    metrics: dict[str, Any],
    parts: TrainValidationParts,
    trainer: PromptTrainer,
) -> None:
    """Writes metrics, pictures and exports of what is in `weights` to the output folder, and prints their paths."""
    output, validation, prompting = settings.folder, trainer.eval_dataset, trainer.prompting
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    is_adapter = weights.name == "adapter"

    def write_card(folder: Path, kind: Kind, repo_id: str | None = None) -> None:
        card(settings.model, made_of, metrics, kind, repo_id).save(folder / "README.md")
        for file in made_of.licence.files:
            shutil.copyfile(made_of.folder / file, folder / file)

    write_card(weights, "adapter" if is_adapter else "split model", settings.training.hub_model_id)
    before, after = metrics["before"]["iou"], metrics["after"]["iou"]
    print(f"Mean IoU on the validation objects: {before:.3f} before, {after:.3f} after.")
    changes = [
        f"{kind} {metrics['before'][f'iou_{kind}']:.3f} to {metrics['after'][f'iou_{kind}']:.3f}"
        for kind in prompting.validated
    ]
    print(f"  {', '.join(changes)}")
    if not metrics["better_than_base"]:
        print(f"Warning: {worse_than_base(metrics)}")
    print(f"{weights.name.capitalize()}: {weights}")
    if is_adapter and is_stock(made_of):
        print(f"Its base, {made_of.title}, is a stock SAM: README.md beside the adapter says how to load it.")

    base, processor = load_base(settings.model.base, settings.model.revision, image_size=settings.model.image_size)
    shown = np.unique(np.linspace(0, len(validation) - 1, NUM_PICTURES).astype(int)).tolist()
    masks = {"before": [predict(base, validation, index, prompting)[0] for index in shown]}
    model = trained(base, weights).eval()
    if is_adapter:
        complete_adapter(weights, made_of, processor)
    else:
        processor.save_pretrained(weights)
        keep_known_settings(weights)
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
            keep_known_settings(target)
            processor.save_pretrained(target)
            sweep.settings.save(target)
            write_card(target, "split model")
        print(f"Merged: {output / 'merged'}")
    if "stock" in settings.output.export:
        with staged(output / "sam", "stock model", force=True) as target:
            model.to_sam().save_pretrained(target)
            keep_known_settings(target)
            processor.save_pretrained(target)
            sweep.settings.save(target)
            write_card(target, "stock model")
        stock = SamModel.from_pretrained(output / "sam").eval()
        pairs = [[predict(each, validation, index, prompting) for each in (model, stock)] for index in shown]
        same = all(np.array_equal(ours, theirs) for (ours, _), (theirs, _) in pairs)
        error = max(relative_error(theirs, ours) for (_, ours), (_, theirs) in pairs)
        print(
            f"Back in stock SamModel ({output / 'sam'}): {'the same masks' if same else 'OTHER MASKS'}, "
            f"logits differ by {error:.1e} at most, relative to the largest."
        )
    if settings.training.hub_model_id:
        push(weights, settings.training)


def complete_adapter(adapter: Path, base: Base, processor: SamProcessor) -> None:
    """Adds to an adapter what loading it takes: the processor and, if its base is stock SAM, the code."""
    processor.save_pretrained(adapter)
    if is_stock(base):
        for file in ROOT.glob("*_sam_split.py"):
            shutil.copyfile(file, adapter / file.name)
        shutil.copyfile(ROOT / "LICENSE", adapter / CODE_LICENCE)


def destination_of(settings: TrainingSettings) -> tuple[HfApi, Destination]:
    """Returns the Hub, with the token, and the repo to upload to."""
    private = bool(settings.hub_private_repo)
    destination = Destination(str(settings.hub_model_id), "Fine-tuned", private, settings.hub_revision)
    return HfApi(token=settings.hub_token or get_token()), destination


def push(folder: Path, settings: TrainingSettings) -> None:
    """Uploads `folder` to a model repo, which is made if missing, and compares it with what the Hub gives back.

    Raises:
        PushError: If the Hub refuses, or gives back something else.
    """
    hub, destination = destination_of(settings)
    commit = push_files(hub, destination, folder, check_destination(hub, destination), PATTERNS)
    print(f"Uploaded: {commit.repo_url}, commit {commit.oid}")


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
