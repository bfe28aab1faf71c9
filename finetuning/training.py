"""Sets up `Trainer` for masks and prompts."""

import math
import os
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
from .settings import Settings, SettingsError


def build_training_args(settings: Settings) -> TrainingArguments:
    """Settings for `Trainer`.

    Raises:
        SettingsError: If accelerate started one process instead of several, or one process
            sees several GPUs (`Trainer` would use DataParallel).
    """
    # Reentrant checkpointing would also run backward through layers below the first adapter.
    non_reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointing = non_reentrant if settings.gradient_checkpointing else {}  # a name that newer releases deprecate
    training_args = TrainingArguments(
        output_dir=str(settings.output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=1,  # images have different numbers of objects
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * settings.steps),
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_steps=settings.eval_every,
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=True,
        metric_for_best_model="iou",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=min(10, settings.eval_every),
        report_to="none",
        label_names=["labels"],  # otherwise Trainer picks input_labels, which belongs to the prompts
        remove_unused_columns=False,
        batch_eval_metrics=True,
        **checkpointing,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=settings.workers,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
    )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and training_args.world_size == 1:
        raise SettingsError(
            "accelerate started one process instead of several, as it does on CPUs without MPI. Use "
            "accelerate launch --multi_gpu --num_processes N, which starts N processes on CPUs as well."
        )
    if training_args.n_gpu > 1:
        raise SettingsError(
            f"One process sees {training_args.n_gpu} GPUs: start one for each with accelerate launch --num_processes "
            f"{training_args.n_gpu}, or restrict it to one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    return training_args


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
    training_args: TrainingArguments,
    model: torch.nn.Module,
    processor: SamProcessor,
    parts: TrainValidationParts,
    mask_side: int,
) -> Trainer:
    """Returns a trainer of `model` on the training part, as `settings` say."""
    encode = ItemEncoder(processor, mask_side, Prompts(settings.prompt, settings.points, settings.negative_points))
    step_size = settings.batch_size * settings.accumulate * training_args.world_size
    callbacks: list[TrainerCallback] = []
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    callbacks.append(StopAfter(math.inf if settings.minutes is None else settings.minutes))
    return PromptTrainer(
        model,
        training_args,
        data_collator=Collator(settings.multimask),
        train_dataset=TrainingSet(
            parts.train,
            encode,
            settings.steps * step_size,
            step_size,
            settings.objects,
            settings.augment,
            settings.min_area,
            settings.seed,
        ),
        eval_dataset=ValidationSet(parts.validation, encode, seed=settings.seed),
        compute_loss_func=MaskLoss(settings.loss),
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
