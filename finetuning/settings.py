"""The settings of the recipe, with their defaults."""

from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.staging import SAM_TINY

from .prompts import KINDS


METHODS = ("lora", "full", "decoder")
AUGMENTATIONS = ("none", "crop", "turn")
LOSSES = ("cross-entropy", "focal")
EXPORTS = ("merged", "stock")


class SettingsError(ValueError):
    """Settings that are out of range or contradict each other."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run. The options of `finetune.py` have the same names.

    Args:
        images: Folder of PNG, JPEG or TIFF images; None for a photograph of coins.
        masks: Folder of PNG or TIFF label images, named as the images.
        coco: COCO annotations of the images, instead of masks.
        validation: Share to validate on; None for 0.2 of the images, or 0.5 of one image.
        tile: Cuts images into tiles of so many pixels.
        overlap: Share of a tile that the next one shows too.
        min_area: Pixels of the model's masks to count as an object.
        augment: One of `AUGMENTATIONS`; `crop` also mirrors, `turn` turns as well.
        workers: Processes that prepare the data.
        prompt: One of `prompts.KINDS`.
        points: Points in each object.
        negative_points: Points beside each object.
        objects: Objects of an image in a training step.
        multimask: Predicts three masks per prompt, and trains the best.
        base: Folder or Hub id of a SAM v1, stock or split.
        revision: Of the base, on the Hub.
        method: One of `METHODS`: adapters, all weights of the vision encoder, or those of the mask decoder alone.
        target: Linears of the vision layers to adapt.
        rank: LoRA rank.
        alpha: LoRA alpha.
        dropout: LoRA dropout.
        dora: Whether the adapters are DoRA.
        rslora: Whether their scaling is that of rsLoRA.
        last_layers: Adapts only so many of the last layers.
        train_decoder: `full` or `lora` to train the mask decoder too.
        load_in_4bit: Quantizes the base.
        steps: Optimizer steps.
        minutes: Stops training then, whatever the step.
        batch_size: Images of a step, in each process.
        accumulate: Batches of a step.
        learning_rate: Peak learning rate.
        loss: One of `LOSSES`, beside dice.
        eval_every: Steps from one validation and checkpoint to the next.
        patience: Validations without improvement before training stops.
        gradient_checkpointing: Computes activations again in backward.
        bf16: Trains in bfloat16 autocast.
        seed: Random seed.
        resume: Goes on from the last checkpoint in `output`.
        output: Folder for all results.
        force: Replaces what an earlier run left in `output`.
        export: Whole models to write, of `EXPORTS`.
        push_to_hub: USER/NAME of the model repo to upload to.

    Raises:
        SettingsError: If a setting is out of range, or two contradict each other.
    """

    images: Path | None = None
    masks: Path | None = None
    coco: Path | None = None
    validation: float | None = None
    tile: int | None = None
    overlap: float = 0.25
    min_area: int = 4
    augment: str = "turn"
    workers: int = 0

    prompt: str = "point"
    points: int = 1
    negative_points: int = 0
    objects: int = 6
    multimask: bool = False

    base: str = str(SAM_TINY)
    revision: str | None = None
    method: str = "lora"
    target: tuple[str, ...] = ("q", "v")
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.1
    dora: bool = False
    rslora: bool = False
    last_layers: int | None = None
    train_decoder: str | None = None
    load_in_4bit: bool = False

    steps: int = 300
    minutes: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    loss: str = "cross-entropy"
    eval_every: int = 50
    patience: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 0
    resume: bool = False

    output: Path = Path("build/finetune")
    force: bool = False
    export: tuple[str, ...] = ()
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        if self.coco and self.masks:
            raise SettingsError("--masks and --coco are both given: expected one of them.")
        if bool(self.images) != bool(self.coco or self.masks):
            raise SettingsError("expected --images together with --masks or --coco, or none of them for the coins.")
        if self.validation is not None and not 0 < self.validation < 1:
            raise SettingsError(f"--validation {self.validation}: expected a share between 0 and 1.")
        if not 0 <= self.overlap < 1:
            raise SettingsError(f"--overlap {self.overlap}: expected a share from 0 to less than 1.")
        for name in (
            "tile",
            "points",
            "objects",
            "rank",
            "steps",
            "batch_size",
            "accumulate",
            "eval_every",
            "patience",
        ):
            self._require_at_least(1, name)
        for name in ("negative_points", "min_area", "workers", "dropout"):
            self._require_at_least(0, name)
        if self.method != "lora" and (self.load_in_4bit or self.last_layers or self.dora or self.rslora):
            raise SettingsError(
                f"--method {self.method} trains no adapters: --load-in-4bit, --last-layers, --dora and --rslora "
                "do not apply."
            )
        if self.method != "lora" and self.train_decoder == "lora":
            raise SettingsError(f"--method {self.method} adds no adapters: expected --train-decoder full.")
        for name, choices in (
            ("prompt", tuple(KINDS)),
            ("augment", AUGMENTATIONS),
            ("method", METHODS),
            ("loss", LOSSES),
            ("train_decoder", (None, "full", "lora")),
        ):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{option(name)} {getattr(self, name)}: expected one of {choices}.")

    def _require_at_least(self, least: int, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise SettingsError(f"{option(name)} {value}: expected {least} or more.")


def option(name: str) -> str:
    """Returns the option of the command line that sets the field `name`."""
    return f"--{name.replace('_', '-')}"
