# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune Segment Anything with LoRA on `q` and `v`
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/<user>/sam-split/blob/main/examples/finetune_sam.ipynb)
#
# This notebook takes you from images to masks, and to a number that says how good they are. It runs in about a minute on
# two CPU cores, because it uses `sam-tiny`, a small SAM that comes with the repo. For real work, replace `BASE` by
# `facebook/sam-vit-base` or any other SAM v1, and use a GPU.
#
# On Colab, two lines install what it needs. Elsewhere, run `pip install ".[notebook]"` in a checkout.

# %%
import sys

if "google.colab" in sys.modules:
    print("Installing sam-split")
    # !git clone --quiet --depth 1 https://github.com/<user>/sam-split /content/sam-split
    # %pip install --quiet "/content/sam-split[notebook]"
    # %cd /content/sam-split

# %%
import logging
import os
import warnings
from pathlib import Path


warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from skimage.segmentation import find_boundaries
from torch.utils.data import Dataset
from transformers import SamModel, SamProcessor, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging


if Path.cwd().name == "examples":
    os.chdir("..")
if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# %matplotlib inline
# %config InlineBackend.figure_formats = ["jpeg"]

BASE = "checkpoints/sam-tiny"
SIDE = 192  # of the images that the model sees, in pixels; None for the base's own side, which is 1024 for SAM
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
torch.manual_seed(0)
rng = np.random.default_rng(0)

# %% [markdown]
# ## Load
#
# `SamSplitModel` is SAM with separate `q`, `k` and `v`. It loads any SAM v1 checkpoint. A model repo on the Hub loads with
# `AutoModel.from_pretrained("<user>/sam-vit-base-split", trust_remote_code=True)`. With `image_size=`, the position
# tables are interpolated once, and the processor gets the same side.

# %%
SamSplitModel = get_class_from_dynamic_module("modeling_sam_split.SamSplitModel", ".")  # the code in this folder
model = SamSplitModel.from_pretrained(BASE, image_size=SIDE).to(DEVICE)
side = model.config.vision_config.image_size
processor = SamProcessor.from_pretrained(BASE, size={"longest_edge": side}, pad_size={"height": side, "width": side})
print(f"{model.num_parameters():,} parameters, images of {side} pixels")

# %% [markdown]
# ## Look at the data
#
# A photograph of coins: the model learns from the left half, and the right half is held out. A label image has 0 for the
# background and another number for each object. To use your own images, fill `train` and `held_out` with pairs of an
# image (H, W, 3) and its labels (H, W).

# %%
from image_data.sources import Coins


def half(image, labels, columns):
    """Returns a part of an image, with the objects that lie in it as a whole."""
    inside = labels[:, columns]
    cut = np.intersect1d(inside, np.delete(labels, np.arange(labels.shape[1])[columns], axis=1))
    return image[:, columns].copy(), np.where(np.isin(inside, cut), 0, inside)


def outlined(image, labels):
    """Returns the image with the outlines of its objects."""
    picture = image.copy()
    picture[find_boundaries(labels, mode="thick")] = (255, 176, 0)
    return picture


coins = Coins().read()
middle = coins.image.shape[1] // 2
train = [half(coins.image, coins.labels, slice(0, middle))]
held_out = [half(coins.image, coins.labels, slice(middle, None))]

figure, axes = plt.subplots(1, 2, figsize=(9, 6.5), layout="constrained")
for axis, title, (image, labels) in zip(axes, ("training", "held out"), (*train, *held_out), strict=True):
    axis.imshow(outlined(image, labels))
    axis.set_title(f"{title}: {len(np.unique(labels)) - 1} objects")
    axis.axis("off")

# %% [markdown]
# ## How good is the model before training?
#
# Each object is prompted with one point deep inside of it. The intersection over union (IoU) of the predicted and the
# labelled mask says how well they agree: 1 is perfect.

