"""The `Trainer` of the recipe: its data, callbacks and metrics."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate
from transformers import (
    EarlyStoppingCallback,
    SamProcessor,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from evaluation.thresholds import labelled_images, sweep_thresholds
from image_data.samples import Sample, TrainValidationParts
from segmentation.predictor import Predictor
from segmentation.settings import SegmentationSettings

from .click_rounds import LastImage, Prediction, Prompting
from .embedding_cache import EmbeddingCache
from .loss_and_metrics import MaskMetrics, StepLoss, object_scores
from .prompts import ItemEncoder, Prompts, TrainingSet, ValidationSet
from .recipe_settings import AUTOMATIC, Settings
from .result_pictures import TRACKERS, MaskPictures


class PromptTrainer(Trainer):
    """A `Trainer` that asks for each object as `Prompting` says, and does not shuffle the training set.

    Args:
        prompting: First prompts and corrective clicks.
        args: Those of `Trainer`.
        kwargs: Those of `Trainer`.
    """

    def __init__(self, prompting: Prompting, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prompting = prompting
        self.last_image = LastImage()

    def get_train_dataloader(self) -> DataLoader:
        """Returns batches in order, as the dataset shuffles itself."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what `Trainer` returns, with the predictions of all rounds as the model's outputs."""
        targets = inputs["labels"]

        def outputs(**batch: Any) -> dict[str, tuple[torch.Tensor, ...]]:
            if model.training:
                predictions = self.prompting.predict_to_train(model, batch, targets, self.state.global_step)
            else:
                predictions = self.predict_to_validate(model, batch, targets)
            ratings, masks = zip(*predictions, strict=True)
            return {"iou_scores": ratings, "pred_masks": masks}

        return super().compute_loss(outputs, inputs, *args, **kwargs)

    def predict_to_validate(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], targets: torch.Tensor
    ) -> list[Prediction]:
        """Returns the predictions of all that is validated; items of one image follow each other and share a pass."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # all ranks must run the same modules
            return list(self.prompting.predict_to_validate(model, batch, targets).values())
        with self.last_image.encoded_once(model, batch) as batch:
            return list(self.prompting.predict_to_validate(model, batch, targets).values())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluates as `Trainer` does; the weights have changed since the last time."""
        self.last_image.forget()
        return super().evaluation_loop(*args, **kwargs)


def build_trainer(
    settings: Settings,
    model: torch.nn.Module,
    processor: SamProcessor,
    parts: TrainValidationParts,
    mask_side: int,
) -> PromptTrainer:
    """Returns a trainer of `model` on the training part, as `settings` say."""
    asked, training = settings.prompts, settings.training
    prompting = asked.prompting(training.seed)
    prompts = Prompts(asked.prompts, asked.points, asked.negative_points, prompting.most_clicks)
    embeddings = None
    if settings.model.cache_embeddings:
        embeddings = EmbeddingCache(settings.model.cache_embeddings, model, processor, training.mixed_precision)
    encode = ItemEncoder(processor, mask_side, prompts, embeddings)
    callbacks: list[TrainerCallback] = [StopWhenDiverged()]
    if training.patience:
        callbacks.append(EarlyStoppingCallback(training.patience))
    callbacks.append(StopAfter(math.inf if training.minutes is None else training.minutes))
    others: Callable[[], dict[str, float]] | None = None
    if training.metric_for_best_model == AUTOMATIC:
        predictor, how_to_segment = Predictor(model, processor), segmentation_settings(settings, parts)

        def others() -> dict[str, float]:
            return {AUTOMATIC: best_automatic_score(predictor, parts.validation, how_to_segment)}

    trainer = PromptTrainer(
        prompting,
        model,
        training,
        data_collator=default_collate,
        train_dataset=TrainingSet(
            parts.train,
            encode,
            training.max_steps * training.step_size,
            asked.objects,
            settings.data.augment,
            settings.data.min_area,
            training.seed,
        ),
        eval_dataset=ValidationSet(parts.validation, encode, seed=training.seed),
        compute_loss_func=StepLoss(training.loss),
        compute_metrics=MaskMetrics(prompting.validated, others),
        preprocess_logits_for_metrics=object_scores,
        callbacks=callbacks,
    )
    if {*TRACKERS} & {*training.report_to}:
        trainer.add_callback(MaskPictures(trainer))
    if embeddings:
        samples = [*parts.train, *parts.validation, *parts.test][training.process_index :: training.world_size]
        with trainer.accelerator.autocast():  # in the precision of training
            embeddings.fill(samples, show_progress=training.process_index == 0)
        trainer.accelerator.wait_for_everyone()
    return trainer


def segmentation_settings(settings: Settings, parts: TrainValidationParts) -> SegmentationSettings:
    """How the trained model is to be used, as far as its training says.

    Images are cut into tiles of the size it was trained on, if it has not seen whole images.
    """
    switches = {None: "single-point", True: "always", False: "never"}
    return SegmentationSettings(
        image_size=settings.model.image_size,
        tile=settings.data.tile or parts.part_side,
        overlap=settings.data.overlap,
        multimask=switches[settings.prompts.multimask],
        grid=settings.prompts.grid,
        reading=settings.data.image_reading,
    )


def best_automatic_score(predictor: Predictor, samples: list[Sample], settings: SegmentationSettings) -> float:
    """Returns the mean segmentation accuracy of automatic masks at the best thresholds."""
    return float(sweep_thresholds(predictor, labelled_images(samples), settings).scores.max())


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


class StopWhenDiverged(TrainerCallback):
    """Stops once the validation loss is not a number, as the weights then never recover."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Stops training if the loss is not finite."""
        if not math.isfinite(metrics["eval_loss"]):
            control.should_training_stop = True


def metrics_of(logged: dict[str, float]) -> dict[str, float]:
    """Returns the metrics from a `Trainer` evaluation log, without timings."""
    speed = ("runtime", "per_second", "preparation_time")
    return {
        name.removeprefix("eval_"): value
        for name, value in logged.items()
        if name.startswith("eval_") and not name.endswith(speed)
    }
