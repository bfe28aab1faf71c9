"""Writes what an evaluation measured: tables, a curve over clicks, the worst objects, and the adapter's card."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")  # no window is opened, and none is needed
import matplotlib.pyplot as plt
import numpy as np
from huggingface_hub import EvalResult, HfApi, ModelCard

from checkpoint_tools.output_folders import json_text
from segmentation.segments import Segment

from .scoring import AUTOMATIC, BOXES, POINTS, EvaluationImage, Scores


WORST = 10
SECTION = "<!-- evaluation -->"  # around the table in a card
AUTOMATIC_ROWS = {
    "msa": "mSA",
    "sa50": "SA50",
    "sa75": "SA75",
    "f1": "F1 at IoU 0.5",
    "ap": "AP",
    "ap50": "AP50",
    "missed": "objects missed",
    "false": "false objects",
    "count_error": "error of the number of objects in an image",
}
COLOURS = {"labelled": "#009E73", "before": "#56B4E9", "after": "#D55E00"}


def rows_of(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns the metrics by what is written beside them, with a number for each summary (`before`, `after`)."""
    first = next(iter(summaries.values()))
    rows = {}
    for way, values in first.items():
        if way == "seconds_per_image":
            names = {mode: f"seconds per image: {mode}" for mode in values}
        elif way == AUTOMATIC:
            names = {name: f"automatic: {title}" for name, title in AUTOMATIC_ROWS.items()}
        else:
            names = {"iou": f"{way}: mean IoU", "dice": f"{way}: mean Dice"}
            names = names if way in (POINTS, BOXES) else {"iou": names["iou"]}  # one row for each number of clicks
        for name, title in names.items():
            rows[title] = [float(each[way][name]) for each in summaries.values()]
    return rows


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the metrics as Markdown."""
    lines = [f"| | {' | '.join(summaries)} |", "|---|" + "---|" * len(summaries)]
    for title, numbers in rows_of(summaries).items():
        counts = title.endswith("objects") or title.endswith("missed")
        cells = [f"{number:.0f}" if counts else f"{number:.3f}" for number in numbers]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def class_table(classes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the metrics of each category, of the last model, as Markdown; empty without categories."""
    *_, last = classes.values()
    if not last:
        return ""
    columns = list(next(iter(last.values())))
    lines = [f"| category | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for category, values in last.items():
        cells = [f"{values[name]:.0f}" if name == "objects" else f"{values[name]:.3f}" for name in columns]
        lines.append(f"| {category} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(
    folder: Path,
    facts: dict[str, Any],
    images: Sequence[EvaluationImage],
    scores: Mapping[str, Scores],
    summaries: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes `metrics.json`, `objects.csv`, and the pictures `clicks.png` and `worst.png` as far as they apply."""
    content = {**facts, **{title: {**summaries[title], "classes": classes[title]} for title in summaries}}
    (folder / "metrics.json").write_text(json_text(content), encoding="utf-8")
    write_objects(folder / "objects.csv", images, scores)
    plot_clicks(folder / "clicks.png", summaries)
    *_, last = scores.values()
    if last.segments:
        plot_worst(folder / "worst.png", images, last)


def write_objects(path: Path, images: Sequence[EvaluationImage], scores: Mapping[str, Scores]) -> None:
    """Writes a CSV file with a row for each labelled object, and a column for each way and model."""
    columns: dict[str, list[float]] = {}
    for title, each in scores.items():
        ways = {**each.ious, **({AUTOMATIC: each.automatic_ious()} if each.matrices else {})}
        columns |= {f"{way} {title}": ious for way, ious in ways.items()}
    objects = [(image.name, number, each) for image in images for number, each in enumerate(image.objects, start=1)]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "object", "category", "area", "left", "top", "right", "bottom", *columns])
        for index, (name, number, segment) in enumerate(objects):
            ious = [round(column[index], 4) for column in columns.values()]
            rows.writerow([name, number, segment.category or "", segment.area, *segment.box, *ious])


def plot_clicks(path: Path, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Saves the mean IoU over the number of clicks; nothing if no clicks were evaluated."""
    curves = {
        title: [values["iou"] for way, values in summary.items() if way.startswith("clicks ")]
        for title, summary in summaries.items()
    }
    if not any(curves.values()):
        return
    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for title, curve in curves.items():
        axis.plot(range(1, len(curve) + 1), curve, "o-", label=title, color=COLOURS[title])
    axis.set(xlabel="clicks", ylabel="mean IoU", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_worst(path: Path, images: Sequence[EvaluationImage], scores: Scores) -> None:
    """Saves the objects with the lowest IoU, with the outlines of the labelled and the predicted mask."""
    way = next(iter(scores.ious))
    objects = [(image, each) for image in images for each in image.objects]
    worst = np.argsort(scores.ious[way])[:WORST]
    figure, grid = plt.subplots(2, (WORST + 1) // 2, figsize=(12, 5.5), layout="constrained")
    for axis, index in zip(grid.flat, worst, strict=False):
        image, truth = objects[index]
        predicted = scores.segments[way][index]
        rows, columns = around(truth, image.size)
        axis.imshow(image.image[rows, columns], extent=extent(rows, columns))
        for segment, title in ((truth, "labelled"), (predicted, "after")):
            mask = segment.full(image.size)[rows, columns]
            if mask.any() and not mask.all():
                ys, xs = np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop)
                axis.contour(xs, ys, mask, levels=[0.5], colors=COLOURS[title], linewidths=2)
        axis.set_title(f"{Path(image.name).name[-24:]}\nIoU {scores.ious[way][index]:.2f}", fontsize=9)
    for axis in grid.flat:
        axis.axis("off")
    handles = [plt.Line2D([], [], color=COLOURS[title]) for title in ("labelled", "after")]
    figure.legend(handles, ["labelled", f"predicted ({way})"], loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def around(truth: Segment, size: tuple[int, int]) -> tuple[slice, slice]:
    """Returns the window of an image (H, W) that shows an object and what is around it."""
    margin = max(truth.crop.shape) // 2 + 4
    rows, columns = (
        slice(max(0, part.start - margin), min(whole, part.stop + margin))
        for part, whole in zip(truth.window, size, strict=True)
    )
    return rows, columns


def extent(rows: slice, columns: slice) -> tuple[float, float, float, float]:
    """Returns where the pixels of a window lie in a plot: left, right, bottom and top."""
    return columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5


def push_to_card(repo_id: str, data: str, summaries: Mapping[str, Mapping[str, Any]], text: str) -> str:
    """Writes the results into the card of an adapter on the Hub, as metadata and as a table, and returns the URL.

    Results of an earlier evaluation on data of the same name are replaced.
    """
    card = ModelCard.load(repo_id)
    results = [result for result in card.data.eval_results or [] if result.dataset_name != data]
    *_, last = summaries
    rows = {title: numbers[-1] for title, numbers in rows_of({last: summaries[last]}).items()}
    card.data.model_name = card.data.model_name or repo_id.rpartition("/")[2]
    card.data.eval_results = results + [
        EvalResult(
            task_type="mask-generation",
            dataset_type=re.sub(r"\W+", "-", data.lower()).strip("-"),
            dataset_name=data,
            metric_type=re.sub(r"\W+", "_", title.lower()).strip("_"),
            metric_name=title,
            metric_value=round(number, 4),
        )
        for title, number in rows.items()
        if not title.startswith("seconds") and np.isfinite(number)
    ]
    section = f"{SECTION}\n## Evaluation\n\n{data}\n\n{text}\n{SECTION}"
    if card.text.count(SECTION) == 2:
        before, _, after = card.text.split(SECTION)
        card.text = f"{before}{section}{after}"
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return str(
        HfApi().upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo="README.md",
            repo_id=repo_id,
            commit_message=f"Evaluation on {data}",
        )
    )
