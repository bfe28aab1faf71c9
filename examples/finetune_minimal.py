"""LoRA fine-tuning of Segment Anything in one file: copy it into your own project, and change what you need.

Put images into one folder, and into another a label image of the same name for each: a PNG file with 0 for background
and another integer for each object. The model learns to find each object from one point in it.

pip install torch transformers peft numpy pillow
python finetune_minimal.py
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, SamProcessor


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def main(
    repo: str = "<user>/sam-vit-base-split",
    images: Path = Path("images"),
    masks: Path = Path("masks"),
    adapter: Path = Path("adapter"),
    steps: int = 500,
    objects_per_step: int = 8,
    learning_rate: float = 1e-3,
) -> tuple[float, float]:
    """Trains an adapter and saves it; returns the mean IoU on the training images before and after."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pairs = read_pairs(images, masks)
    processor = AutoProcessor.from_pretrained(repo)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True).to(DEVICE)
    before = mean_iou(model, processor, pairs)

    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.1, task_type="FEATURE_EXTRACTION"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(1, steps + 1):
        image, labels = pairs[rng.integers(len(pairs))]
        ids = rng.choice(object_ids(labels), objects_per_step)  # an object may come twice, with another point
        points = [random_point(labels == label, rng) for label in ids]
        logits, targets = predict(model, processor, image, labels, ids, points)
        loss = mask_loss(logits, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(adapter)

    model = AutoModel.from_pretrained(repo, trust_remote_code=True).to(DEVICE)
    model = PeftModel.from_pretrained(model, adapter)  # merge_and_unload() gives a model without PEFT
    after = mean_iou(model, processor, pairs)
    print(f"Mean IoU: {before:.3f} before, {after:.3f} after. For real use, validate on separate images.")
    return before, after


def read_pairs(images: Path, masks: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns images (H, W, 3) and their labels (H, W); images without objects are left out."""
    pairs = []
    for path in sorted(images.iterdir()):
        image = np.array(Image.open(path).convert("RGB"))
        labels = np.array(Image.open(masks / f"{path.stem}.png")).astype(np.int64)
        if labels.shape != image.shape[:2]:
            raise ValueError(f"{path}: expected a mask (H, W) of the image's size, got the shape {labels.shape}.")
        if labels.any():
            pairs.append((image, labels))
    return pairs


def object_ids(labels: np.ndarray) -> np.ndarray:
    """Returns the number of each object in `labels`."""
    return np.unique(labels[labels > 0])


def random_point(mask: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Returns a point (x, y) in `mask` (H, W)."""
    row, column = rng.choice(np.argwhere(mask))
    return [int(column), int(row)]


def predict(
    model: nn.Module,
    processor: SamProcessor,
    image: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    points: list[list[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mask logits and targets (objects, h, w) for one point in each of the objects `ids`.

    SAM predicts masks of a quarter of its input size. The image fills their top left part; the rest is padding.
    """
    inputs = processor(image, input_points=[[[point] for point in points]], return_tensors="pt")
    outputs = model(
        pixel_values=inputs["pixel_values"].to(DEVICE),
        input_points=inputs["input_points"].float().to(DEVICE),
        multimask_output=False,
    )
    logits = outputs.pred_masks[0, :, 0]
    height, width = (round(edge * logits.shape[-1] / max(labels.shape)) for edge in labels.shape)
    targets = torch.from_numpy(labels == ids[:, None, None]).float()
    targets = F.interpolate(targets[None], (height, width), mode="area")[0]
    return logits[:, :height, :width], (targets > 0.5).float().to(DEVICE)


def mask_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns dice loss plus binary cross-entropy, the mean over objects."""
    probabilities, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    overlap = (probabilities * targets).sum(-1)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits.flatten(1), targets)


@torch.no_grad()
def mean_iou(model: nn.Module, processor: SamProcessor, pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Returns the mean intersection over union of all objects, each from the same point every time."""
    model.eval()
    scores = []
    for image, labels in pairs:
        ids = object_ids(labels)
        points = [random_point(labels == label, np.random.default_rng(label)) for label in ids]
        logits, targets = predict(model, processor, image, labels, ids, points)
        masks, targets = logits > 0, targets > 0
        scores.append((masks & targets).sum((1, 2)) / (masks | targets).sum((1, 2)).clamp(min=1))
    return torch.cat(scores).mean().item()


if __name__ == "__main__":
    main()
