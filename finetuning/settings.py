"""The settings of the recipe: a dataclass for each group of options of `finetune.py`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg

from checkpoint_tools.staging import SAM_TINY

from .decoding import MAX_PIXELS, ImageReading
from .labels import LabelReading
from .rounds import Prompting


AUTOMATIC = "automatic"
OTHER_METRICS = ("dice", "share_over_iou_0.5", "share_over_iou_0.75", "iou_head_error")


class SettingsError(ValueError):
    """Settings that are out of range or contradict each other."""


@dataclass
class DataSettings:
    """Images, the objects in them, and how they are divided.

    Raises:
        SettingsError: If a setting is out of range, or two contradict each other.
    """

    _argument_group_name: ClassVar[str] = "data"

    images: Path | None = HfArg(
        default=None, help="folder of PNG, JPEG, TIFF, BMP or WebP images (a photograph of coins)"
    )
    masks: Path | None = HfArg(default=None, help="folder of PNG, TIFF, BMP or WebP label images, named as the images")
    coco: Path | None = HfArg(default=None, help="COCO annotations of the images, instead of masks")
    validation: float | None = HfArg(
        default=None, help="share held out for validation (0.2 of the images, or 0.5 of a single image)"
    )
    tile: int | None = HfArg(default=None, help="cut images into tiles of so many pixels")
    overlap: float = HfArg(default=0.25, help="overlap of neighbouring tiles, as a share of the tile side")
    min_area: int = HfArg(default=4, help="smallest object, in pixels of the predicted masks")
    augment: Literal["none", "crop", "turn"] = HfArg(
        default="turn", help="none, a part of the image mirrored (crop), or turned as well"
    )
    channels: list[int] = HfArg(
        default_factory=list, help="numbers of the bands that are red, green and blue, from 1; one number for grey"
    )
    pages: str | None = HfArg(
        default=None, help="each if every page of a file is an image, or the number of a page, from 1"
    )
    intensity: list[str] = HfArg(
        default_factory=lambda: ["percentile", "1", "99.8"],
        help="what becomes 0 and 255 of pixels that are not 8-bit: percentile LOW HIGH, min-max, or dtype",
    )
    max_pixels: int = HfArg(default=MAX_PIXELS, help="pixels of the largest image to decode")
    background: list[int] = HfArg(default_factory=list, help="numbers of the background in masks (0)")
    void: list[str] = HfArg(
        default_factory=list, help="numbers in masks of pixels without a label, which do not count; or none"
    )
    instances: Literal["labels", "components"] | None = HfArg(
        default=None, help="each number in a mask is an object, or each connected part of one"
    )
    threshold: int | None = HfArg(default=None, help="lowest value of an object, in masks with soft edges")
    turn_masks: bool = HfArg(default=False, help="turn masks with their images, as the images' EXIF orientation says")

    def __post_init__(self) -> None:
        _ = self.image_reading, self.label_reading  # raise errors
        if self.coco and self.masks:
            raise SettingsError("--masks and --coco are both given: expected one of them.")
        if bool(self.images) != bool(self.coco or self.masks):
            raise SettingsError("expected --images together with --masks or --coco, or none of them for the coins.")
        require_share(self, "validation", above_0=True)
        if not 0 <= self.overlap <= 0.9:
            raise SettingsError(f"--overlap {self.overlap}: expected a share from 0 to 0.9.")
        require_at_least(1, self, "tile")
        require_at_least(0, self, "min_area")

    @property
    def image_reading(self) -> ImageReading:
        """How image files become RGB."""
        return ImageReading(tuple(self.channels) or None, self.pages, " ".join(self.intensity), self.max_pixels)

    @property
    def label_reading(self) -> LabelReading:
        """What the numbers in masks mean, as far as it is given."""
        try:
            void = () if self.void == ["none"] else tuple(map(int, self.void)) or None
        except ValueError:
            raise SettingsError(f"--void {' '.join(self.void)}: expected numbers, or none.") from None
        return LabelReading(tuple(self.background) or None, void, self.instances, self.threshold, self.turn_masks)


@dataclass
class PromptSettings:
    """What the model is told of an object.

    Raises:
        SettingsError: If a setting is out of range.
    """

    _argument_group_name: ClassVar[str] = "prompts"

    prompts: Literal["mixed", "point", "box"] = HfArg(
        default="mixed", aliases=["--prompt"], help="first prompts: points and boxes (mixed), or one of them"
    )
    points: int = HfArg(default=1, help="points in each object")
    negative_points: int = HfArg(default=0, help="points beside each object")
    rounds: int = HfArg(default=0, help="corrective clicks after the first prompts")
    objects: int = HfArg(default=6, help="objects per image and training step")
    multimask: bool | None = HfArg(
        default=None,
        help="predict three masks per prompt, and train the best (true, false, or for a single point only)",
        metadata={"nargs": "?", "const": True},
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "points", "objects")
        require_at_least(0, self, "negative_points", "rounds")


@dataclass
class ModelSettings:
    """The base, and what of it is trained.

    Raises:
        SettingsError: If a setting is out of range, or two contradict each other.
    """

    _argument_group_name: ClassVar[str] = "model"

    base: str = HfArg(default=str(SAM_TINY), help="folder or Hub id of a SAM v1, stock or split")
    revision: str | None = HfArg(default=None, help="of the base, on the Hub")
    image_size: int | None = HfArg(
        default=None, help="side to which images are scaled (192 for sam-tiny, else the base's own)"
    )
    method: Literal["lora", "full", "decoder"] = HfArg(
        default="lora",
        help="adapters, all weights of the vision encoder, or those of the mask decoder alone",
    )
    target: list[str] = HfArg(default_factory=lambda: ["q", "v"], help="Linears of the vision layers to adapt")
    rank: int = HfArg(default=16, help="LoRA rank")
    alpha: float = HfArg(default=32.0, help="LoRA alpha")
    dropout: float = HfArg(default=0.1, help="LoRA dropout")
    dora: bool = HfArg(default=False, help="DoRA adapters")
    rslora: bool = HfArg(default=False, help="rsLoRA's scaling of the adapters")
    last_layers: int | None = HfArg(default=None, help="adapt so many of the last layers only")
    train_decoder: Literal["full", "lora"] | None = HfArg(default=None, help="the mask decoder too")
    load_in_4bit: bool = HfArg(default=False, help="quantize the base")

    def __post_init__(self) -> None:
        require_at_least(1, self, "rank", "image_size")
        require_share(self, "dropout")
        if not self.alpha > 0:
            raise SettingsError(f"--alpha {self.alpha}: expected more than 0.")
        if self.method != "lora" and (self.load_in_4bit or self.last_layers or self.dora or self.rslora):
            raise SettingsError(
                f"--method {self.method} trains no adapters: --load-in-4bit, --last-layers, --dora and --rslora "
                "do not apply."
            )
        if self.method != "lora" and self.train_decoder == "lora":
            raise SettingsError(f"--method {self.method} adds no adapters: expected --train-decoder full.")


@dataclass
class OutputSettings:
    """What is done with an earlier run, and with the result."""

    _argument_group_name: ClassVar[str] = "output"

    check: bool = HfArg(default=False, help="stop after the data was read, with pictures of it as data.png")
    resume: bool = HfArg(default=False, help="go on from the last checkpoint in --output")
    force: bool = HfArg(default=False, help="replace what an earlier run left in --output")
    export: list[str] = HfArg(
        default_factory=list,
        help="whole models to write: merged, and stock SAM",
        metadata={"choices": ("merged", "stock")},
    )


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

    _argument_group_name: ClassVar[str] = "training, with all options of transformers' TrainingArguments"
    # What the recipe needs as it is, or would not heed.
    FIXED: ClassVar[tuple[str, ...]] = (
        *("do_train", "do_eval", "do_predict", "prediction_loss_only", "num_train_epochs", "label_smoothing_factor"),
        *("eval_strategy", "eval_delay", "eval_on_start", "save_strategy", "per_device_eval_batch_size"),
        *("batch_eval_metrics", "eval_use_gather_object", "include_for_metrics", "label_names", "use_cache"),
        *("remove_unused_columns", "dataloader_drop_last", "group_by_length", "train_sampling_strategy"),
        *("auto_find_batch_size", "average_tokens_across_devices", "resume_from_checkpoint", "neftune_noise_alpha"),
    )

    output_dir: str = HfArg(default="build/finetune", aliases=["--output"], help="folder for all results")
    max_steps: int = HfArg(default=300, aliases=["--steps"], help="optimizer steps")
    minutes: float | None = HfArg(default=None, help="time limit of training, in minutes")
    per_device_train_batch_size: int = HfArg(default=4, aliases=["--batch-size"], help="images per process and batch")
    gradient_accumulation_steps: int = HfArg(default=1, aliases=["--accumulate"], help="batches of a step")
    learning_rate: float | None = HfArg(
        default=None, help="highest learning rate (1e-3, or 1e-4 if all weights of the encoder are trained)"
    )
    lr_scheduler_type: SchedulerType | str = HfArg(
        default="cosine", aliases=["--schedule"], help="course of the learning rate"
    )
    warmup_steps: float = HfArg(default=0.05, help="steps until the learning rate is highest; a share if less than 1")
    weight_decay: float = HfArg(default=0.01, help="of AdamW")
    loss: Literal["cross-entropy", "focal"] = HfArg(default="cross-entropy", help="beside dice")
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
    seed: int = HfArg(default=0, help="of all that is drawn")
    dataloader_num_workers: int = HfArg(default=0, aliases=["--workers"], help="processes that prepare the data")
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
        require_at_least(1, self, "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
        require_at_least(1, self, "eval_steps", "save_steps", "logging_steps")
        require_at_least(0, self, "patience", "dataloader_num_workers", "weight_decay", "minutes", "seed")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise SettingsError(f"--learning-rate {self.learning_rate}: expected more than 0.")
        if self.save_steps is None:
            self.save_steps = self.eval_steps
        if self.logging_steps is None:
            self.logging_steps = min(10, self.eval_steps, self.max_steps)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self._checkpoint_activations()
        self._name_repo()
        super().__post_init__()  # initialises the process group
        self._check_processes()

    @property
    def step_size(self) -> int:
        """Images of an optimizer step, of all processes together."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _refuse_fixed(self) -> None:
        """Raises an error for `FIXED` options that were set."""
        for name in self.FIXED:
            field = self.__dataclass_fields__.get(name)  # not every version has all of them
            if not field:
                continue
            value = getattr(self, name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
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


@dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Args:
        data: Images and objects.
        prompts: What the model is told of an object.
        model: The base, and what of it is trained.
        training: How it is trained, and where the results go.
        output: What is done with an earlier run, and with the result.
        options: The options by name, as `run.yaml` has them.

    Raises:
        SettingsError: If the best weights are to be selected by something that is not validated.
    """

    data: DataSettings
    prompts: PromptSettings
    model: ModelSettings
    training: TrainingSettings
    output: OutputSettings
    options: dict[str, Any]

    def __post_init__(self) -> None:
        validated = Prompting(self.prompts.prompts, self.prompts.rounds).validated
        metrics = ("iou", *(f"iou_{kind}" for kind in validated), AUTOMATIC, "loss", *OTHER_METRICS)
        if self.training.metric_for_best_model not in metrics:
            raise SettingsError(
                f"--select {self.training.metric_for_best_model}: expected one of {', '.join(metrics)}."
            )

    @property
    def folder(self) -> Path:
        """The folder for all results."""
        return Path(self.training.output_dir)


def require_at_least(least: float, settings: Any, *names: str) -> None:
    """Raises an error that names the first of the settings that is less; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise SettingsError(f"{option(settings, name)} {value}: expected {least} or more.")


def require_share(settings: Any, name: str, above_0: bool = False) -> None:
    """Raises an error if the setting is not a share from 0 to less than 1; None is allowed."""
    value = getattr(settings, name)
    if value is not None and not (0 <= value < 1 and (value > 0 or not above_0)):
        least = "more than 0" if above_0 else "0"
        raise SettingsError(f"{option(settings, name)} {value}: expected a share from {least} to less than 1.")


def option(settings: Any, name: str) -> str:
    """Returns the option of the command line that sets the field `name`: the short one, if it has one."""
    aliases = settings.__dataclass_fields__[name].metadata.get("aliases")
    return aliases[0] if aliases else f"--{name.replace('_', '-')}"
