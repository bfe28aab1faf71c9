"""Sets up `Trainer` for masks and prompts."""

import math
import time
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    SamProcessor,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .losses import MaskLoss, MaskMetrics, object_scores
from .prompts import Collator, ItemEncoder, Prompts, TrainingSet, ValidationSet
from .samples import TrainValidationParts
from .settings import Settings


class PromptTrainer(Trainer):
    """A `Trainer` that does not shuffle the training set."""

    def get_train_dataloader(self) -> DataLoader:
        """Returns batches in order. The dataset shuffles itself, and all items of a step have one kind of prompt."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)


def build_trainer(
    settings: Settings,
    model: torch.nn.Module,
    processor: SamProcessor,
    parts: TrainValidationParts,
    mask_side: int,
) -> Trainer:
    """Returns a trainer of `model` on the training part, as `settings` say."""
    prompts, training = settings.prompts, settings.training
    encode = ItemEncoder(processor, mask_side, Prompts(prompts.prompt, prompts.points, prompts.negative_points))
    callbacks: list[TrainerCallback] = []
    if training.patience:
        callbacks.append(EarlyStoppingCallback(training.patience))
    callbacks.append(StopAfter(math.inf if training.minutes is None else training.minutes))
    return PromptTrainer(
        model,
        training,
        data_collator=Collator(prompts.multimask),
        train_dataset=TrainingSet(
            parts.train,
            encode,
            training.max_steps * training.step_size,
            training.step_size,
            prompts.objects,
            settings.data.augment,
            settings.data.min_area,
            training.seed,
        ),
        eval_dataset=ValidationSet(parts.validation, encode, seed=training.seed),
        compute_loss_func=MaskLoss(training.loss),
        compute_metrics=MaskMetrics(),
        preprocess_logits_for_metrics=object_scores,
        callbacks=callbacks,
    )


class StopAfter(TrainerCallback):
    """Stops at the time limit (as measured on rank 0), and always validates and saves after the last step."""

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops training after the time limit."""
        late = torch.tensor(int(time.monotonic() > self.deadline), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(late, 0)
        if late.item():
            control.should_training_stop = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


def metrics_of(logged: dict[str, float]) -> dict[str, float]:
    """Returns the metrics from a `Trainer` evaluation log, without timings."""
    speed = ("runtime", "per_second", "preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in logged.items()
        if name.startswith("eval_") and not name.endswith(speed)
    }
