"""Times finding all objects: `segmentation.automatic` against the mask-generation pipeline of transformers.

python -m benchmarks.automatic [--base checkpoints/sam-tiny --min-iou 0.5 --min-stability 0.7]

Needs torchvision, which the pipeline's last step uses.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import is_torchvision_available

from checkpoint_tools.checkout import SAM_TINY
from image_data.images import read_image
from image_data.sources import Coins
from segmentation.adapted_model import load_base
from segmentation.automatic import automatic_segments
from segmentation.predictor import Predictor
from segmentation.settings import SegmentationSettings


def main() -> None:
    args = parse_args()
    model, processor = load_base(args.base)
    model = model.eval()
    image = read_image(args.image) if args.image else Coins().read().image
    settings = SegmentationSettings(min_iou=args.min_iou, min_stability=args.min_stability)
    generate = pipeline("mask-generation", model=model.to_sam().eval(), image_processor=processor.image_processor)
    thresholds = {"pred_iou_thresh": args.min_iou, "stability_score_thresh": args.min_stability}
    picture, predictor = Image.fromarray(image), Predictor(model, processor)

    def encode() -> list[np.ndarray]:
        predictor.encode(image)
        return []

    def pipeline_masks() -> list:
        return generate(picture, points_per_batch=64, points_per_crop=settings.grid, **thresholds)["masks"]

    ways: dict[str, Callable[[], list]] = {
        "pipeline": pipeline_masks,
        "ours": lambda: automatic_segments(predictor, predictor.encode(image), settings).segments,
        "encoder alone": encode,
    }
    size = f"{image.shape[1]} x {image.shape[0]} pixels"
    print(f"{size}, {torch.get_num_threads()} threads; the fastest of {args.repeats}")
    print("| | seconds | masks |\n|---|---|---|")
    for name, way in ways.items():
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            masks = way()
            seconds.append(time.perf_counter() - start)
        print(f"| {name} | {min(seconds):.2f} | {len(masks) or ''} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.automatic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", default=str(SAM_TINY), help="folder or Hub id of a SAM v1")
    parser.add_argument("--image", type=Path, help="an image file (default: the coins)")
    parser.add_argument("--min-iou", type=float, default=0.5, help="lowest predicted IoU")
    parser.add_argument("--min-stability", type=float, default=0.7, help="lowest stability score")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not is_torchvision_available():
        parser.error("the pipeline needs torchvision.")
    return args


if __name__ == "__main__":
    main()
