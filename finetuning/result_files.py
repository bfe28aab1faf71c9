"""Writes what a run has trained: metrics, model card, thresholds, exported models; uploads it."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, get_token
from transformers import PreTrainedModel, SamModel, SamProcessor

from checkpoint_tools.base_provenance import Base
from checkpoint_tools.checkout import ROOT
from checkpoint_tools.config_files import keep_known_settings
from checkpoint_tools.licences import CODE_LICENCE
from checkpoint_tools.model_repo import FILES
from checkpoint_tools.output_comparison import relative_error
from checkpoint_tools.output_folders import json_text, staged
from checkpoint_tools.push_to_hub import Destination, check_destination
from checkpoint_tools.push_to_hub import push as push_files
from evaluation.thresholds import labelled_images, sweep_thresholds
from image_data.samples import TrainValidationParts
from segmentation.adapted_model import load_base
from segmentation.predictor import Predictor

from .finetuned_model_card import Kind, card, is_stock, worse_than_base
from .recipe_settings import Settings, TrainingSettings
from .result_pictures import items_to_show, masks_to_show, predict, write_pictures
from .trainable_weights import trained
from .trainer import PromptTrainer, segmentation_settings


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
    (settings.folder / "metrics.json").write_text(json_text(metrics), encoding="utf-8")
    is_adapter = weights.name == "adapter"
    repo_id = settings.training.hub_model_id
    write_card(weights, settings, made_of, metrics, "adapter" if is_adapter else "split model", repo_id)
    print_scores(metrics, trainer.prompting.validated)
    print(f"{weights.name.capitalize()}: {weights}")
    if is_adapter and is_stock(made_of):
        print(f"Its base, {made_of.title}, is a stock SAM: README.md beside the adapter says how to load it.")

    base, processor = load_base(settings.model.base, settings.model.revision, image_size=settings.model.image_size)
    before = masks_to_show(base, trainer)
    model = trained(base, weights).eval()
    if is_adapter:
        complete_adapter(weights, made_of, processor)
    else:
        processor.save_pretrained(weights)
        keep_known_settings(weights)
    sweep = sweep_thresholds(
        Predictor(model.to(settings.training.device), processor),
        labelled_images([*parts.train, *parts.validation]),
        segmentation_settings(settings, parts),
    )
    sweep.settings.save(weights)
    print(sweep)
    model.cpu()
    write_pictures(settings.folder, trainer, {"before": before, "after": masks_to_show(model, trainer)}, metrics)

    def complete(folder: Path, kind: Kind) -> None:
        keep_known_settings(folder)
        processor.save_pretrained(folder)
        sweep.settings.save(folder)
        write_card(folder, settings, made_of, metrics, kind)

    write_exports(settings, model, trainer, complete)
    if settings.training.hub_model_id:
        push(weights, settings.training)


def write_card(
    folder: Path,
    settings: Settings,
    made_of: Base,
    metrics: dict[str, Any],
    kind: Kind,
    repo_id: str | None = None,
) -> None:
    """Writes the model card of what is in `folder`, and the licence files that it names."""
    card(settings.model, made_of, metrics, kind, repo_id).save(folder / "README.md")
    for file in made_of.licence.files:
        shutil.copyfile(made_of.folder / file, folder / file)


def write_exports(
    settings: Settings, model: PreTrainedModel, trainer: PromptTrainer, complete: Callable[[Path, Kind], None]
) -> None:
    """Writes the whole models that `--export` asks for. `complete` adds the files that belong to the weights."""
    if "merged" in settings.output.export:
        folder = settings.folder / "merged"
        with staged(folder, "split model", force=True) as target:
            model.save_pretrained(target)
            complete(target, "split model")
        print(f"Merged: {folder}")
    if "stock" in settings.output.export:
        folder = settings.folder / "sam"
        with staged(folder, "stock model", force=True) as target:
            model.to_sam().save_pretrained(target)
            complete(target, "stock model")
        print(compared_with_stock(model, folder, trainer, items_to_show(trainer.eval_dataset)))


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
