"""Trains `sam-tiny`, a small stock `SamModel` that really segments, from scratch on drawn scenes.

python -m pretraining.train_sam_tiny --output checkpoints/sam-tiny
python -m pretraining.train_sam_tiny --evaluate checkpoints/sam-tiny
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import SamConfig, SamModel, SamProcessor, get_cosine_schedule_with_warmup, set_seed

from checkpoint_tools.loading import processor_for
from segmentation.predicted_masks import best_rated, mask_iou

from .drawn_scenes import DrawnScenes


IMAGE_SIZE = 128
PATCH_SIZE = 8
MASK_SIZE = 4 * IMAGE_SIZE // PATCH_SIZE  # the mask decoder upscales the token grid four times
HELD_OUT_SEED = 2**31  # never used in training
LEVELS = (0.0, 0.5, 1.0)


def main() -> None:
    args = parse_args()
    processor = processor_for(build_config())
    if args.evaluate:
        print_scores(SamModel.from_pretrained(args.evaluate), processor)
        return
    set_seed(args.seed)
    model = build_model()
    scenes = DrawnScenes(
        args.steps * args.batch_size, args.seed, IMAGE_SIZE, args.prompts, ramp=args.ramp * args.batch_size
    )
    batches = DataLoader(scenes, args.batch_size, num_workers=args.workers, prefetch_factor=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.warmup, args.steps)

    progress = tqdm(batches, desc="train", unit="step", mininterval=10)
    average = None
    for step, batch in enumerate(progress, start=1):
        loss, iou = training_loss(model, processor, batch, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = iou if average is None else 0.99 * average + 0.01 * iou
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", iou=f"{average:.3f}")
        if step % args.save_every == 0 or step == args.steps:
            model.save_pretrained(args.output)
            processor.save_pretrained(args.output)
    print_scores(model, processor)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretraining.train_sam_tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help="where to save the trained model")
    action.add_argument("--evaluate", type=Path, help="print the scores of this checkpoint instead of training one")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch-size", type=int, default=8, help="scenes per step")
    parser.add_argument("--prompts", type=int, default=6, help="objects asked for per scene")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--ramp", type=int, default=1500, help="steps over which difficulty grows from 0 to 1")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def print_scores(model: SamModel, processor: SamProcessor) -> None:
    print(json.dumps({f"difficulty {level}": evaluate(model, processor, level) for level in LEVELS}, indent=2))


def build_config() -> SamConfig:
    return SamConfig(
        vision_config={
            "hidden_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "output_channels": 64,
            "num_pos_feats": 32,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "window_size": 8,
            "global_attn_indexes": [2, 5],
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 64, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        mask_decoder_config={
            "hidden_size": 64,
            "mlp_dim": 128,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 64,
        },
    )


def build_model() -> SamModel:
    model = SamModel(build_config())
    # transformers initialises this table with std hidden_size // 2, which turns positions into noise. The original is
    # a standard normal: https://github.com/facebookresearch/segment-anything/blob/6fdee8f2727f4506cfbbe553e23b895e27956588/segment_anything/modeling/prompt_encoder.py#L178
    with torch.no_grad():
        model.shared_image_embedding.positional_embedding.normal_()
    model.tie_weights()
    return model.train()


def pixel_values(processor: SamProcessor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalises and zero-pads a batch (B, 3, H, W) as the processor would, without leaving torch."""
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    pixels = (batch["image"].float() / 255 - mean) / std
    side = torch.arange(IMAGE_SIZE)
    height, width = batch["valid"][:, 0, None], batch["valid"][:, 1, None]
    return pixels * ((side < height)[:, None, :, None] & (side < width)[:, None, None, :])


def prompts(batch: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    if kind == "box":
        return {"input_boxes": batch["boxes"]}
    return {"input_points": batch["points"].unsqueeze(2)}


def training_loss(
    model: SamModel, processor: SamProcessor, batch: dict[str, torch.Tensor], step: int
) -> tuple[torch.Tensor, float]:
    """Cross-entropy + dice of the best returned mask, plus regression of the IoU head, as in Segment Anything
    (https://arxiv.org/abs/2304.02643, appendix A), alternating points and boxes, and one mask and three.

    Returns:
        The loss, a scalar tensor, and the mean IoU of the best masks, a float.
    """
    kind = "box" if step % 3 == 0 else "point"
    if kind == "box":  # real boxes are inexact
        boxes = batch["boxes"]
        sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        batch["boxes"] = (boxes + 0.05 * sides * torch.randn_like(boxes)).clamp(0, IMAGE_SIZE - 1)
    outputs = model(pixel_values(processor, batch), **prompts(batch, kind), multimask_output=step % 2 == 1)
    logits = outputs.pred_masks.flatten(-2)  # (B, P, M, pixels)
    target = F.avg_pool2d(batch["masks"].float(), IMAGE_SIZE // MASK_SIZE).flatten(-2).unsqueeze(2).expand_as(logits)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    dice = 1 - (2 * (probability * target).sum(-1) + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    iou = mask_iou(logits > 0, target > 0.5)
    best = (5 * cross_entropy + dice).min(-1)
    iou_error = F.mse_loss(outputs.iou_scores, iou)
    return best.values.mean() + iou_error, iou.gather(-1, best.indices.unsqueeze(-1)).mean().item()


@torch.no_grad()
def evaluate(
    model: SamModel, processor: SamProcessor, difficulty: float = 1.0, num_scenes: int = 400
) -> dict[str, float]:
    """Mean IoU at full image resolution over held-out scenes: for the single mask, and for the best of three masks by
    predicted IoU, from one random point inside the object, and from its box."""
    model.eval()
    scores: dict[str, list[torch.Tensor]] = {}
    for batch in DataLoader(DrawnScenes(num_scenes, HELD_OUT_SEED, IMAGE_SIZE, 6, difficulty), 20):
        image_embeddings = model.get_image_embeddings(pixel_values(processor, batch))
        truth = batch["masks"].flatten(-2)
        for kind in ("point", "box"):
            for multimask in (False, True):
                outputs = model(image_embeddings=image_embeddings, **prompts(batch, kind), multimask_output=multimask)
                _, logits = best_rated(outputs.iou_scores, outputs.pred_masks)
                masks = F.interpolate(logits, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear") > 0
                name = f"{kind}, {'best-rated of three masks' if multimask else 'single mask'}"
                scores.setdefault(name, []).append(mask_iou(masks.flatten(-2), truth).flatten())
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in scores.items()}


if __name__ == "__main__":
    main()
