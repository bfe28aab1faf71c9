"""Makes a stock SAM LoRA-ready, fine-tunes it on half of the coins of a photograph, and hands back stock SAM.

python demo.py [--base checkpoints/sam-tiny]
"""

import argparse
import sys
import time
from pathlib import Path

import huggingface_hub
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from peft import LoraConfig, get_peft_model
from scipy import ndimage
from skimage import data, filters, measure, morphology, segmentation
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedModel, SamModel, SamProcessor, set_seed

from staging import ROOT, split_class


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    args = parse_args()
    huggingface_hub.logging.set_verbosity_error()  # else every retry without a network is told
    set_seed(0)
    image, labels = coins()
    middle = image.shape[1] // 2
    labels[np.isin(labels, labels[:, middle])] = 0  # what both halves show would leak from one to the other
    train_half = image[:, :middle], labels[:, :middle]
    test_half = image[:, middle:], labels[:, middle:]
    num_train, num_test = (len(object_ids(half)) for _, half in (train_half, test_half))
    print(f"A photograph of coins: {num_train} to learn from, {num_test} to test on.")

    stock = load_stock(args.base)
    processor = AutoProcessor.from_pretrained(args.base)
    repo = args.output / "sam-split"
    split_class().from_pretrained(args.base).save_pretrained(repo)
    processor.save_pretrained(repo)
    print(f"Laid out a model repo from {args.base} in {repo}.")

    model = AutoModel.from_pretrained(repo, trust_remote_code=True).to(DEVICE)
    before, iou_before = segment(model, processor, *test_half)
    error = difference(model, stock, processor, image)
    print(f"The split model against stock: mask logits differ by {error:.1e} at most.")

    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.1, task_type="FEATURE_EXTRACTION"),
    )
    model.print_trainable_parameters()
    train(model, processor, *train_half, steps=args.steps, seconds=60 * args.minutes)
    model.save_pretrained(args.output / "adapter")

    merged = model.merge_and_unload()
    after, iou_after = segment(merged, processor, *test_half)
    print(f"Mean IoU on the right half, from one point a coin: {iou_before:.3f} before, {iou_after:.3f} after.")

    merged.to_sam().save_pretrained(args.output / "sam-tuned")
    back = SamModel.from_pretrained(args.output / "sam-tuned").to(DEVICE)
    masks, _ = segment(back, processor, *test_half)
    error = difference(merged, back, processor, image)
    same = "the same masks" if np.array_equal(masks, after) else "OTHER MASKS"
    print(f"Back in stock SamModel ({args.output / 'sam-tuned'}): {same}, logits differ by {error:.1e} at most.")
    print(f"Picture: {draw(*test_half, {'before': before, 'after': after}, args.output / 'coins.png')}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(ROOT / "checkpoints" / "sam-tiny"), help="folder or Hub id of a SAM v1")
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=5, help="stop training then, whatever the step")
    return parser.parse_args()


def load_stock(base: str) -> SamModel:
    try:
        if not Path(base).is_dir():
            hf_hub_download(base, "config.json")
        return SamModel.from_pretrained(base).eval().to(DEVICE)
    except OSError as error:
        sys.exit(f"{base} is not a folder with a SAM checkpoint, and the Hub gives none: {str(error).splitlines()[0]}")


def coins() -> tuple[np.ndarray, np.ndarray]:
    """The photograph (H, W, 3) uint8 and its coins' labels (H, W), 0 for background, by watershed
    (https://scikit-image.org/docs/0.26.x/auto_examples/applications/plot_coins_segmentation.html)."""
    image = data.coins()
    markers = np.zeros_like(image)
    markers[image < 30], markers[image > 150] = 1, 2
    filled = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
    labels = measure.label(morphology.remove_small_objects(filled, max_size=200))
    return np.stack([image] * 3, axis=-1), labels


