"""Pictures of masks and of the course of training."""

from pathlib import Path
from typing import IO, Any

import matplotlib


matplotlib.use("Agg")  # no window is opened, and none is needed
import matplotlib.pyplot as plt
import numpy as np

from segmentation.overlays import distinct_colours, draw_segments
from segmentation.segments import segment_of


def plot_masks(rows: list[dict[str, Any]], file: Path | IO[bytes]) -> None:
    """Saves a row of pictures for each image: its prompts, and its masks by name.

    Args:
        rows: `image` (H, W, 3), `points` (n, 2) and `boxes` (n, 4) to draw, and `masks` (objects, H, W) by title.
        file: Where to save.
    """
    titles = list(rows[0]["masks"])
    figure, grid = plt.subplots(
        len(rows), 1 + len(titles), figsize=(4 * (1 + len(titles)), 5 * len(rows)), layout="constrained", squeeze=False
    )
    for axes, row in zip(grid, rows, strict=True):
        colours = distinct_colours(list(map(segment_of, row["masks"][titles[0]])))  # of each object, in all masks
        axes[0].imshow(row["image"])
        axes[0].set_title("image and prompts")
        for axis, title in zip(axes[1:], titles, strict=True):
            axis.imshow(draw_segments(row["image"], list(map(segment_of, row["masks"][title])), colours=colours))
            axis.set_title(title)
        for axis in axes:
            axis.plot(*np.reshape(row["points"], (-1, 2)).T, "r*", markeredgecolor="white", markersize=10)
            for left, top, right, bottom in np.reshape(row["boxes"], (-1, 4)):
                axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color="red"))
            axis.axis("off")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_curves(history: list[dict[str, float]], before: float, path: Path) -> None:
    """Saves loss and validation IoU over the steps, as `Trainer` logged them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, label in ((left, "loss", "training loss"), (right, "eval_iou", "validation mean IoU")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if key == "eval_iou":
            points.insert(0, (0, before))
        axis.plot(*zip(*points, strict=True), "o-" if key == "eval_iou" else "-")
        axis.set(xlabel="step", ylabel=label)
    figure.savefig(path, dpi=120)
    plt.close(figure)
