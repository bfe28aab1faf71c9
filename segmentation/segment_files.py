"""What `segment.py` does: finds the model and its settings, the images and the prompts, and writes the results."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, SamProcessor, pipeline

from checkpoint_tools.checkout import SAM_TINY
from checkpoint_tools.output_folders import require_replaceable, staged
from image_data.images import IMAGE_SUFFIXES, MASK_SUFFIXES, read_image
from image_data.patterns import files_in
from image_data.pillow_images import DataError, number_of

from .adapted_model import DEVICE, load_adapted, load_base
from .automatic import AutomaticSegments
from .predictor import Predictor
from .prompt_files import coco_boxes, rough_masks
from .result_files import Annotations, SegmentedImage, write_pictures
from .segmenter import ImageSegmenter, PromptedObject, check_prompts
from .segments import Segment, by_area, segment_of
from .settings import SegmentationSettings


OUTPUT = "segmented images"  # the kind of output


@dataclass(frozen=True)
class SegmentationRequest:
    """What is to be segmented, and how.

    Args:
        paths: Image files, and folders of them.
        objects: Prompts, for one image.
        coco: COCO file with boxes, and categories, as prompts.
        masks: Label image or folder of them, of rough masks to be refined.
        everything: Whether to find all objects.
        stock: Whether to find them with the mask-generation pipeline of transformers.
        table: Whether to write a CSV file, too.
        output: Folder for the results.
        force: Whether to replace what an earlier run wrote there.
        base: Folder or Hub id of a SAM v1; None for that of the adapter, or sam-tiny.
        revision: Of the base, on the Hub.
        adapter: Folder or Hub id of an adapter.
        changes: Settings to use instead of those that came with the model; None where there is no change.
    """

    paths: Sequence[Path]
    objects: Sequence[PromptedObject] = ()
    coco: Path | None = None
    masks: Path | None = None
    everything: bool = False
    stock: bool = False
    table: bool = False
    output: Path = Path("build/segment")
    force: bool = False
    base: str | None = None
    revision: str | None = None
    adapter: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def segment_files(request: SegmentationRequest) -> None:
    """Segments all images, writes the results, and prints what was found and where it is.

    Raises:
        ValueError: If the prompts, the settings or the model do not fit, or no image could be segmented; then nothing
            is written. If some images could not be segmented; then the results of the others are written.
        FileExistsError: If the output folder is in use.
    """
    SegmentationSettings().but(**request.changes)  # raises an error if a change is out of range
    sources = [*request.paths, request.coco, request.masks, request.base, request.adapter]
    require_replaceable(request.output, OUTPUT, request.force, sources)
    images = find_images(request.paths)
    if request.objects and len(images) > 1:
        raise ValueError(
            f"--point and --box are for one image, got {len(images)}: give one, or the boxes of all with --coco."
        )
    if request.masks and request.masks.is_file() and len(images) > 1:
        raise ValueError(f"--masks {request.masks} is for one image, got {len(images)}: give a folder of masks.")
    boxes = coco_boxes(request.coco, images) if request.coco else {}
    model, processor = load(request.base, request.revision, request.adapter, request.changes.get("image_size"))
    settings = SegmentationSettings.load(request.adapter or request.base or SAM_TINY).but(**request.changes)
    if request.objects:
        check_prompts(request.objects, read_image(next(iter(images.values())), settings.reading).shape[:2])
    predictor = Predictor(model, processor)

    annotations, problems = Annotations(), []
    with staged(request.output, OUTPUT, request.force, sources) as folder:
        for name, path in images.items():
            try:
                image = read_image(path, settings.reading)
                objects = [*request.objects, *boxes.get(name, ())]
                if request.masks:
                    objects += rough_masks(mask_file(request.masks, name), image.shape[:2])
                check_prompts(objects, image.shape[:2])
                segmenter = ImageSegmenter(predictor, image, settings)
                if request.everything:
                    segments = find_everything(segmenter, path, request)
                else:
                    segments = segmenter.prompted(objects)
                result = SegmentedImage(name, image, segments, objects)
            except ValueError as error:
                problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
                continue
            pictures = [request.output / picture.relative_to(folder) for picture in write_pictures(result, folder)]
            print(f"{path}: {number_of(annotations.add(result), 'object')}: {', '.join(map(str, pictures))}")
        if not annotations.images:
            raise DataError(problems)
        annotations.write(folder, with_table=request.table)
    total = f"{number_of(len(annotations.annotations), 'object')} in {number_of(len(annotations.images), 'image')}"
    print(f"{total}: {request.output}")
    if problems:
        raise DataError(problems)


def find_everything(segmenter: ImageSegmenter, path: Path, request: SegmentationRequest) -> list[Segment]:
    """Returns all objects of an image, the smallest last, and says why if there are none."""
    result = stock_segments(segmenter) if request.stock else segmenter.everything()
    if not result.segments:
        print(f"{path}: {nothing_found(result, segmenter.settings)}")
    return by_area(result.segments)


def load(
    base: str | None, revision: str | None, adapter: str | None, image_size: int | None = None
) -> tuple[PreTrainedModel, SamProcessor]:
    """Returns the model, with the adapter merged, and its processor. The default base is the adapter's, or sam-tiny.

    Raises:
        ModelError: If there is none.
    """
    if adapter:
        adapted, processor = load_adapted(adapter, base, revision, image_size)
        model = adapted.merge_and_unload()
    else:
        model, processor = load_base(base or str(SAM_TINY), revision, image_size=image_size)
    return model.eval().to(DEVICE), processor


def find_images(paths: Iterable[Path]) -> dict[str, Path]:
    """Returns image files, and those in folders and their sub-folders, by the name that their results will have.

    Raises:
        ValueError: If there is none, or two results would have the same name.
    """
    images: dict[str, Path] = {}
    stems: dict[str, Path] = {}
    for given in paths:
        files = [given]
        if given.is_dir():
            files = [path for path in files_in(given) if path.suffix.lower() in IMAGE_SUFFIXES]
            if not files:
                raise ValueError(f"{given}: no images in this folder ({', '.join(IMAGE_SUFFIXES)}).")
        for path in files:
            name = (path.relative_to(given) if given.is_dir() else Path(path.name)).as_posix()
            other = stems.setdefault(name.removesuffix(path.suffix), path)
            if other != path:
                raise ValueError(
                    f"{path}: has the same name as {other}: rename one, or segment them into two --output folders."
                )
            images[name] = path
    return images


def mask_file(masks: Path, image: str) -> Path:
    """Returns the label image of an image, whose name has the folders that it is in, as those of masks to train on.

    Raises:
        ValueError: If there is none.
    """
    if masks.is_file():
        return masks
    stem = image.removesuffix(Path(image).suffix)
    for suffix in MASK_SUFFIXES:
        if (path := masks / f"{stem}{suffix}").is_file():
            return path
    raise ValueError(f"no label image {stem} in {masks} ({', '.join(MASK_SUFFIXES)}).")


def nothing_found(result: AutomaticSegments, settings: SegmentationSettings) -> str:
    """Says why nothing was found, and what to do."""
    if result.best_rating < settings.min_iou:
        reason = f"no mask is rated --min-iou {settings.min_iou:g} or more; the best is {result.best_rating:.2f}"
    elif result.best_stability >= settings.min_stability:
        return "0 objects: all masks are smaller than a pixel. A larger --grid, or a larger image, may find some."
    else:
        reason = (
            f"no mask that is rated enough is as stable as --min-stability {settings.min_stability:g}; the best is "
            f"{result.best_stability:.2f}"
        )
    return f"0 objects: {reason}. Give lower thresholds, or an adapter that brings its own."


def stock_segments(segmenter: ImageSegmenter) -> AutomaticSegments:
    """Returns what the mask-generation pipeline of transformers finds with stock SAM, without tiles.

    It does not tell what it leaves out: the best rating is that of the masks it finds.
    """
    model, settings = segmenter.predictor.model, segmenter.settings
    # Use stock SAM, because the pipeline logs an error for unknown classes.
    generate = pipeline(
        "mask-generation",
        model=model.to_sam().eval(),
        image_processor=segmenter.predictor.processor.image_processor,
        device=DEVICE,
    )
    limits = {"pred_iou_thresh": settings.min_iou, "stability_score_thresh": settings.min_stability}
    result = generate(Image.fromarray(segmenter.image), points_per_batch=64, points_per_crop=settings.grid, **limits)
    ratings = [float(score) for score in result["scores"]]
    segments = [
        segment_of(np.asarray(mask, dtype=bool), rating) for mask, rating in zip(result["masks"], ratings, strict=True)
    ]
    return AutomaticSegments(segments, max(ratings, default=0.0), 0.0)
