"""How `Trainer` is set up for masks and prompts."""

import argparse
import math
import os
import time
from typing import Any

import torch
from adapted_model import UnusableModel
from losses import MaskLoss, MaskMetrics, object_scores
from prompts import Collator, Encoder, Prompts, TrainingSet, ValidationSet
from samples import Split
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


def build_training_args(args: argparse.Namespace) -> TrainingArguments:
    """Settings for `Trainer`.

    Raises:
        UnusableModel: If this is one process where several were asked for, or where it would divide its batches among
            several GPUs in its own way.
    """
    # Reentrant checkpoints would run backward below the adapted layers.
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointing = settings if args.gradient_checkpointing else {}  # a name that newer releases deprecate
    training_args = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=1,  # images have different numbers of objects
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * args.steps),
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.eval_every,
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=True,
        metric_for_best_model="iou",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=min(10, args.eval_every),
        report_to="none",
        label_names=["labels"],  # else it is the prompts' input_labels
        remove_unused_columns=False,
        batch_eval_metrics=True,
        **checkpointing,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=args.workers,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=args.seed,
    )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and training_args.world_size == 1:
        raise UnusableModel(
            "accelerate launch was asked for several processes and started one, as it does on CPUs without MPI: use "
            "accelerate launch --multi_gpu --num_processes N, which starts N processes on CPUs as well."
        )
    if training_args.n_gpu > 1:
        raise UnusableModel(
            f"One process sees {training_args.n_gpu} GPUs: start one for each with accelerate launch --num_processes "
            f"{training_args.n_gpu}, or show it one with CUDA_VISIBLE_DEVICES=0."
        )
    return training_args


class PromptTrainer(Trainer):
    """A `Trainer` that takes the training set in its own order."""

    def get_train_dataloader(self) -> DataLoader:
        """Returns the batches in order: the set shuffles itself, and gives a step prompts of one kind."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)


def build_trainer(
    args: argparse.Namespace,
    training_args: TrainingArguments,
    model: torch.nn.Module,
    processor: SamProcessor,
    found: Split,
    mask_side: int,
) -> Trainer:
    """Returns a trainer of `model` on what was found, as `args` say."""
    encode = Encoder(processor, mask_side, Prompts(args.prompt, args.points, args.negative_points))
    step_size = args.batch_size * args.accumulate * training_args.world_size
    callbacks: list[TrainerCallback] = []
    if args.patience:
        callbacks.append(EarlyStoppingCallback(args.patience))
    callbacks.append(StopAfter(math.inf if args.minutes is None else args.minutes))
    return PromptTrainer(
        model,
        training_args,
        data_collator=Collator(args.multimask),
        train_dataset=TrainingSet(
            found.train,
            encode,
            args.steps * step_size,
            step_size,
            args.objects,
            args.augment,
            args.min_area,
            args.seed,
        ),
        eval_dataset=ValidationSet(found.validation, encode, seed=args.seed),
        compute_loss_func=MaskLoss(args.loss),
        compute_metrics=MaskMetrics(),
        preprocess_logits_for_metrics=object_scores,
        callbacks=callbacks,
    )


class StopAfter(TrainerCallback):
    """Validates and saves after the last step, which is also when the time is up, as the first process sees it."""

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends training once it is late."""
        late = torch.tensor(int(time.monotonic() > self.deadline), device=args.device)
        if args.world_size > 1:
            torch.distributed.broadcast(late, 0)
        if late.item():
            control.should_training_stop = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


def metrics_of(logged: dict[str, float]) -> dict[str, float]:
    """The metrics of a validation, of all that `Trainer` logged of it."""
    speed = ("runtime", "per_second", "preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in logged.items()
        if name.startswith("eval_") and not name.endswith(speed)
    }
