"""What `evaluate.py` does: finds the model and its settings, and the images, and writes and prints the results."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import SamProcessor

from checkpoint_tools.checkout import SAM_TINY
from checkpoint_tools.option_checks import SettingsError, require_at_least
from checkpoint_tools.output_folders import require_replaceable, staged
from image_data.data_settings import DataSettings
from image_data.layouts import name_of, read_data, read_sources
from image_data.pillow_images import DataError, ImageReading, number_of
from image_data.samples import Sample, areas_of, checked
from segmentation.adapted_model import DEVICE, load_adapted, load_base
from segmentation.predictor import Predictor
from segmentation.settings import SegmentationSettings

from .report import class_table, push_to_card, table, write_results
from .scoring import (
    AUTOMATIC,
    MODES,
    EvaluationImage,
    Scores,
    class_summary,
    evaluate_images,
    evaluation_image,
    summary,
    without_adapter,
)


OUTPUT = "evaluation"  # the kind of output
HELD_OUT_ONLY = (
    "validation",
    "validation_images",
    "validation_masks",
    "validation_coco",
    "validation_split",
    "group_pattern",
    "group_column",
)
MOST_CLICKS = 1000
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated, and how.

    Args:
        data: Labelled images. How their files become colours is among `changes`, or came with the model.
        held_out: Whether to evaluate on what the recipe holds out for validation only, as the data settings divide it.
        seed: Of the run that held it out; None for 0, its default.
        adapter: Folder or Hub id of an adapter.
        model: Folder or Hub id of a whole model, instead of an adapter.
        base: Folder or Hub id of the model before; None for that of the adapter.
        revision: Of the base, on the Hub.
        modes: Of `MODES`.
        clicks: Most clicks on an object.
        output: Folder for the results.
        force: Whether to replace what an earlier run wrote there.
        push: Whether to write the results into the adapter's card on the Hub.
        changes: Settings to use instead of those that came with the model; None where there is no change.
    """

    data: DataSettings
    held_out: bool = False
    seed: int | None = None
    adapter: str | None = None
    model: str | None = None
    base: str | None = None
    revision: str | None = None
    modes: Sequence[str] = MODES
    clicks: int = 8
    output: Path = Path("build/evaluate")
    force: bool = False
    push: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.push and (not self.trained or Path(self.trained).exists()):
            raise SettingsError(
                "--push: expected --adapter or --model with the Hub id of a repo that you may write to."
            )
        require_at_least(1, self, "clicks", most=MOST_CLICKS)
        require_at_least(0, self, "seed", most=2**32 - 1)
        if not self.held_out:
            if self.seed is not None:
                raise SettingsError("--seed: expected --held-out, too.")
            for name in HELD_OUT_ONLY:
                if getattr(self.data, name):
                    raise SettingsError(f"--{name.replace('_', '-')}: expected --held-out, too.")

    @property
    def trained(self) -> str | None:
        """Folder or Hub id of what was fine-tuned."""
        return self.adapter or self.model


def evaluate(request: EvaluationRequest) -> dict[str, dict[str, Any]]:
    """Evaluates what the request names, prints the tables, writes all results, and returns the metrics by model.

    Raises:
        ValueError: If data, model or settings do not fit; then nothing is written.
        FileExistsError: If the output folder is in use.
    """
    sources = [*request.data.paths, request.base, request.trained]
    require_replaceable(request.output, OUTPUT, request.force, sources)
    settings = SegmentationSettings.load(request.trained or request.base or SAM_TINY).but(**request.changes)
    images, about_data = read_images(request, settings.reading)
    number = sum(len(image.objects) for image in images)
    print(f"{about_data}: {number_of(number, 'object')} in {number_of(len(images), 'image')}.", flush=True)
    scores = score(request, images, settings)
    summaries = {title: summary(each, images) for title, each in scores.items()}
    classes = {title: class_summary(each, images) for title, each in scores.items()}
    facts = {"data": about_data, "images": len(images), "objects": number, "model": request.trained or request.base}
    with staged(request.output, OUTPUT, request.force, sources) as folder:
        write_results(folder, facts, images, scores, summaries, classes)
    text = "\n\n".join(part for part in (table(summaries), class_table(classes), notes(request, settings)) if part)
    print(f"{text}\n\nTables and pictures: {request.output}")
    if request.push:
        print(f"Card: {push_to_card(str(request.trained), about_data, summaries, text)}")
    return summaries


def read_images(request: EvaluationRequest, reading: ImageReading) -> tuple[list[EvaluationImage], str]:
    """Returns the images, whose files are read as `reading` says, and what they are.

    Raises:
        DataError: With every problem of every image, or if there are no objects.
    """
    data = replace(
        request.data,
        channels=list(reading.channels or ()),
        pages=reading.pages,
        intensity=reading.intensity.split(),
        max_pixels=reading.max_pixels,
    )
    if request.held_out or not (data.images or data.dataset):
        parts, about_data = read_data(replace(data, tile=None, min_area=0), mask_side=1024, seed=request.seed or 0)
        return [evaluation_image(sample) for sample in parts.validation], f"{about_data}, the part held out"
    samples, problems = [], []
    for source in read_sources(data).sources:
        try:
            whole = checked(source)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        height, width = whole.image.shape[:2]
        ids, _ = areas_of(whole.labels)
        samples.append(Sample(source, (slice(0, height), slice(0, width)), ids, whole.categories))
    images = [] if problems else [evaluation_image(sample) for sample in samples]
    if problems or not any(image.objects for image in images):
        raise DataError(problems or [f"{name_of(data)}: the images show no labelled object."])
    return images, f"{number_of(len(images), 'image')} from {name_of(data)}"


def score(
    request: EvaluationRequest, images: Sequence[EvaluationImage], settings: SegmentationSettings
) -> dict[str, Scores]:
    """Returns what the model reaches before and, with these settings, after, as far as there are both."""
    image_size = request.changes.get("image_size")
    models: dict[str, tuple[Any, SamProcessor]] = {}
    if request.adapter:
        models[AFTER] = load_adapted(request.adapter, request.base, request.revision, image_size)
        models = {BEFORE: models[AFTER], **models}
    else:
        if request.base or not request.model:
            base = request.base or str(SAM_TINY)
            models[BEFORE] = load_base(base, request.revision, image_size=image_size)
        if request.model:
            models[AFTER] = load_base(request.model, image_size=image_size)
    scores = {}
    for title, (model, processor) in models.items():
        predictor = Predictor(model.eval().to(DEVICE), processor)
        used = settings if title == AFTER else base_settings(settings, request.changes)
        with without_adapter(model) if title == BEFORE else nullcontext():
            scores[title] = evaluate_images(predictor, images, used, request.modes, request.clicks)
    return scores


def base_settings(settings: SegmentationSettings, changes: dict[str, Any]) -> SegmentationSettings:
    """Returns the settings for the model before: SAM's own thresholds, unless others are given."""
    own = SegmentationSettings()
    return replace(settings, min_iou=own.min_iou, min_stability=own.min_stability).but(**changes)


def notes(request: EvaluationRequest, settings: SegmentationSettings) -> str:
    """Says with which settings all that was measured."""
    if AUTOMATIC not in request.modes:
        return ""
    before = base_settings(settings, request.changes)
    thresholds = [f"{each.min_iou:g} and {each.min_stability:g}" for each in (before, settings)]
    if not request.trained:
        return f"Automatic masks have a predicted IoU and a stability of at least {thresholds[0]}."
    return (
        f"Automatic masks have a predicted IoU and a stability of at least {thresholds[1]}; before, {thresholds[0]}."
    )
