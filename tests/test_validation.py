"""Validation costs one pass of the vision encoder for each image, whatever the number of objects."""

from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_images import MASK_SIDE, Array, blocks
from torch.utils.data import default_collate

from finetuning.click_rounds import Prompting
from finetuning.loss_and_metrics import MaskMetrics, StepLoss, object_scores
from finetuning.prompts import ItemEncoder, Prompts, ValidationSet
from finetuning.trainer import PromptTrainer
from finetuning.training_arguments import TrainingSettings
from image_data.samples import Sample


def trainer_of(model: torch.nn.Module, processor, folder: Path, objects: int) -> PromptTrainer:
    """Validates on three images of six objects each, with so many objects in an item; two show the same."""
    labels = [blocks(), blocks().T.copy(), blocks()]
    samples = [Sample(Array(each, str(n)), np.s_[:, :], np.unique(each)[1:]) for n, each in enumerate(labels)]
    prompting = Prompting("mixed")
    return PromptTrainer(
        prompting,
        model,
        TrainingSettings(output_dir=str(folder), report_to=[], disable_tqdm=True),
        data_collator=default_collate,
        eval_dataset=ValidationSet(samples, ItemEncoder(processor, MASK_SIDE, Prompts("mixed")), objects),
        compute_loss_func=StepLoss("cross-entropy"),
        compute_metrics=MaskMetrics(prompting.validated),
        preprocess_logits_for_metrics=object_scores,
    )


def scores(trainer: PromptTrainer) -> dict[str, float]:
    return {name: value for name, value in trainer.evaluate().items() if "iou" in name or "objects" in name}


def test_an_image_is_encoded_once_in_each_validation(load, processor, tmp_path):
    model, calls = load(), []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    trainer = trainer_of(model, processor, tmp_path, objects=2)
    assert len(trainer.eval_dataset) == 9
    first = scores(trainer)
    assert len(calls) == 3 and first["eval_objects"] == 18
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():
            parameter.mul_(1.2)
    calls.clear()
    changed = scores(trainer)
    assert len(calls) == 3 and changed != first, "other weights give other embeddings"
    one_by_one = scores(trainer_of(model, processor, tmp_path, objects=6))  # an item for each image
    assert one_by_one == pytest.approx(changed, abs=1e-6)
