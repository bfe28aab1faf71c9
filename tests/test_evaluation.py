"""Evaluating an adapter from the command line, before and after."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from labelled_images import MASK_SIDE
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, SamModel

import evaluate
import finetune
from checkpoint_tools.checkout import SAM_TINY, split_class
from evaluation.metrics import detection_metrics
from evaluation.scoring import (
    EvaluationImage,
    Scores,
    class_summary,
    compared,
    evaluation_image,
    first_click,
    with_correction,
)
from image_data.layouts import read_data
from image_data.pillow_images import ImageReading
from image_data.samples import Sample
from image_data.sources import LabelledImage
from pretraining.drawn_scenes import draw_scene
from segmentation.adapted_model import load_base
from segmentation.segmenter import PromptedObject
from segmentation.segments import iou_matrix, segment_of, segments_of
from segmentation.settings import SegmentationSettings


def run(*arguments: object) -> tuple[dict, list[dict[str, str]]]:
    """Runs the command, and returns metrics and table."""
    arguments = tuple(map(str, arguments))
    evaluate.main(list(arguments))
    output = Path(arguments[arguments.index("--output") + 1])
    with (output / "objects.csv").open(newline="") as file:
        return json.loads((output / "metrics.json").read_text()), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with masks, and COCO annotations of the same objects as boxes with categories."""
    folder = tmp_path_factory.mktemp("scenes")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    images, annotations = [], []
    for seed in (3, 4):
        image, labels = draw_scene(np.random.default_rng(seed), 128, difficulty=0.3)
        image, labels = image[:100], labels[:100]
        Image.fromarray(image).save(folder / "images" / f"{seed}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / "masks" / f"{seed}.png")
        images.append({"id": seed, "file_name": f"{seed}.png", "height": 100, "width": 128})
        for number in np.setdiff1d(labels, [0]).tolist():
            mask = (labels == number).T.ravel()
            runs = np.diff(np.flatnonzero(np.diff(mask, prepend=False, append=False)), prepend=0).tolist()
            counts = [*runs, mask.size - sum(runs)]
            category = 1 + number % 2
            annotations.append({"id": len(annotations) + 1, "image_id": seed, "category_id": category, "iscrowd": 0})
            annotations[-1] |= {"segmentation": {"size": [100, 128], "counts": counts}}
            annotations[-1] |= {"area": int(mask.sum()), "bbox": [0, 0, 128, 100]}
    categories = [{"id": 1, "name": "even"}, {"id": 2, "name": "odd"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That changes the masks a little, with settings of its own and a card."""
    torch.manual_seed(0)
    model = split_class().from_pretrained(SAM_TINY)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q", "v"], task_type="FEATURE_EXTRACTION"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    adapted.save_pretrained(folder)
    SegmentationSettings(min_iou=0.5, min_stability=0.6, grid=8).save(folder)
    ModelCard("---\nlibrary_name: peft\n---\n\n# tuned\n\nText.\n").save(folder / "README.md")
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_before_and_after_in_one_run(scenes, adapter, tmp_path, capsys):
    """Before is stock SAM; the table, the JSON and the CSV say the same."""
    options = ["--images", scenes / "images", "--coco", scenes / "coco.json", "--adapter", adapter, "--clicks", "3"]
    metrics, table = run(*options, "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    assert metrics["objects"] == len(table) > 5
    for title in ("before", "after"):
        for way in ("points", "boxes", "clicks 1", "clicks 3"):
            ious = [float(row[f"{way} {title}"]) for row in table]
            assert metrics[title][way]["iou"] == pytest.approx(np.mean(ious), abs=1e-4)
            assert metrics[title][way]["dice"] == pytest.approx(np.mean([2 * i / (1 + i) for i in ious]), abs=1e-3)
    assert metrics["before"]["clicks 1"] == metrics["before"]["points"] != metrics["after"]["points"]
    ious = [metrics[title]["boxes"]["iou"] for title in ("before", "after")]
    assert f"| boxes: mean IoU | {ious[0]:.3f} | {ious[1]:.3f} |" in printed
    automatic = metrics["after"]["automatic"]
    assert f"| {metrics['before']['automatic']['msa']:.3f} | {automatic['msa']:.3f} |" in printed
    assert "at least 0.5 and 0.6; before, 0.88 and 0.95" in printed
    assert automatic["labelled"] == len(table)
    assert automatic["missed"] < len(table)
    assert sum(float(row["automatic after"]) >= 0.5 for row in table) == len(table) - automatic["missed"]
    odd = [float(row["points after"]) for row in table if row["category"] == "odd"]
    assert metrics["after"]["classes"]["odd"]["objects"] == len(odd) > 0
    assert metrics["after"]["classes"]["odd"]["points: iou"] == pytest.approx(np.mean(odd), abs=1e-4)
    assert "| odd |" in printed and "| even |" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"clicks.png", "worst.png", "metrics.json"}
    # stock SAM, with a box around an object
    stock, processor = SamModel.from_pretrained(SAM_TINY), AutoProcessor.from_pretrained(SAM_TINY)
    row = table[0]
    with Image.open(scenes / "images" / "3.png") as file:
        image = np.asarray(file)
    box = [int(row["left"]), int(row["top"]), int(row["right"]) - 1, int(row["bottom"]) - 1]
    inputs = processor(image, input_boxes=[[box]], return_tensors="pt")
    with torch.no_grad():
        outputs = stock(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    mask = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0, 0].numpy()
    with Image.open(scenes / "masks" / "3.png") as file:
        labels = np.asarray(file)
    iou = max((mask & (labels == n)).sum() / (mask | (labels == n)).sum() for n in np.unique(labels)[1:])
    assert float(row["boxes before"]) == pytest.approx(iou, abs=1e-3)


@pytest.mark.slow
def test_masks_and_annotations_give_the_same(scenes, tmp_path):
    options = ["--images", scenes / "images", "--modes", "boxes", "--base", SAM_TINY]
    metrics, _ = run(*options, "--masks", scenes / "masks", "--output", tmp_path / "a")
    others, _ = run(*options, "--coco", scenes / "coco.json", "--output", tmp_path / "b")
    assert metrics["before"]["boxes"] == others["before"]["boxes"]
    columns = {"image": "images", "mask": "masks"}
    files = {column: sorted(map(str, (scenes / folder).iterdir())) for column, folder in columns.items()}
    rows = datasets.Dataset.from_dict(files, datasets.Features(dict.fromkeys(columns, datasets.Image())))
    rows.to_parquet(tmp_path / "scenes.parquet")
    same, _ = run(*options[2:], "--dataset", tmp_path / "scenes.parquet", "--output", tmp_path / "c")
    assert same["before"]["boxes"] == metrics["before"]["boxes"]
    assert "after" not in metrics
    assert metrics["before"]["classes"] == {} != others["before"]["classes"]
    assert not (tmp_path / "a" / "clicks.png").exists()


@pytest.mark.slow
def test_a_whole_model_beside_its_base(scenes, tmp_path):
    model = split_class().from_pretrained(SAM_TINY, image_size=192)
    model.save_pretrained(tmp_path / "model")
    load_base(str(SAM_TINY), image_size=192)[1].save_pretrained(tmp_path / "model")
    options = ["--images", scenes / "images", "--masks", scenes / "masks", "--modes", "points"]
    metrics, _ = run(*options, "--model", tmp_path / "model", "--base", SAM_TINY, "--output", tmp_path / "a")
    assert metrics["before"]["points"] != metrics["after"]["points"]
    same, _ = run(*options, "--base", SAM_TINY, "--image-size", "192", "--output", tmp_path / "b")
    assert same["before"]["points"] == metrics["after"]["points"]


@pytest.mark.slow
def test_the_held_out_half_of_the_coins_by_default(tmp_path, capsys):
    metrics, table = run("--modes", "points", "automatic", "--grid", "8", "--output", tmp_path / "out")
    assert metrics["data"] == "A photograph of coins, the part held out"
    assert f"{metrics['data']}: 10 objects in 1 image.\n" in capsys.readouterr().out
    assert metrics["objects"] == len(table) == 10, "whole coins"
    assert metrics["before"]["automatic"]["labelled"] == 10


@pytest.mark.slow
def test_files_are_read_as_the_adapter_says(scenes, tmp_path):
    """The scene lies in the lower part of 16 bits, where one bright spot leaves it dark unless percentiles are cut."""
    folder = tmp_path / "deep"
    folder.mkdir()
    with Image.open(scenes / "images" / "3.png") as file:
        grey = np.asarray(file.convert("L"), dtype=np.uint16)
    grey[:2, :2] = 5000
    Image.fromarray(grey).save(folder / "3.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "3.png").write_bytes((scenes / "masks" / "3.png").read_bytes())
    model = tmp_path / "model"
    split_class().from_pretrained(SAM_TINY).save_pretrained(model)
    AutoProcessor.from_pretrained(SAM_TINY).save_pretrained(model)
    data = ["--images", folder, "--masks", tmp_path / "masks", "--model", model, "--modes", "boxes", "--output"]
    cut, _ = run(*data, tmp_path / "cut")
    given, _ = run(*data, tmp_path / "given", "--intensity", "min-max")
    SegmentationSettings(reading=ImageReading(intensity="min-max")).save(model)
    brought, _ = run(*data, tmp_path / "brought")
    overruled, _ = run(*data, tmp_path / "overruled", "--intensity", "percentile", "1", "99.8")
    scores = [each["after"]["boxes"] for each in (cut, given, brought, overruled)]
    assert scores[0] == scores[3] != scores[1] == scores[2]
    with pytest.raises(SystemExit, match=r"3\.png.* more than --max-pixels 9"):
        run(*data, tmp_path / "large", "--max-pixels", "9")


@pytest.mark.slow
def test_results_are_pushed_into_the_card(scenes, adapter, hub, tmp_path):
    hub.add("user/adapter", adapter)
    options = ["--images", scenes / "images", "--masks", scenes / "masks", "--modes", "boxes", "--push"]
    for number in range(2):
        metrics, _ = run(*options, "--adapter", "user/adapter", "--output", tmp_path / f"out{number}")
        card = ModelCard(hub.repos["user/adapter"].files()["README.md"].decode())
        assert card.data.library_name == "peft"
        results = {result.metric_name: result for result in card.data.eval_results}
        assert results["boxes: mean IoU"].metric_value == pytest.approx(metrics["after"]["boxes"]["iou"], abs=1e-4)
        assert results["boxes: mean IoU"].dataset_name == "2 images from images"
        assert len(card.data.eval_results) == 2, "one of each, also the second time"
        assert card.text.count("| boxes: mean IoU |") == 1
        assert "Text." in card.text
    assert set(hub.repos["user/adapter"].files()) >= {"adapter_model.safetensors", "segmentation.json"}


def test_masks_on_what_does_not_count_are_not_false():
    truth = np.zeros((20, 40), int)
    truth[5:15, 5:15] = 1
    ignored = np.zeros((20, 40), bool)
    ignored[:, 25:] = True
    predicted = [segment_of(truth == 1), segment_of(ignored), segment_of(~ignored & (truth == 0))]
    matrix, counted = compared(segments_of(truth), predicted, ignored)
    assert counted == [predicted[0], predicted[2]]
    assert detection_metrics([matrix])["false"] == 1


def test_a_sample_that_leaves_out_objects_ignores_them():
    class Layers:
        name = "layers"

        def read(self):
            labels = np.zeros((2, 10, 12), np.int8)
            labels[0, 2:5, 2:5], labels[1, 3:6, 3:6], labels[0, 8:] = 1, 2, -1
            return LabelledImage(np.zeros((10, 12, 3), np.uint8), labels, {1: "a"})

    image = evaluation_image(Sample(Layers(), np.s_[0:10, 0:12], np.array([1]), {1: "a"}))
    assert [each.category for each in image.objects] == ["a"]
    expected = np.zeros((10, 12), bool)
    expected[3:6, 3:6] = expected[8:] = True
    np.testing.assert_array_equal(image.ignored, expected)


def test_clicks_are_where_the_mask_is_wrong():
    truth = np.zeros((30, 40), bool)
    truth[10:20, 10:30] = True
    half, too_much = np.zeros_like(truth), truth.copy()
    half[10:20, 10:16], too_much[:, 33:] = True, True
    assert first_click(segment_of(truth)) in [(x, y) for x in range(13, 27) for y in (14, 15)]
    asked = PromptedObject(points=[(12, 15)], labels=[1])
    for mask, columns, label in (
        (half, range(16, 30), 1),
        (too_much, range(33, 40), 0),
        (half & False, range(10, 30), 1),
    ):
        corrected = with_correction(asked, segment_of(mask), segment_of(truth))
        (x, _y), labels = corrected.points[-1], corrected.labels
        assert (x in columns, list(labels)) == (True, [1, label])


@pytest.mark.parametrize("seed", [0, 3])
def test_what_is_held_out_is_what_training_did_not_see(seed, photos, tmp_path):
    options = [*photos, "--seed", str(seed)]
    settings = finetune.parse_args([*options, "--output", str(tmp_path)])
    parts, _ = read_data(settings.data, MASK_SIDE, seed)
    _, rows = run(*options, "--held-out", "--modes", "boxes", "--output", tmp_path / "out")
    assert {row["image"] for row in rows} == {sample.source.name for sample in parts.validation}


def test_categories_are_counted_apart():
    truth = np.zeros((10, 40), int)
    truth[2:8, 2:8], truth[2:8, 20:26] = 1, 2
    objects = segments_of(truth, {1: "gold", 2: "copper"})
    image = EvaluationImage(None, (10, 40), objects)  # type: ignore[arg-type]
    scores = Scores()
    scores.ious["points"] = [0.5, 0.25]
    scores.matrices = [iou_matrix(objects, objects[1:])]
    assert class_summary(scores, [image]) == {
        "copper": {"objects": 1, "points: iou": 0.25, "automatic: share found": 1},
        "gold": {"objects": 1, "points: iou": 0.5, "automatic: share found": 0},
    }


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--adapter", "nothing"], "nothing: not an adapter"),
        (["--adapter", "x", "--push"], None),
        (["--push"], "--push: expected --adapter or --model with the Hub id"),
        (["--clicks", "0"], "--clicks 0: expected 1 or more"),
        (["--images", "nothing", "--masks", "other"], "other: there is no such folder"),
        (["--images", __file__, "--masks", "."], f"{__file__} is a file: expected its folder"),
        (["--images", ".", "--masks", __file__], f"{__file__} is a file: expected its folder"),
        (["--images", ".", "--coco", "x.json"], "x.json: cannot be read: No such file or directory."),
        (["--images", "nothing"], "expected --images together with --masks"),
        (["--validation", "0.3"], "--validation: expected --held-out, too"),
        (["--seed", "3"], "--seed: expected --held-out, too"),
        (["--dataset", "d", "--group-column", "patient"], "--group-column: expected --held-out, too"),
        (["--min-iou", "2"], "--min-iou 2.0: expected a number from 0 to 1"),
    ],
)
def test_nothing_is_written_for_bad_requests(arguments, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if problem is None:
        Path("x").mkdir()
        problem = "--push: expected --adapter or --model with the Hub id"
    with pytest.raises(SystemExit, match=problem):
        evaluate.main(arguments)
    assert not Path("build").exists()
