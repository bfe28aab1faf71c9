"""Images and objects from data sets of the `datasets` library, offline and from a Hub on this machine."""

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hub import Hub
from huggingface_hub import constants
from labelled_images import MASK_SIDE, blocks
from PIL import Image

import finetune
from image_data.layouts import read_data, read_parts
from image_data.overlaps import mask_of
from image_data.pillow_images import DataError
from image_data.sources import LabelledImage


datasets.disable_progress_bars()
SQUARE = [[20, 10, 30, 10, 30, 20, 20, 20]]
GREY = (blocks() % 251).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> dict[str, Any]:
    """An image as Parquet files hold it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


def table(masks: list[Any], feature: Any, image: Any = None, **columns: Any) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "mask": feature})
    return datasets.Dataset.from_dict(
        {"image": [image or encoded(GREY)] * len(masks), "mask": masks}, features=features
    )


def read(*arguments: str) -> list[LabelledImage]:
    """Reads all images of the training part."""
    return [source.read() for source in read_parts(finetune.parse_args([*arguments]).data).train.sources]


def saved(data: datasets.Dataset, folder: Path, name: str = "data.parquet") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("feature", [datasets.Image(), datasets.Array2D((40, 48), "int32")], ids=["image", "array"])
def test_instance_ids(kind, feature, tmp_path):
    labels = blocks().astype(np.uint16)
    masks = [encoded(labels, kind) if isinstance(feature, datasets.Image) else labels.astype(np.int32)] * 2
    data = table(masks, feature, encoded(GREY, kind))
    for whole in read("--dataset", saved(data, tmp_path)):
        np.testing.assert_array_equal(whole.labels, labels)
        np.testing.assert_array_equal(whole.image[..., 0], GREY)


def test_arrays_of_truth_values(tmp_path):
    data = table([blocks() == 310] * 2, datasets.Array2D((40, 48), "bool"))
    for whole in read("--dataset", saved(data, tmp_path)):
        np.testing.assert_array_equal(whole.labels, blocks() == 310)


def test_lists_of_binary_masks_may_overlap(tmp_path):
    masks = [np.zeros((40, 48), np.uint8) for _ in range(3)]
    masks[0][5:20, 5:20], masks[1][10:30, 10:30] = 255, 1
    data = table([[encoded(mask) for mask in masks], None], datasets.List(datasets.Image()))
    first, second = read("--dataset", saved(data, tmp_path))
    for number, mask in enumerate(masks[:2], start=1):
        np.testing.assert_array_equal(mask_of(first.labels, number), mask > 0)
    assert first.left_out == {"masks are left out: they are empty": 1} and not second.labels.any()


@pytest.mark.parametrize("size", [(40, 48), (40, 40)])
def test_masks_are_turned_with_their_images(size, tmp_path):
    """Where the size leaves a doubt, only if that is asked for; else it is said."""
    labels, grey = blocks()[: size[0], : size[1]].astype(np.uint16), GREY[: size[0], : size[1]]
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(stream, "PNG", exif=exif)
    path = saved(table([encoded(labels)] * 2, datasets.Image(), {"bytes": stream.getvalue(), "path": None}), tmp_path)
    for option in ([], ["--turn-masks"]):
        whole = read("--dataset", path, *option)[0]
        np.testing.assert_array_equal(whole.image[..., 0], np.rot90(grey, -1))
        is_turned = bool(option) or size[0] != size[1]
        np.testing.assert_array_equal(whole.labels, np.rot90(labels, -1) if is_turned else labels)
        assert ("but not their masks" in str(whole.notes)) != is_turned and len(whole.notes) == 1


@pytest.mark.parametrize(
    ("are_lists", "option", "problem"),
    [
        (True, ["--void", "255"], "--void: expected label images; mask in .* has objects"),
        (False, ["--categories", "cell"], "--categories: expected objects with a category; mask in .* has masks"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(are_lists, option, problem, tmp_path):
    mask = encoded(blocks().astype(np.uint16))
    feature = datasets.List(datasets.Image()) if are_lists else datasets.Image()
    path = saved(table([[mask] if are_lists else mask] * 2, feature), tmp_path)
    with pytest.raises(DataError, match=problem):
        read("--dataset", path, *option)


def test_parts_of_semantic_masks(tmp_path):
    data = table([encoded(((blocks() > 0) * 7).astype(np.uint8))] * 2, datasets.Image())
    whole = read("--dataset", saved(data, tmp_path), "--instances", "components")
    assert [len(np.unique(each.labels)) for each in whole] == [7, 7]


@pytest.mark.parametrize("is_folder", [True, False])
def test_soft_edges_are_asked_about_whatever_else_is_given(is_folder, tmp_path):
    """As in folders: each part of each grey at a border would be an object."""
    soft = Image.fromarray(((blocks() > 0) * 255).astype(np.uint8)).resize((192, 160), Image.Resampling.BILINEAR)
    image = Image.fromarray(np.zeros((160, 192, 3), np.uint8))
    if is_folder:
        for name, picture in (("images", image), ("masks", soft)):
            (tmp_path / name).mkdir()
            picture.save(tmp_path / name / "a.png")
        source = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    else:
        source = ["--dataset", saved(table([encoded(np.asarray(soft))], datasets.Image()), tmp_path)]
    with pytest.raises(DataError, match="soft edges"):
        read(*source, "--background", "0", "--void", "none", "--instances", "components")


@pytest.mark.parametrize("is_list", [True, False], ids=["list of structures", "structure of lists"])
@pytest.mark.parametrize("category", [datasets.ClassLabel(names=["cell", "dust"]), datasets.Value("int64")])
def test_objects_as_in_coco(is_list, category, tmp_path):
    fields = {
        "segmentation": datasets.List(datasets.List(datasets.Value("float64"))),
        "category": category,
        "bbox": datasets.List(datasets.Value("float64")),
    }
    objects = {"segmentation": [SQUARE, [], SQUARE], "category": [1, 0, 1], "bbox": [[1.0, 1.0, 9.0, 9.0]] * 3}
    rows = [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    feature = datasets.List(fields) if is_list else {name: datasets.List(each) for name, each in fields.items()}
    data = table([rows if is_list else objects] * 2, feature).rename_column("mask", "objects")
    whole, _ = read("--dataset", saved(data, tmp_path))
    assert mask_of(whole.labels, 1)[15, 25]
    assert whole.categories == {1: "dust" if isinstance(category, datasets.ClassLabel) else "1"}
    assert {text.split("they ")[1]: number for text, number in whole.left_out.items()} == {
        "have a box but no mask": 1,
        "repeat another one": 1,
    }
    if isinstance(category, datasets.ClassLabel):
        (other, _) = read("--dataset", saved(data, tmp_path), "--categories", "cell")
        assert not other.labels.any()


def test_run_lengths(tmp_path):
    runs = {"size": [40, 48], "counts": [0, 5, 40 * 48 - 5]}
    feature = datasets.List(
        {
            "segmentation": {
                "size": datasets.List(datasets.Value("int64")),
                "counts": datasets.List(datasets.Value("int64")),
            }
        }
    )
    whole, _ = read("--dataset", saved(table([[{"segmentation": runs}]] * 2, feature), tmp_path))
    assert (whole.labels > 0).sum() == 5 and not whole.categories


def image_folder(folder: Path, *splits: str) -> None:
    """A folder with images, masks and the metadata that name them."""
    for split in splits:
        lines = []
        for number in range(3):
            for kind, pixels in (("image", GREY), ("mask", blocks().astype(np.uint16))):
                path = folder / split / f"{kind}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            lines.append(json.dumps({"file_name": f"image{number}.png", "mask_file_name": f"mask{number}.png"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def test_image_folders_and_their_splits(tmp_path):
    image_folder(tmp_path / "photos", "train", "validation", "test")
    settings = finetune.parse_args(["--dataset", str(tmp_path / "photos")]).data
    parts, about = read_data(settings, MASK_SIDE, 0)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [3, 3, 3]
    assert about == "9 images from photos"
    assert "the splits divide the images: train (3 images), validation (3 images), test (3 images)" in parts.notes


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (["--split", "train"], [2, 1, 0]),
        (["--split", "train[:2]", "--validation-split", "test"], [2, 3, 0]),
        (["--validation-split", "train[2:]", "--split", "train[:2]", "--test-split", "test"], [2, 1, 3]),
    ],
)
def test_splits_that_are_chosen(arguments, sizes, tmp_path):
    image_folder(tmp_path, "train", "validation", "test")
    parts, _ = read_data(finetune.parse_args(["--dataset", str(tmp_path), *arguments]).data, MASK_SIDE, 0)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == sizes


def test_data_sets_saved_to_disk(tmp_path):
    data = table([encoded(blocks().astype(np.uint16))] * 3, datasets.Image())
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, valid=data).save_to_disk(tmp_path / "two")
    assert len(read("--dataset", str(tmp_path / "one"))) == 3
    assert list(read_parts(finetune.parse_args(["--dataset", str(tmp_path / "two")]).data).given) == [
        "train",
        "validation",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--image-column", "photo"], r"--image-column photo: expected a column of images, one of image \(Image\)"),
        (["--image-column", "count"], r"--image-column count: expected a column of images"),
        (["--mask-column", "count"], r"--mask-column count: expected label images, lists of masks, or objects"),
        (["--mask-column", "nothing"], r"--mask-column nothing: expected label images"),
        (["--split", "other"], r"--dataset .*other.*It has the splits train"),
        (["--validation-split", "other"], r"--dataset .*other.*It has the splits train"),
    ],
)
def test_columns_and_splits_that_are_missing_are_named(arguments, problem, tmp_path):
    data = table([encoded(blocks().astype(np.uint16))] * 2, datasets.Image()).add_column("count", [1, 2])
    with pytest.raises(DataError, match=problem) as raised:
        read("--dataset", saved(data, tmp_path), *arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("broken.parquet", b"PAR1 broken", r"broken\.parquet: cannot be loaded"),
        ("empty", None, "cannot be loaded"),
        ("other.txt", b"text", r"expected a Hub id, a folder, or a file \.parquet"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(name, content, problem, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as raised:
        read("--dataset", str(path))
    assert "\n" not in str(raised.value)


def test_bad_rows_are_all_named(tmp_path):
    good = encoded(blocks().astype(np.uint16))
    masks = [good, encoded(blocks(44, 48).astype(np.uint16)), {"bytes": b"no image", "path": None}, None]
    path = saved(table(masks, datasets.Image()), tmp_path)
    with pytest.raises(DataError) as raised:
        read_data(finetune.parse_args(["--dataset", path]).data, MASK_SIDE, 0)
    lines = str(raised.value).splitlines()
    assert [f"row {number}" in line for number, line in enumerate(lines, start=1)] == [True] * 3
    for line, problem in zip(
        lines, ["got 48 x 44", "cannot be read", "expected a mask (H, W) of integers, got None"], strict=True
    ):
        assert problem in line and tempfile.gettempdir() + "/tmp" not in line


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--dataset d --images i", "--dataset: expected no --images, --masks or --coco"),
        ("--dataset d --group-pattern {group}_*", "expected --group-column with --dataset"),
        ("--group-column patient", "--group-column: expected --dataset, too"),
        ("--dataset-revision main", "--dataset-revision: expected --dataset, too"),
        ("--split train", "--split: expected --dataset, too"),
        ("--mask-column m", "--mask-column: expected --dataset, too"),
        ("--dataset d --validation-split v --validation 0.2", "--validation and --validation-"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit) as raised:
        finetune.main(arguments.split())
    assert raised.value.code == 2 and problem in capsys.readouterr().err


@pytest.fixture
def datasets_hub(hub: Hub, monkeypatch, tmp_path) -> Hub:
    """The Hub, and `datasets` that uses it, with an empty cache."""
    endpoint = constants.ENDPOINT
    for name, value in {
        "HF_ENDPOINT": endpoint,
        "HUB_DATASETS_URL": endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": tmp_path / "cache",
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    return hub


def test_a_data_set_on_the_hub(datasets_hub, tmp_path):
    data = table([encoded(blocks().astype(np.uint16))] * 3, datasets.Image())
    saved(data, tmp_path / "repo", "train-00000-of-00001.parquet")
    saved(data, tmp_path / "repo", "validation-00000-of-00001.parquet")
    datasets_hub.add("datasets/user/cells", tmp_path / "repo")
    parts, about = read_data(finetune.parse_args(["--dataset", "user/cells"]).data, MASK_SIDE, 0)
    assert [len(part) for part in (parts.train, parts.validation)] == [3, 3] and about == "6 images from user/cells"
    np.testing.assert_array_equal(parts.train[0].read()[1], blocks())
    with pytest.raises(DataError, match=r"--dataset user/dust: cannot be loaded: Dataset 'user/dust' doesn't exist"):
        read("--dataset", "user/dust")


def test_a_revision_of_a_data_set_on_the_hub(datasets_hub, tmp_path):
    for number in (2, 3):
        data = table([encoded(blocks().astype(np.uint16))] * number, datasets.Image())
        saved(data, tmp_path / str(number), "train-00000-of-00001.parquet")
    repo = datasets_hub.add("datasets/user/cells", tmp_path / "2")
    first = repo.refs["main"]
    repo.commit("main", datasets_hub.add("datasets/user/other", tmp_path / "3").commits.popitem()[1])
    assert len(read("--dataset", "user/cells")) == 3
    assert len(read("--dataset", "user/cells", "--dataset-revision", first)) == 2
    with pytest.raises(DataError, match=r"--dataset user/cells: cannot be loaded: .*absent"):
        read("--dataset", "user/cells", "--dataset-revision", "absent")
    with pytest.raises(DataError, match="--dataset-revision main: expected a Hub id"):
        read("--dataset", str(tmp_path / "2"), "--dataset-revision", "main")


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_group_stay_together(seed, tmp_path):
    data = table([encoded(blocks().astype(np.uint16))] * 12, datasets.Image())
    path = saved(data.add_column("patient", [n % 4 for n in range(12)]), tmp_path)
    arguments = ["--dataset", path, "--group-column"]
    parts, _ = read_data(finetune.parse_args([*arguments, "patient"]).data, MASK_SIDE, seed)
    groups = [{sample.source.index % 4 for sample in part} for part in (parts.train, parts.validation)]
    assert [len(part) for part in groups] == [3, 1] and not groups[0] & groups[1]
    with pytest.raises(DataError, match="--group-column image: expected a column of text or numbers, one of patient"):
        read(*arguments, "image")


def test_groups_in_two_splits_and_rows_without_a_group_are_refused(tmp_path):
    def data(*groups):
        mask = encoded(blocks().astype(np.uint16))
        return table([mask] * len(groups), datasets.Image()).add_column("patient", groups)

    datasets.DatasetDict(train=data("a", "b"), test=data("c", "b")).save_to_disk(tmp_path / "shared")
    with pytest.raises(DataError, match="shared, test, row 1: its group b is in train and in test"):
        read("--dataset", str(tmp_path / "shared"), "--group-column", "patient")
    with pytest.raises(DataError, match="row 1: has no patient"):
        read("--dataset", saved(data("a", None), tmp_path), "--group-column", "patient")


def test_the_package_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'the package datasets is missing: install it with pip install "\.\[datasets'):
        read("--dataset", "user/cells")