# %%
from examples.finetune_minimal import mask_loss, object_ids, predict, random_point
from segmentation.corrective_clicks import deepest
from evaluation.metrics import detection_metrics
from segmentation.predictor import ObjectPrompts, Predictor
from segmentation.segments import iou_matrix, segment_of


def evaluate(model, pairs):
    """Returns the mean IoU of all objects, and the masks of the last image, numbered like its labels."""
    predictor, scores = Predictor(model.eval(), processor), []
    for image, labels in pairs:
        ids = object_ids(labels)
        points = [[list(deepest(labels == number)[0][::-1])] for number in ids]
        masks, _, _ = predictor.predict(predictor.encode(image), ObjectPrompts(points=points), multimask=False)
        predicted = np.zeros_like(labels)
        for number, mask in zip(ids, masks, strict=True):
            truth = labels == number
            scores.append((mask & truth).sum() / (mask | truth).sum())
            predicted[mask] = number
    return float(np.mean(scores)), predicted


iou_before, masks_before = evaluate(model, held_out)
print(f"Mean IoU on the held-out coins: {iou_before:.3f}")

# %% [markdown]
# ## LoRA on `q` and `v`
#
# Stock SAM has one fused `qkv`, so PEFT cannot adapt `q` and `v` alone. Here it can.

# %%
config = LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.1, task_type="FEATURE_EXTRACTION")
model = get_peft_model(model, config)
model.print_trainable_parameters()

# %% [markdown]
# ## Train with a plain loop
#
# `examples/finetune_minimal.py` holds this loop, and the loss, in one file to copy.

# %%
STEPS, OBJECTS = 120, 8
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
losses = []
model.train()
for _ in range(STEPS):
    image, labels = train[rng.integers(len(train))]
    turns, mirror = int(rng.integers(4)), int(rng.choice([-1, 1]))
    image, labels = (np.rot90(array, turns)[:, ::mirror].copy() for array in (image, labels))
    ids = rng.choice(object_ids(labels), OBJECTS)
    points = [random_point(labels == number, rng) for number in ids]
    logits, targets = predict(model, processor, image, labels, ids, points)
    loss = mask_loss(logits, targets)
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    losses.append(loss.item())

plt.figure(figsize=(6, 2.5), layout="constrained")
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("loss")
plt.show()
# %% [markdown]
# ## Before and after

# %%
iou_after, masks_after = evaluate(model, held_out)
image, labels = held_out[-1]
panels = {
    "labels": labels,
    f"before: IoU {iou_before:.2f}": masks_before,
    f"after: IoU {iou_after:.2f}": masks_after,
}
figure, axes = plt.subplots(1, 3, figsize=(11, 5.5), layout="constrained")
for axis, (title, shown) in zip(axes, panels.items(), strict=True):
    axis.imshow(outlined(image, shown))
    axis.plot(*np.array([deepest(labels == number)[0][::-1] for number in object_ids(labels)]).T, "c+", ms=12, mew=2)
    axis.set_title(title)
    axis.axis("off")

# %% [markdown]
# ## Or train with `Trainer`
#
# The model is a plain `transformers` model, so `Trainer` works as well. Here it goes on with the same adapter for a few
# steps. `python finetune.py` is a complete recipe on top of `Trainer`: it reads COCO, validates, resumes, uses several
# processes, and picks the best weights.


# %%
class OnePointPerObject(Dataset):
    """Items of eight objects, each with a random point in it."""

    def __init__(self, pairs, size):
        self.pairs, self.size = pairs, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image, labels = self.pairs[index % len(self.pairs)]
        ids = rng.choice(object_ids(labels), OBJECTS)
        points = [[random_point(labels == number, rng)] for number in ids]
        inputs = processor(image, input_points=[points], return_tensors="pt")
        edge = 4 * side // model.config.vision_config.patch_size  # of the masks that the model predicts
        height, width = (round(length * edge / max(labels.shape)) for length in labels.shape)
        targets = torch.from_numpy(labels == ids[:, None, None]).float()
        targets = torch.nn.functional.interpolate(targets[None], (height, width), mode="area")[0] > 0.5
        return {
            "pixel_values": inputs["pixel_values"][0],
            "input_points": inputs["input_points"][0].float(),
            "labels": targets.float(),
        }


