"""Writes the results of fine-tuning: metrics, pictures, model card, exported models; uploads them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, get_token
from transformers import PreTrainedModel, SamModel, SamProcessor

from checkpoint_tools.bases import Base
from checkpoint_tools.checkout import ROOT
from checkpoint_tools.comparison import relative_error
from checkpoint_tools.licences import CODE_LICENCE
from checkpoint_tools.outputs import json_text, staged
from checkpoint_tools.plain_settings import keep_known_settings
from checkpoint_tools.pushing import FILES, Destination, check_destination
from checkpoint_tools.pushing import push as push_files
from evaluation.thresholds import labelled_images, sweep_thresholds
from image_data.samples import TrainValidationParts
from segmentation.predictor import Predictor
from segmentation.pretrained import load_base

from .cards import Kind, card, is_stock, worse_than_base
from .model import trained
from .plots import plot_curves, plot_masks
from .reporting import items_to_show, picture_row, predict
from .settings import Settings, TrainingSettings
from .training import PromptTrainer, segmentation_settings


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
    (output / "metrics.json").write_text(json_text(metrics), encoding="utf-8")
    is_adapter = weights.name == "adapter"

    def write_card(folder: Path, kind: Kind, repo_id: str | None = None) -> None:
        card(settings.model, made_of, metrics, kind, repo_id).save(folder / "README.md")
        for file in made_of.licence.files:
            shutil.copyfile(made_of.folder / file, folder / file)

    write_card(weights, "adapter" if is_adapter else "split model", settings.training.hub_model_id)
    print_scores(metrics, prompting.validated)
    print(f"{weights.name.capitalize()}: {weights}")
    if is_adapter and is_stock(made_of):
        print(f"Its base, {made_of.title}, is a stock SAM: README.md beside the adapter says how to load it.")

    base, processor = load_base(settings.model.base, settings.model.revision, image_size=settings.model.image_size)
    shown = items_to_show(validation)
    masks = {"before": [predict(base, validation, index, prompting)[0] for index in shown]}
    model = trained(base, weights).eval()
    if is_adapter:
        complete_adapter(weights, made_of, processor)
    else:
        processor.save_pretrained(weights)
        keep_known_settings(weights)
    how_to_segment = segmentation_settings(settings, parts)
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
    plot_curves(metrics["history"], metrics["before"]["iou"], output / "curves.png")
    print(f"Pictures: {output / 'masks.png'}, {output / 'curves.png'}")

    def export(whole: PreTrainedModel, folder: Path, kind: Kind) -> None:
        with staged(folder, kind, force=True) as target:
            whole.save_pretrained(target)
            keep_known_settings(target)
            processor.save_pretrained(target)
            sweep.settings.save(target)
            write_card(target, kind)

    if "merged" in settings.output.export:
        export(model, output / "merged", "split model")
        print(f"Merged: {output / 'merged'}")
    if "stock" in settings.output.export:
        export(model.to_sam(), output / "sam", "stock model")
        print(compared_with_stock(model, output / "sam", trainer, shown))
    if settings.training.hub_model_id:
        push(weights, settings.training)


def print_scores(metrics: dict[str, Any], kinds: Sequence[str]) -> None:
    """Prints the mean IoU before and after, of all kinds of prompts together and of each."""
    before, after = metrics["before"], metrics["after"]
    print(f"Mean IoU on the validation objects: {before['iou']:.3f} before, {after['iou']:.3f} after.")
    print("  " + ", ".join(f"{kind} {before[f'iou_{kind}']:.3f} to {after[f'iou_{kind}']:.3f}" for kind in kinds))
    if not metrics["better_than_base"]:
        print(f"Warning: {worse_than_base(metrics)}")


def compared_with_stock(model: PreTrainedModel, folder: Path, trainer: PromptTrainer, items: Sequence[int]) -> str:
    """Says how the masks of `model` for some validation items compare with those of the stock SAM in `folder`."""
    stock = SamModel.from_pretrained(folder).eval()
    pairs = [
        [predict(each, trainer.eval_dataset, index, trainer.prompting) for each in (model, stock)] for index in items
    ]
    same = all(np.array_equal(ours, theirs) for (ours, _), (theirs, _) in pairs)
    error = max(relative_error(theirs, ours) for (_, ours), (_, theirs) in pairs)
    return (
        f"Back in stock SamModel ({folder}): {'the same masks' if same else 'OTHER MASKS'}, "
        f"logits differ by {error:.1e} at most, relative to the largest."
    )


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
