"""Segments an image: what points or boxes ask for, or everything.

python examples/segment.py photo.png --point 120 80 --point 40 60 --output build/photo
python examples/segment.py photo.png --box 10 20 200 180 --adapter build/finetune/adapter
python examples/segment.py photo.png --everything --base build/finetune/merged
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from adapted_model import UnusableModel, load_base, load_trained
from images_and_masks import read_image
from pictures import overlay
from PIL import Image
from transformers import PreTrainedModel, SamProcessor, pipeline
from transformers.utils import is_torchvision_available

from staging import ROOT


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        image = read_image(args.image)
        check_prompts(args, image)
        model, processor = load(args)
    except (UnusableModel, ValueError) as error:
        sys.exit(str(error))
    if args.everything:
        masks = everything(model, processor, image, args.grid, args.min_iou, args.min_stability)
    else:
        masks = prompted(model, processor, image, args.point, args.box, args.multimask)
    overlay_path, labels_path = (
        args.output.with_name(f"{args.output.name}-{kind}.png") for kind in ("masks", "labels")
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(overlay(image, masks)).save(overlay_path)
    Image.fromarray(as_labels(masks)).save(labels_path)
    print(f"{len(masks)} objects: {overlay_path}, {labels_path}")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="PNG, JPEG or TIFF")
    for name, numbers, text in (
        ("--point", ("X", "Y"), "in an object; again for the next one"),
        ("--box", ("LEFT", "TOP", "RIGHT", "BOTTOM"), "around an object; again for the next one"),
    ):
        parser.add_argument(
            name, nargs=len(numbers), type=float, action="append", default=[], metavar=numbers, help=text
        )
    parser.add_argument("--everything", action="store_true", help="all objects, found from a grid of points")
    parser.add_argument("--grid", type=int, default=32, help="points along a side of it")
    parser.add_argument("--min-iou", type=float, default=0.88, help="that the model must expect of a mask")
    parser.add_argument("--min-stability", type=float, default=0.95, help="of a mask, if its threshold is shifted")
    parser.add_argument("--multimask", action="store_true", help="choose among three masks per prompt")
    parser.add_argument("--base", help="folder or Hub id of a SAM v1 (default: that of the adapter, or sam-tiny)")
    parser.add_argument("--revision", help="of the base, on the Hub")
    parser.add_argument("--adapter", help="folder or Hub id of an adapter")
    parser.add_argument("--output", type=Path, default=Path("build/segment"), help="beginning of the files' names")
    args = parser.parse_args(arguments)
    if args.everything == bool(args.point or args.box):
        parser.error("expected --point or --box, or else --everything.")
    if args.point and args.box:
        parser.error("--point and --box are both given: expected one kind of prompt.")
    if args.everything and not is_torchvision_available():
        parser.error("--everything drops duplicate masks with torchvision: pip install torchvision.")
    return args


def check_prompts(args: argparse.Namespace, image: np.ndarray) -> None:
    """Finds prompts that mean nothing.

    Raises:
        ValueError: If there are any.
    """
    height, width = image.shape[:2]
    for x, y in (*args.point, *(box[:2] for box in args.box), *(box[2:] for box in args.box)):
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"({x:g}, {y:g}) is outside of the image of {width} x {height} pixels.")
    for left, top, right, bottom in args.box:
        if left >= right or top >= bottom:
            raise ValueError(f"--box {left:g} {top:g} {right:g} {bottom:g}: expected left < right and top < bottom.")


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, SamProcessor]:
    """Returns the model, with the adapter merged, and its processor."""
    if args.adapter:
        model, processor = load_trained(args.adapter, args.base, args.revision)
    else:
        model, processor = load_base(args.base or str(ROOT / "checkpoints" / "sam-tiny"), args.revision)
    return model.eval().to(DEVICE), processor


@torch.no_grad()
def prompted(
    model: PreTrainedModel,
    processor: SamProcessor,
    image: np.ndarray,
    points: list[list[float]],
    boxes: list[list[float]],
    multimask: bool,
) -> np.ndarray:
    """Returns a mask for each point or box (objects, H, W), the one of several that the model rates best."""
    prompts = {"input_boxes": [boxes]} if boxes else {"input_points": [[[point] for point in points]]}
    inputs = processor(images=[image], return_tensors="pt", **prompts)
    names = [name for name in ("pixel_values", "input_points", "input_boxes") if name in inputs]
    outputs = model(**{name: inputs[name].float().to(DEVICE) for name in names}, multimask_output=multimask)
    best = outputs.iou_scores.argmax(-1)[..., None, None, None]
    (masks,) = processor.post_process_masks(
        outputs.pred_masks.take_along_dim(best, 2).cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    return masks[:, 0].numpy()


def everything(
    model: PreTrainedModel,
    processor: SamProcessor,
    image: np.ndarray,
    grid: int,
    min_iou: float,
    min_stability: float,
) -> np.ndarray:
    """Returns the masks of all objects that the model is sure of (objects, H, W), the largest first."""
    # As stock SAM: the pipeline logs an error for classes that it does not know.
    generate = pipeline(
        "mask-generation", model=model.to_sam().eval(), image_processor=processor.image_processor, device=DEVICE
    )
    limits = {"pred_iou_thresh": min_iou, "stability_score_thresh": min_stability}
    found = generate(Image.fromarray(image), points_per_batch=64, points_per_crop=grid, **limits)["masks"]
    masks = np.array([np.asarray(mask) for mask in found], dtype=bool).reshape(-1, *image.shape[:2])
    return masks[np.argsort(-masks.sum((1, 2)))]


def as_labels(masks: np.ndarray) -> np.ndarray:
    """Numbers the masks from 1 in one image (H, W); where they overlap, the last is in front."""
    labels = np.zeros(masks.shape[1:], dtype=np.uint16)
    for number, mask in enumerate(masks, start=1):
        labels[mask] = number
    return labels


if __name__ == "__main__":
    main()