def compute_loss(outputs, labels, num_items_in_batch=None):
    """Returns the loss of a batch; the part of the predicted masks beyond the image does not count."""
    height, width = labels.shape[-2:]
    logits = outputs.pred_masks[:, :, 0, :height, :width]
    return mask_loss(logits.flatten(0, 1), labels.flatten(0, 1))


arguments = TrainingArguments(
    output_dir="build/notebook/trainer",
    max_steps=20,
    per_device_train_batch_size=1,
    learning_rate=2e-4,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
    label_names=["labels"],  # otherwise Trainer would take input_labels, which belong to the prompts
    disable_tqdm=True,
    use_cpu=DEVICE.type == "cpu",
)
trainer = Trainer(model, arguments, train_dataset=OnePointPerObject(train, 20), compute_loss_func=compute_loss)
trainer.train()
print(f"Mean IoU on the held-out coins: {evaluate(model, held_out)[0]:.3f}")

# %% [markdown]
# ## Find all objects, with no prompt
#
# A grid of points finds all objects of an image. mSA, the mean segmentation accuracy, counts missed and false objects, too.
# `python evaluate.py` prints these numbers for an adapter, before and after, with boxes and corrective clicks as well.

# %%
from segmentation.settings import SegmentationSettings
from segmentation.segmenter import ImageSegmenter


settings = SegmentationSettings(grid=16, min_iou=0.6, min_stability=0.7)
image, labels = held_out[-1]
segments = ImageSegmenter(Predictor(model.eval(), processor), image, settings).everything().segments
cut = (coins.labels[:, middle:] > 0) & (labels == 0)  # coins that the cut divides are not labelled
segments = [segment for segment in segments if cut[segment.window][segment.crop].mean() < 0.5]
truth = [segment_of(labels == number) for number in object_ids(labels)]
agreement = detection_metrics([iou_matrix(truth, segments)])
print(f"{len(segments)} objects, mSA {agreement['msa']:.2f}: {agreement['missed']} missed, {agreement['false']} false")

numbered = np.zeros_like(labels)
for number, segment in enumerate(segments, start=1):
    numbered[segment.full(labels.shape)] = number
plt.figure(figsize=(4.5, 6), layout="constrained")
plt.imshow(outlined(image, numbered))
plt.title(f"found with no prompt: {len(segments)} objects")
plt.axis("off")
plt.show()
# %% [markdown]
# ## Keep it: an adapter, or a stock model
#
# The adapter is small. Merged and fused again, the model is a stock `SamModel`, which loads anywhere without remote code.

# %%
adapter, tuned = Path("build/notebook/adapter"), Path("build/notebook/sam-tuned")
model.save_pretrained(adapter)
size = sum(file.stat().st_size for file in adapter.iterdir())
print(f"The adapter takes {size / 1e3:.0f} kB.")

merged = model.merge_and_unload()
merged.to_sam().save_pretrained(tuned)
processor.save_pretrained(tuned)
stock = SamModel.from_pretrained(tuned).to(DEVICE)
_, of_stock = evaluate(stock, held_out)
_, of_merged = evaluate(merged, held_out)
print(f"Pixels that differ from stock SamModel: {(of_stock != of_merged).sum()}")

# %% [markdown]
# ## Share it
#
# Set `REPO` and log in with `hf auth login` to upload the adapter. `python upload.py` uploads a base model with the code
# that loads it, and verifies both before and after.

# %%
REPO = None  # "<user>/sam-coins-lora"
if REPO:
    from huggingface_hub import HfApi

    HfApi().create_repo(REPO, exist_ok=True)
    print(HfApi().upload_folder(repo_id=REPO, folder_path=adapter))