def centres(labels: np.ndarray) -> list[list[float]]:
    """The point (x, y) of each object that lies deepest inside it."""
    points = []
    for label in object_ids(labels):
        depth = ndimage.distance_transform_edt(np.pad(labels == label, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        points.append([float(column), float(row)])
    return points


def object_ids(labels: np.ndarray, min_area: int = 100) -> np.ndarray:
    """The labels of the objects that show at least `min_area` pixels."""
    ids, areas = np.unique(labels[labels > 0], return_counts=True)
    return ids[areas >= min_area]


@torch.no_grad()
def segment(
    model: PreTrainedModel, processor: SamProcessor, image: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, float]:
    """Returns masks (objects, H, W) bool, each from the point at its centre, and their mean IoU with `labels`."""
    model.eval()
    points = [[[point] for point in centres(labels)]]
    inputs = processor(images=[image], input_points=points, return_tensors="pt").to(DEVICE, torch.float32)
    outputs = model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"], multimask_output=False)
    (masks,) = processor.post_process_masks(
        outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
    )
    masks = masks.squeeze(1).numpy()
    truth = labels == object_ids(labels)[:, None, None]
    iou = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
    return masks, float(iou.mean())


@torch.no_grad()
def difference(first: PreTrainedModel, second: PreTrainedModel, processor: SamProcessor, image: np.ndarray) -> float:
    points = [[[[image.shape[1] / 2, image.shape[0] / 2]]]]
    inputs = processor(images=[image], input_points=points, return_tensors="pt").to(DEVICE, torch.float32)
    inputs = {name: inputs[name] for name in ("pixel_values", "input_points")}
    return (first.eval()(**inputs).pred_masks - second.eval()(**inputs).pred_masks).abs().max().item()


def train(
    model: PreTrainedModel,
    processor: SamProcessor,
    image: np.ndarray,
    labels: np.ndarray,
    steps: int,
    seconds: float,
    batch_size: int = 4,
    num_points: int = 6,
) -> None:
    """Fits the trainable weights to `labels`, from random crops and one random point an object."""
    rng = np.random.default_rng(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    deadline = time.monotonic() + seconds
    progress = tqdm(range(steps), desc="Fine-tuning", unit="step")
    for _ in progress:
        crops = [random_crop(rng, image, labels, num_points) for _ in range(batch_size)]
        inputs = processor(
            images=[crop for crop, *_ in crops],
            segmentation_maps=[crop_labels for _, crop_labels, *_ in crops],
            input_points=[points for *_, points in crops],
            return_tensors="pt",
        ).to(DEVICE, torch.float32)
        ids = torch.tensor(np.stack([ids for _, _, ids, _ in crops]), device=DEVICE)
        targets = (inputs["labels"][:, None] == ids[:, :, None, None]).float().flatten(2)
        outputs = model(
            pixel_values=inputs["pixel_values"], input_points=inputs["input_points"], multimask_output=False
        )
        logits = outputs.pred_masks.flatten(2)
        probabilities = logits.sigmoid()
        dice = 1 - (2 * (probabilities * targets).sum(-1) + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)
        loss = F.binary_cross_entropy_with_logits(logits, targets) + dice.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if time.monotonic() > deadline:
            break


def random_crop(
    rng: np.random.Generator, image: np.ndarray, labels: np.ndarray, num_points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    """Returns a mirrored or turned crop of `image`, its labels, and `num_points` object labels each with a point."""
    while True:
        height, width = (int(side * rng.uniform(0.6, 1)) for side in labels.shape)
        top, left = (
            int(rng.integers(full - part + 1)) for full, part in zip(labels.shape, (height, width), strict=True)
        )
        window = np.s_[top : top + height, left : left + width]
        ids = object_ids(labels[window])
        if len(ids):
            break
    turns, mirror = int(rng.integers(4)), rng.choice([-1, 1])
    crop, crop_labels = (
        np.ascontiguousarray(np.rot90(array[window], turns)[:, ::mirror]) for array in (image, labels)
    )
    chosen = rng.choice(ids, num_points)
    points = []
    for label in chosen:
        rows, columns = np.nonzero(crop_labels == label)
        pick = rng.integers(len(rows))
        points.append([[float(columns[pick]), float(rows[pick])]])
    return crop, crop_labels, chosen, points


def draw(image: np.ndarray, labels: np.ndarray, masks: dict[str, np.ndarray], path: Path) -> Path:
    """Saves `image` with its prompts beside the `masks` of each name."""
    points = np.array(centres(labels))
    figure, axes = plt.subplots(1, 1 + len(masks), figsize=(4 * (1 + len(masks)), 6), layout="constrained")
    for axis, (title, found) in zip(axes, {"image and prompts": None, **masks}.items(), strict=True):
        axis.imshow(image)
        axis.plot(*points.T, "r*", markeredgecolor="white", markersize=10)
        for index, mask in enumerate(() if found is None else found):
            colour = plt.get_cmap("tab20")(index % 20)
            axis.imshow(np.where(mask[..., None], (*colour[:3], 0.6), 0))
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
