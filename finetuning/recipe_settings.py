"""The settings of the recipe, a dataclass for each group of options: prompts, model, output, and all together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers.hf_argparser import HfArg

from checkpoint_tools.checkout import SAM_TINY
from checkpoint_tools.option_checks import (
    MOST_GRID_POINTS,
    MOST_IMAGE_SIDE,
    SettingsError,
    default_of,
    option,
    require_above_0,
    require_at_least,
    require_share,
)
from image_data.data_settings import DataSettings

from .click_rounds import Prompting
from .training_arguments import TrainingSettings


AUTOMATIC = "automatic"
MOST_PROMPTS = 100  # points of a prompt, or rounds
MOST_OBJECTS = 1000  # of an image; where it has fewer, they repeat
MOST_RANK = 10_000  # more than any layer of SAM has inputs
OTHER_METRICS = ("dice", "share_over_iou_0.5", "share_over_iou_0.75", "iou_head_error")


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
    points: int = HfArg(default=1, help="points inside each object")
    negative_points: int = HfArg(default=0, help="points outside each object")
    rounds: int | None = HfArg(
        default=None,
        help="rounds of corrective clicks, of 8 in all (1 for mixed prompts, otherwise 0); from 8 rounds on, each "
        "adds one click, and two more rounds add none, as in Segment Anything",
    )
    objects: int = HfArg(default=6, help="objects per image and training step")
    multimask: bool | None = HfArg(
        default=None,
        help="predict three masks per prompt, and train the best: true, false (true for a single point only)",
        metadata={"nargs": "?", "const": True},
    )

    grid: int = HfArg(
        default=32,
        help="points along a side of the grid for automatic masks, whose thresholds are chosen after training",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "objects", most=MOST_OBJECTS)
        require_at_least(1, self, "grid", most=MOST_GRID_POINTS)
        if self.rounds is None:
            self.rounds = int(self.prompts == "mixed")
        require_at_least(1, self, "points", most=MOST_PROMPTS)
        require_at_least(0, self, "negative_points", "rounds", most=MOST_PROMPTS)

    def prompting(self, seed: int = 0) -> Prompting:
        """How a run with this seed asks for objects."""
        assert self.rounds is not None
        return Prompting(self.prompts, self.rounds, self.multimask, seed)


@dataclass
class ModelSettings:
    """The base, and what of it is trained.

    Raises:
        SettingsError: If a setting is out of range, or two contradict each other.
    """

    _argument_group_name: ClassVar[str] = "model"

    base: str = HfArg(default=str(SAM_TINY), help="folder or Hub id of a SAM v1, stock or split")
    revision: str | None = HfArg(default=None, help="branch, tag or commit of the base on the Hub")
    base_model: str | None = HfArg(
        default=None, help="Hub id of a split model equal to the base, for the adapter and its card to name"
    )
    image_size: int | None = HfArg(
        default=None, help="side to which images are scaled (192 for sam-tiny, else the base's own)"
    )
    method: Literal["lora", "full", "decoder"] = HfArg(
        default="lora",
        help="train adapters of the vision encoder (lora), all of its weights (full), or the mask decoder alone",
    )
    target: list[str] = HfArg(default_factory=lambda: ["q", "v"], help="Linears of the vision layers to adapt")
    rank: int = HfArg(default=16, help="LoRA rank")
    alpha: float = HfArg(default=32.0, help="LoRA alpha")
    dropout: float = HfArg(default=0.1, help="LoRA dropout")
    dora: bool = HfArg(default=False, help="train DoRA adapters")
    rslora: bool = HfArg(default=False, help="scale the adapters as rsLoRA does")
    last_layers: int | None = HfArg(default=None, help="adapt this number of last layers only (all)")
    train_decoder: Literal["full", "lora", "none"] = HfArg(
        default="full", help="what to train of the mask decoder: all weights, adapters, or nothing"
    )
    load_in_4bit: bool = HfArg(default=False, help="quantize the base to 4 bits, with bitsandbytes")
    cache_embeddings: Path | None = HfArg(
        default=None,
        help="folder for the encoder's outputs, with --method decoder: the encoder runs once for each image, and "
        "images are not augmented",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "rank", most=MOST_RANK)
        require_at_least(1, self, "image_size", most=MOST_IMAGE_SIDE)
        require_above_0(self, "alpha")
        require_share(self, "dropout")
        of_adapters = ("target", "rank", "alpha", "dropout", "dora", "rslora", "last_layers", "load_in_4bit")
        changed = [option(self, name) for name in of_adapters if getattr(self, name) != default_of(self, name)]
        if self.method != "lora" and changed:
            raise SettingsError(f"--method {self.method} trains no adapters, so expected no {', '.join(changed)}.")
        if self.method == "decoder" and self.train_decoder == "none":
            raise SettingsError("--method decoder and --train-decoder none: nothing would be trained.")
        if self.cache_embeddings and self.method != "decoder":
            raise SettingsError(
                f"--cache-embeddings and --method {self.method}: expected --method decoder, which leaves the encoder "
                "as it is."
            )
        if self.method != "lora" and self.train_decoder == "lora":
            raise SettingsError(f"--method {self.method} adds no adapters: expected --train-decoder full or none.")


@dataclass
class OutputSettings:
    """What is done with an earlier run, and with the result."""

    _argument_group_name: ClassVar[str] = "output"

    check: bool = HfArg(default=False, help="read the data, draw some of it as data.png, and stop")
    preset: Literal["8gb", "16gb", "24gb", "cpu"] | None = HfArg(
        default=None, help="batch size and memory savings for a GPU of this memory, or for a CPU"
    )
    resume: bool = HfArg(default=False, help="continue from the last checkpoint in --output")
    force: bool = HfArg(default=False, help="replace what an earlier run left in --output")
    export: list[str] = HfArg(
        default_factory=list,
        help="whole models to write, too: the split model (merged), a stock SAM (stock)",
        metadata={"choices": ("merged", "stock")},
    )
    license: str | None = HfArg(default=None, help="licence of the base's weights, if its card names none")
    license_name: str | None = HfArg(default=None, help="name of the licence, for --license other")
    license_link: str | None = HfArg(
        default=None, help="URL of the licence's text, or the name of a file beside the base"
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
        SettingsError: If the best weights are to be selected by something that is not validated, images are to be
            both augmented and encoded once, or a run is to be resumed from weights alone.
    """

    data: DataSettings
    prompts: PromptSettings
    model: ModelSettings
    training: TrainingSettings
    output: OutputSettings
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.model.cache_embeddings and self.data.augment != ["none"]:
            raise SettingsError(
                f"--cache-embeddings and --augment {' '.join(self.data.augment)}: expected --augment none, as each "
                "image is encoded once."
            )
        if self.output.resume and self.training.save_only_model:
            raise SettingsError(
                "--resume and --save-only-model: the checkpoints hold no optimizer, without which the result would be "
                "another: start again with --force."
            )
        validated = self.prompts.prompting().validated
        metrics = ("iou", *(f"iou_{kind}" for kind in validated), AUTOMATIC, "loss", *OTHER_METRICS)
        if self.training.metric_for_best_model not in metrics:
            raise SettingsError(
                f"--select {self.training.metric_for_best_model}: expected one of {', '.join(metrics)}."
            )

    @property
    def folder(self) -> Path:
        """The folder for all results."""
        return Path(self.training.output_dir)
