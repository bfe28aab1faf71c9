"""Segmenting images from the command line."""

import csv
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoProcessor, SamModel, pipeline
from transformers.utils import is_torchvision_available
from transformers.utils.logging import get_verbosity

import segment
from checkpoint_tools.checkout import SAM_TINY, split_class
from image_data.sources import Coins
from pretraining.drawn_scenes import draw_scene
from segmentation.overlays import COLOURS, distinct_colours
from segmentation.result_files import SegmentedImage, write_pictures
from segmentation.segments import Segment, iou_matrix, segments_of
from segmentation.settings import SegmentationSettings


POINTS = ["--point", "45", "125", "--point", "103", "125"]  # two coins
FINDS = ["--min-iou", "0.5", "--min-stability", "0.6", "--grid", "8"]  # something in a drawn scene


@pytest.fixture(scope="module")
def coins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "coins.png"
    Image.fromarray(Coins().read().image).save(path)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image, and a folder with one."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "more").mkdir()
    for seed, name in ((3, "one.png"), (4, "more/two.tif")):
        Image.fromarray(draw_scene(np.random.default_rng(seed), 128, difficulty=0.3)[0]).save(folder / name)
    return folder


def run(*arguments: str | Path) -> Path:
    """Runs the command, and returns the folder with its results."""
    segment.main(list(map(str, arguments)))
    return Path(arguments[arguments.index("--output") + 1])


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def stock_masks(coins: Path, multimask: bool, **prompts) -> np.ndarray:
    """The best rated masks of stock SAM."""
    stock, processor = SamModel.from_pretrained(SAM_TINY), AutoProcessor.from_pretrained(SAM_TINY)
    with Image.open(coins) as image:
        inputs = processor(image.convert("RGB"), return_tensors="pt", **prompts)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    tensors = {name: tensor if "labels" in name else tensor.float() for name, tensor in inputs.items()}
    with torch.no_grad():
        outputs = stock(**tensors, multimask_output=multimask)
    (masks,) = processor.post_process_masks(outputs.pred_masks, *sizes)
    best = outputs.iou_scores[0].argmax(-1)
    return masks[torch.arange(len(best)), best].numpy()


@pytest.mark.parametrize("multimask", ["single-point", "never"])
def test_points_give_the_masks_of_stock_sam(multimask, coins, tmp_path):
    output = run(coins, *POINTS, "--multimask", multimask, "--output", tmp_path / "new" / "folder")
    masks = stock_masks(coins, multimask == "single-point", input_points=[[[[45, 125]], [[103, 125]]]])
    labels = picture(output / "coins-labels.png")
    np.testing.assert_array_equal(labels, np.where(masks[1], 2, masks[0]))  # the last is in front
    assert set(np.unique(labels)) == {0, 1, 2}
    shown, original = picture(output / "coins-overlay.png"), picture(coins)
    assert (shown[labels > 0] != original[labels > 0]).any(-1).mean() > 0.99
    assert (shown[labels == 0] == original[labels == 0]).all(-1).mean() > 0.99, "but the points"


def test_prompts_of_all_kinds_belong_to_the_object_before_them(coins, tmp_path):
    arguments = [
        "--point",
        "45",
        "125",
        "--also",
        "50",
        "120",
        "--not",
        "75",
        "125",
        "--box",
        "80",
        "105",
        "125",
        "150",
    ]
    output = run(coins, *arguments, "--not", "150", "125", "--output", tmp_path)
    labels = picture(output / "coins-labels.png")
    points = {"input_points": [[[[45, 125], [50, 120], [75, 125]]]], "input_labels": [[[1, 1, 0]]]}
    first = stock_masks(coins, False, **points)[0]
    second = stock_masks(
        coins, False, input_boxes=[[[80, 105, 125, 150]]], input_points=[[[[150, 125]]]], input_labels=[[[0]]]
    )[0]
    np.testing.assert_array_equal(labels, np.where(second, 2, first))


