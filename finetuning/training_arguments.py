"""`TrainingArguments` with the recipe's defaults, and without the options that it cannot heed."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import is_deepspeed_available

from checkpoint_tools.option_checks import (
    SettingsError,
    default_of,
    option,
    require_above_0,
    require_at_least,
    require_share,
)


MOST_IMAGES = 10_000  # of a batch
MOST_PROCESSES = 1000  # that load the data


def other_default(name: str, value: Any) -> Any:
    """Returns the field `name` of `TrainingArguments`, with another default."""
    metadata = dict(TrainingArguments.__dataclass_fields__[name].metadata)
    if isinstance(value, list):
        return dataclasses.field(default_factory=value.copy, metadata=metadata)
    return dataclasses.field(default=value, metadata=metadata)


@dataclass
class TrainingSettings(TrainingArguments):
    """`TrainingArguments` with the recipe's defaults, and short names for the options used most.

    Raises:
        SettingsError: If a setting is out of range, the recipe cannot heed it, or the processes are not those that
            were asked for.
    """

    _argument_group_name: ClassVar[str] = "training, with the options of transformers' TrainingArguments"
    # What the recipe needs as it is, or would not heed.
    FIXED: ClassVar[tuple[str, ...]] = (
        *("do_train", "do_eval", "do_predict", "prediction_loss_only", "num_train_epochs", "label_smoothing_factor"),
        *("eval_strategy", "eval_delay", "eval_on_start", "save_strategy", "per_device_eval_batch_size"),
        *("batch_eval_metrics", "eval_use_gather_object", "include_for_metrics", "label_names", "use_cache"),
        *("remove_unused_columns", "dataloader_drop_last", "group_by_length", "train_sampling_strategy"),
        *("auto_find_batch_size", "average_tokens_across_devices", "resume_from_checkpoint", "neftune_noise_alpha"),
        *("load_best_model_at_end", "restore_callback_states_from_checkpoint", "ignore_data_skip"),
        *("data_seed", "length_column_name", "dataloader_in_order", "dataloader_multiprocessing_context"),
        *("hub_strategy", "hub_always_push"),
    )

    output_dir: str = HfArg(default="build/finetune", aliases=["--output"], help="folder for all results")
    max_steps: int = HfArg(default=200, aliases=["--steps"], help="optimizer steps")
    minutes: float | None = HfArg(default=None, help="time limit of training, in minutes")
    per_device_train_batch_size: int = HfArg(default=4, aliases=["--batch-size"], help="images per process and batch")
    gradient_accumulation_steps: int = HfArg(default=1, aliases=["--accumulate"], help="batches per optimizer step")
    learning_rate: float | None = HfArg(
        default=None, help="highest learning rate (1e-3, or 1e-4 if all weights of the encoder are trained)"
    )
    lr_scheduler_type: SchedulerType | str = HfArg(
        default="cosine", aliases=["--schedule"], help="learning rate schedule"
    )
    warmup_steps: float = HfArg(default=0.05, help="steps until the learning rate is highest; a share if less than 1")
    weight_decay: float = HfArg(default=0.01, help="weight decay of AdamW")
    loss: Literal["cross-entropy", "focal"] = HfArg(default="cross-entropy", help="pixel loss, added to dice loss")
    eval_steps: int = HfArg(
        default=50, aliases=["--eval-every"], help="steps from one validation and checkpoint to the next"
    )
    metric_for_best_model: str = HfArg(
        default="iou",
        aliases=["--select"],
        help="what picks the best weights: iou, the mean of all prompts; iou_point, iou_box or iou_clicks, or another "
        "metric that is validated; or automatic, the quality of automatic masks",
    )
    patience: int = HfArg(default=5, help="validations without improvement before training stops; 0 for never")
    gradient_checkpointing: bool = HfArg(default=False, help="compute activations again in backward")
    bf16: bool = HfArg(default=False, help="train in bfloat16 autocast")
    seed: int = HfArg(default=0, help="seed of all random choices")
    dataloader_num_workers: int = HfArg(default=0, aliases=["--workers"], help="processes that load the data")
    push_to_hub: str | None = HfArg(
        default=None,
        help="upload what was trained to this model repo, or to that of --hub-model-id",
        metadata={"nargs": "?", "const": "true", "metavar": "USER/NAME"},
    )

    eval_strategy: str = other_default("eval_strategy", "steps")
    save_steps: float | None = other_default("save_steps", None)  # those of validations
    save_total_limit: int | None = other_default("save_total_limit", 2)  # the best and the last
    load_best_model_at_end: bool = other_default("load_best_model_at_end", True)
    restore_callback_states_from_checkpoint: bool = other_default("restore_callback_states_from_checkpoint", True)
    logging_steps: float | None = other_default("logging_steps", None)  # 10, if validations are not more frequent
    label_names: list[str] | None = other_default("label_names", ["labels"])  # Trainer would pick input_labels
    remove_unused_columns: bool = other_default("remove_unused_columns", False)
    per_device_eval_batch_size: int = other_default("per_device_eval_batch_size", 1)  # with any number of objects
    batch_eval_metrics: bool = other_default("batch_eval_metrics", True)
    use_cpu: bool = other_default("use_cpu", False)
    ddp_find_unused_parameters: bool | None = other_default("ddp_find_unused_parameters", False)

    def __post_init__(self) -> None:
        self._refuse_fixed()
        require_at_least(1, self, "max_steps", "gradient_accumulation_steps")
        require_at_least(1, self, "per_device_train_batch_size", most=MOST_IMAGES)
        require_at_least(1, self, "eval_steps", "save_steps", "logging_steps", "save_total_limit")
        require_at_least(1, self, "eval_accumulation_steps", "ddp_bucket_cap_mb", "ddp_timeout")
        require_at_least(0, self, "patience", "warmup_steps", "weight_decay", "minutes", "max_grad_norm")
        require_at_least(0, self, "dataloader_num_workers", most=MOST_PROCESSES)
        require_at_least(0, self, "seed", most=2**32 - 1)
        require_above_0(self, "learning_rate", "adam_epsilon")
        require_share(self, "adam_beta1")
        require_share(self, "adam_beta2")
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        if self.save_steps % self.eval_steps:
            raise SettingsError(
                f"--save-steps {self.save_steps:g}: expected a multiple of --eval-every {self.eval_steps:g}, as the "
                "best weights are those of a validation."
            )
        if self.logging_steps is None:
            self.logging_steps = min(10, self.eval_steps, self.max_steps)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self._checkpoint_activations()
        self._name_repo()
        # Checked first, because a failing TrainingArguments leaves a broken DeepSpeed configuration in the process.
        if self.deepspeed and not is_deepspeed_available():
            raise SettingsError(f"--deepspeed {self.deepspeed}: not installed: pip install deepspeed.")
        super().__post_init__()  # initialises the process group
        self._check_processes()
        self._check_schedule()
        if self.fp16 and self.device.type == "cpu":
            raise SettingsError("--fp16: CPUs cannot train in it; use --bf16.")
        if missing := sorted({*self.report_to} - {*get_available_reporting_integrations()}):
            raise SettingsError(f"--report-to {' '.join(missing)}: not installed, or unknown to transformers.")

    @property
    def step_size(self) -> int:
        """Images of an optimizer step, of all processes together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _refuse_fixed(self) -> None:
        """Raises an error for `FIXED` options that were set."""
        for name in self.FIXED:
            if name not in self.__dataclass_fields__:  # not every version has all of them
                continue
            value, default = getattr(self, name), default_of(self, name)
            if value != default:
                raise SettingsError(f"{option(self, name)} {value}: the recipe works with {default} only.")

    def _checkpoint_activations(self) -> None:
        """Sets how activations are computed again, by the name that this version of transformers knows."""
        name = "gradient_checkpointing"
        if hasattr(self, "activation_checkpointing"):
            name = "activation_checkpointing"
            wanted = getattr(self, name) or self.gradient_checkpointing
            self.__dict__.update({name: wanted, "gradient_checkpointing": None})
        if getattr(self, name) and not getattr(self, f"{name}_kwargs"):
            # Reentrant checkpointing would also run backward through layers below the first adapter.
            setattr(self, f"{name}_kwargs", {"use_reentrant": False})

    def _name_repo(self) -> None:
        """Makes `hub_model_id` the repo to upload to, if any. Not Trainer uploads, but the recipe, at the end."""
        if self.push_to_hub in (None, "false"):
            self.hub_model_id = None
        elif self.push_to_hub != "true":
            self.hub_model_id = self.push_to_hub
        elif not self.hub_model_id:
            raise SettingsError("--push-to-hub: expected USER/NAME, or --hub-model-id USER/NAME.")
        self.push_to_hub = None

    def _check_schedule(self) -> None:
        """Raises an error for a schedule that `Trainer` could not make; some need arguments of their own."""
        try:
            get_scheduler(
                self.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)]),
                self.get_warmup_steps(self.max_steps),
                self.max_steps,
                self.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise SettingsError(
                f"--schedule {SchedulerType(self.lr_scheduler_type).value}, --warmup-steps {self.warmup_steps:g} and "
                f"--lr-scheduler-kwargs {self.lr_scheduler_kwargs}: {error}."
            ) from error

    def _check_processes(self) -> None:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and self.world_size == 1:
            raise SettingsError(
                "accelerate started one process instead of several, as it does on CPUs without MPI. Use "
                "accelerate launch --multi_gpu --num_processes N, which starts N processes on CPUs as well."
            )
        if self.n_gpu > 1:
            raise SettingsError(
                f"One process sees {self.n_gpu} GPUs: start one for each with accelerate launch --num_processes "
                f"{self.n_gpu}, or restrict it to one GPU with CUDA_VISIBLE_DEVICES=0."
            )