def test_annotations_and_table_hold_the_objects_of_the_label_image(scenes, tmp_path):
    output = run(scenes, "--everything", *FINDS, "--table", "--output", tmp_path)
    content = json.loads((output / "annotations.json").read_text())
    with (output / "objects.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [image["file_name"] for image in content["images"]] == ["more/two.tif", "one.png"]
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert len(content["annotations"]) == len(table) > 4
    counts = np.frombuffer(content["annotations"][0]["segmentation"]["counts"].encode(), np.uint8)
    assert counts.size
    for image in content["images"]:
        labels = picture(output / f"{image['file_name'].rpartition('.')[0]}-labels.png")
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        areas = [coco_mask.area(a["segmentation"]) for a in own]
        assert areas == [a["area"] for a in own] == sorted(areas, reverse=True)
        last = own[-1]  # nothing is in front of it
        assert (labels == last["label"]).sum() == last["area"]
        assert labels.max() == last["label"] == len(own)
        rows = [row for row in table if row["image"] == image["file_name"]]
        assert [int(row["area"]) for row in rows] == areas
        assert all(0.5 <= float(row["score"]) <= 1 and 0.6 <= float(row["stability"]) <= 1 for row in rows)


def test_boxes_and_categories_of_annotations(coins, tmp_path):
    boxes = [[23, 103, 44, 42], [80, 107, 44, 38]]
    content = {
        "images": [{"id": 7, "file_name": "coins.png"}, {"id": 8, "file_name": "other.png"}],
        "annotations": [
            {"image_id": 7, "bbox": box, "category_id": category} for box, category in zip(boxes, (5, 3), strict=True)
        ],
        "categories": [{"id": 3, "name": "copper"}, {"id": 5, "name": "gold"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    output = run(coins, "--coco", tmp_path / "boxes.json", "--output", tmp_path / "out")
    expected = stock_masks(coins, False, input_boxes=[[[x, y, x + w, y + h] for x, y, w, h in boxes]])
    np.testing.assert_array_equal(picture(output / "coins-labels.png"), np.where(expected[1], 2, expected[0]))
    written = json.loads((output / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in written["categories"]}
    assert [names[annotation["category_id"]] for annotation in written["annotations"]] == ["gold", "copper"]
    content["images"][0] |= {"id": "7", "file_name": "C:\\Users\\me\\a%20b\\Coins.png"}  # as read for training
    content["annotations"].append({"image_id": 7.0, "bbox": [0, 0, 300, 300], "category_id": 5, "iscrowd": 1})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    by_name = run(coins, "--coco", tmp_path / "boxes.json", "--output", tmp_path / "by_name")
    assert (by_name / "annotations.json").read_bytes() == (output / "annotations.json").read_bytes()
    content["annotations"].append({"image_id": 7, "bbox": [1, 2, 3]})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"annotation 4 of the list: expected a bbox of left, top, width and height"):
        run(coins, "--coco", tmp_path / "boxes.json", "--output", tmp_path / "other")
    del content["annotations"][-1]
    content["images"][0]["file_name"] = "elsewhere.png"
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"boxes\.json: lists no image .*coins\.png"):
        run(coins, "--coco", tmp_path / "boxes.json", "--output", tmp_path / "other")
    (tmp_path / "boxes.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"boxes\.json: not a COCO annotation file"):
        run(coins, "--coco", tmp_path / "boxes.json", "--output", tmp_path / "other")


def test_rough_masks_are_refined(coins, tmp_path):
    """Eroded labels as prompts give better masks than they are."""
    source = Coins().read()
    truth = [segment for segment in segments_of(source.labels) if segment.left < 150]
    rough = np.zeros_like(source.labels)
    for number, thing in enumerate(truth, start=1):
        left, top, right, bottom = thing.box
        rough[top + 8 : bottom - 8, left + 8 : right - 8] = number
    (tmp_path / "masks").mkdir()
    Image.fromarray(rough.astype(np.uint8)).save(tmp_path / "masks" / "coins.png")
    output = run(coins, "--masks", tmp_path / "masks", "--output", tmp_path / "out")
    refined = segments_of(picture(output / "coins-labels.png"))
    before, after = (iou_matrix(truth, each).max(1).mean() for each in (segments_of(rough), refined))
    assert after > before
    Image.fromarray(rough[:9].astype(np.uint8)).save(tmp_path / "masks" / "coins.png")
    with pytest.raises(SystemExit, match=r"expected a label image of 384 x 303 pixels .*got 384 x 9"):
        run(coins, "--masks", tmp_path / "masks", "--output", tmp_path / "other")


def test_each_image_has_the_rough_mask_of_its_own_folder(coins, tmp_path):
    """Never that of another image of the same name."""
    mask = np.zeros((303, 384), dtype=np.uint8)
    mask[235:285, 20:72] = 1
    for folder in ("left", "right"):
        for path in (tmp_path / "photos" / folder, tmp_path / "masks" / folder):
            path.mkdir(parents=True)
        Image.open(coins).save(tmp_path / "photos" / folder / "a.png")
        Image.fromarray(np.roll(mask, 240, axis=1) if folder == "right" else mask).save(path / "a.png")
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    output = run(photos, "--masks", masks, "--output", tmp_path / "out")
    assert [picture(output / folder / "a-labels.png")[260, [45, 285]].tolist() for folder in ("left", "right")] == [
        [1, 0],
        [0, 1],
    ]
    with pytest.raises(SystemExit, match=r"--masks .*a\.png is for one image, got 2: give a folder of masks"):
        run(photos, "--masks", masks / "left" / "a.png", "--output", tmp_path / "other")
    (masks / "right" / "a.png").rename(masks / "a.png")
    with pytest.raises(SystemExit, match=r"right/a\.png: no label image right/a in "):
        run(photos, "--masks", masks, "--output", tmp_path / "other")


class TestAdapters:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        model = split_class().from_pretrained(SAM_TINY)
        config = LoraConfig(target_modules=["q", "v"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_libraries_do_not_talk_to_users(self, adapter, coins, tmp_path, capsys, logged):
        """Of torchvision that is missing, or of what PEFT will have to change; the log is as before afterwards."""
        verbosity = get_verbosity()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(coins, "--point", "20", "20", "--adapter", adapter, "--output", tmp_path / "out")
        assert (logged, [str(warning.message) for warning in caught]) == ([], [])
        assert "1 object in 1 image: " in capsys.readouterr().out
        assert get_verbosity() == verbosity

    def test_an_adapter_brings_its_base(self, adapter, coins, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        adapted, plain = (
            picture(run(coins, *POINTS, *options, "--output", name) / "coins-labels.png")
            for name, options in (("adapted", ["--adapter", "adapter"]), ("plain", []))
        )
        assert (adapted != plain).any()
        Path("adapter", "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(SystemExit, match=r"adapter: does not fit .* or is damaged"):
            run(coins, *POINTS, "--adapter", "adapter", "--output", "damaged")

    def test_an_adapter_brings_its_settings(self, adapter, scenes, tmp_path):
        """They give what the same options give, and options go before them."""
        settings = SegmentationSettings(
            image_size=64, tile=100, grid=6, min_iou=0.3, min_stability=0.4, max_overlap=0.7, multimask="always"
        )
        settings.save(adapter)
        scene, options = scenes / "one.png", ["--everything", "--adapter", adapter]
        brought = picture(run(scene, *options, "--output", tmp_path / "a") / "one-labels.png")
        assert brought.max() > 1
        changed = picture(run(scene, *options, "--grid", "3", "--output", tmp_path / "b") / "one-labels.png")
        assert (changed != brought).any()
        (adapter / "segmentation.json").unlink()
        given = ["--image-size", "64", "--tile", "100", "--grid", "6", "--min-iou", "0.3", "--min-stability", "0.4"]
        given += ["--max-overlap", "0.7"]
        np.testing.assert_array_equal(
            picture(run(scene, *options, *given, "--output", tmp_path / "c") / "one-labels.png"), brought
        )

    def test_damaged_settings_are_named(self, adapter, coins, tmp_path):
        (adapter / "segmentation.json").write_text("{")
        with pytest.raises(SystemExit, match=r"segmentation\.json: cannot be read"):
            run(coins, *POINTS, "--adapter", adapter, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--min-iou", "0.97"], r"no mask is rated --min-iou 0\.97 or more; the best is 0\.\d\d\. Give"),
        (
            ["--min-iou", "0.3", "--min-stability", "1"],
            r"no mask that is rated enough is as stable as --min-stability 1; the best is 0\.\d\d\. Give",
        ),
    ],
)
def test_nothing_found_tells_the_best_scores(options, reason, coins, tmp_path, capsys):
    output = run(coins, "--everything", "--grid", "6", *options, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert re.search(rf"coins\.png: 0 objects: {reason}", printed), printed
    assert not picture(output / "coins-labels.png").any()
    assert json.loads((output / "annotations.json").read_text())["annotations"] == []


@pytest.mark.parametrize(
    ("options", "thresholds"),
    [
        (["--min-iou", "0.5", "--min-stability", "0.6"], {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}),
        ([], {}),  # the defaults of the pipeline
    ],
    ids=["given", "default"],
)
def test_the_stock_pipeline_gives_the_masks_of_stock_sam(options, thresholds, tmp_path, logged):
    pytest.importorskip("torchvision", reason="duplicate masks are removed with torchvision")
    scene, _ = draw_scene(np.random.default_rng(3), 128, difficulty=0.5)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    stock = ["--everything", "--pipeline", "stock", "--grid", "8"]
    output = run(tmp_path / "scene.png", *stock, *options, "--output", tmp_path / "all")
    labels = picture(output / "scene-labels.png")
    processor = AutoProcessor.from_pretrained(SAM_TINY)
    generate = pipeline(
        "mask-generation", SamModel.from_pretrained(SAM_TINY), image_processor=processor.image_processor
    )
    masks = generate(Image.fromarray(scene), points_per_crop=8, **thresholds)["masks"]
    assert len(masks) > (1 if thresholds else 0)
    expected = np.zeros_like(labels)
    for number, mask in enumerate(sorted(map(np.asarray, masks), key=np.sum, reverse=True), start=1):
        expected[mask] = number
    np.testing.assert_array_equal(labels, expected)
    assert logged == []


@pytest.mark.slow
def test_more_objects_than_16_bits_hold_are_written_as_tiff(tmp_path):
    segments = [Segment(i % 300, i // 300, np.ones((1, 1), bool), 1.0, 1.0) for i in range(66_000)]
    image = np.zeros((220, 300, 3), np.uint8)
    _, path = write_pictures(SegmentedImage("many.png", image, segments[:1]), tmp_path)
    assert path.suffix == ".png"
    _, path = write_pictures(SegmentedImage("many.png", image, segments), tmp_path)
    assert path.suffix == ".tif"
    np.testing.assert_array_equal(tifffile.imread(path).ravel(), np.arange(1, 66_001))


def test_neighbours_have_different_colours():
    boxes = [(x, y) for y in range(0, 50, 10) for x in range(0, 50, 10)]
    segments = [Segment(x, y, np.ones((9, 9), bool), 1.0, 1.0) for x, y in boxes]
    colours = distinct_colours(segments)
    assert set(colours) == set(range(len(COLOURS)))
    for (x, y), colour in zip(boxes, colours, strict=True):
        for (other_x, other_y), other in zip(boxes, colours, strict=True):
            if abs(x - other_x) + abs(y - other_y) == 10:
                assert colour != other
    assert distinct_colours([]) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["photo.png"], "expected one of --point and --box, --coco, --masks or --everything"),
        (["photo.png", "--everything", "--point", "1", "1"], "expected one of --point"),
        (["photo.png", "--coco", "a", "--masks", "b"], "expected one of --point"),
        (["photo.png", "--not", "1", "1"], "--not: expected --point or --box before it"),
        (["photo.png", "--point", "1", "1", "--pipeline", "stock"], "--pipeline stock: expected --everything"),
        (["photo.png", "--point", "1", "1", "--revision", "v1"], "--revision: expected --base or --adapter, too."),
        (["photo.png", "--point", "1", "1", "--min-iou", "0.5"], "--min-iou: expected --everything, too."),
        pytest.param(
            ["photo.png", "--everything", "--pipeline", "stock"],
            "pip install torchvision",
            marks=pytest.mark.skipif(is_torchvision_available(), reason="it is there"),
        ),
    ],
)
def test_contradictory_arguments_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit) as raised:
        segment.main(arguments)
    assert raised.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--point", "385", "10"], "outside of the image of 384 x 303"),
        (["--box", "9", "9", "9", "20"], "box 9 9 9 20: expected left < right"),
        (["--point", "1", "1", "--base", "nothing"], "nothing: not a SAM v1 checkpoint"),
        (["--point", "1", "1", "--adapter", "nothing"], "nothing: not an adapter"),
        (["--point", "1", "1", "--base", str(SAM_TINY), "--revision", "v1"], "is a folder, which has no revision v1"),
        (["--everything", "--min-iou", "7"], "--min-iou 7.0: expected a number from 0 to 1"),
        (["--everything", "--image-size", "100"], "image_size"),
        (["empty", "--everything"], "empty: no images in this folder"),
        (["twin/coins.tif", "--everything"], "has the same name as"),
        (["twin/other.tif", "--point", "1", "1"], "--point and --box are for one image, got 2"),
    ],
)
def test_nothing_is_written_for_bad_prompts_and_models(arguments, problem, coins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match=problem):
        segment.main([str(coins), *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_broken_image_is_named_and_the_others_are_segmented(scenes, coins, tmp_path):
    (tmp_path / "broken.png").touch()
    with pytest.raises(SystemExit, match=r"broken\.png: cannot be read"):
        run(tmp_path / "broken.png", coins, "--everything", "--grid", "4", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "coins-labels.png").exists()
    with pytest.raises(SystemExit, match=r"broken\.png: cannot be read"):
        run(tmp_path / "broken.png", "--point", "1", "1", "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_results_replace_only_those_of_an_earlier_run(coins, tmp_path):
    run(coins, *POINTS, "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"out is not empty: .* --force"):
        run(coins, *POINTS, "--output", tmp_path / "out")
    run(coins, *POINTS, "--output", tmp_path / "out", "--force")
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(SystemExit, match=r"also holds mine\.txt"):
        run(coins, *POINTS, "--output", tmp_path / "out", "--force")
    with pytest.raises(SystemExit, match="which is read, are the same"):
        run(coins, *POINTS, "--output", coins.parent, "--force")


@pytest.mark.slow
def test_images_are_read_as_in_training(coins, tmp_path):
    """16-bit images by the intensities that came with the model, unless others are given."""
    pixels = Coins().read().image[..., 0].astype(np.uint16) * 10
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    expected = picture(run(coins, *POINTS, "--output", tmp_path / "plain") / "coins-labels.png")
    deep = [tmp_path / "deep.png", *POINTS]
    same = run(*deep, "--intensity", "percentile", "0", "100", "--output", tmp_path / "a")
    other = run(*deep, "--intensity", "dtype", "--output", tmp_path / "b")
    assert (picture(same / "deep-labels.png") == expected).mean() > 0.98
    assert (picture(other / "deep-labels.png") != expected).mean() > 0.02
    with pytest.raises(SystemExit, match="--intensity bright"):
        run(*deep, "--intensity", "bright", "--output", tmp_path / "c")
    with pytest.raises(SystemExit, match=r"deep\.png.* more than --max-pixels 9"):
        run(*deep, "--max-pixels", "9", "--output", tmp_path / "d")
