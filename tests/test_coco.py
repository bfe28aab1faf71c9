"""COCO annotations as tools write them: what is read, what is counted, and what is refused."""

import copy
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_images import MASK_SIDE, blocks, run_lengths, save_pair
from PIL import Image
from pycocotools import mask as peer

from image_data.coco import coco_images
from image_data.coco_masks import decode
from image_data.overlaps import mask_of
from image_data.pillow_images import DataError
from image_data.samples import TrainValidationParts, train_validation_parts
from image_data.sources import SourceList


SQUARE = [[20, 10, 30, 10, 30, 20, 20, 20]]
POLYGONS = [SQUARE[0], np.reshape(SQUARE, (4, 2)).tolist(), [list(map(str, SQUARE[0]))]]  # other spellings
FRAME = [[2, 2, 46, 2, 46, 38, 2, 38]]


def annotation(segmentation: Any, number: Any = 1, image: Any = 7, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": segmentation, **more}


def content(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 48}],
        "categories": [{"id": 1, "name": "block"}, {"id": 2, "name": "disc"}],
        "annotations": list(annotations),
    }


def read(folder: Path, data: Any, **options: Any) -> SourceList:
    """Reads a COCO file of `data`, beside images a.png, b.png and c.png of 48 x 40 pixels."""
    if not (folder / "images").exists():
        for stem in "abc":
            save_pair(folder, stem, blocks())
    file = folder / "coco.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return coco_images(folder / "images", file, **options)


def parts_of(sources: SourceList) -> TrainValidationParts:
    return train_validation_parts(sources.sources, MASK_SIDE, 0.5, min_area=1)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_polygons_and_both_kinds_of_run_lengths_are_as_pycocotools_decodes_them(tmp_path):
    block = blocks() == 310
    holes = (np.indices((40, 48)).sum(0) % 7 < 3) & block
    counts = np.diff(np.flatnonzero(np.diff(block.T.ravel().astype(int), prepend=-1, append=-1))).tolist()
    segmentations = [
        FRAME,
        [*SQUARE, [3, 3, 9, 3, 3, 9]],
        [[-5.5, -3.25, 20.5, 4, 60, 20, 11, 50]],
        run_lengths(block),
        run_lengths(holes),
        {"size": [40, 48], "counts": counts},
    ]
    data = content(*(annotation(each, number) for number, each in enumerate(segmentations)))
    (source,) = read(tmp_path, data).sources
    labels = source.read().labels
    assert labels.shape[0] > 1, "the frame is under others"
    for number, each in enumerate(segmentations, start=1):
        runs = peer.frPyObjects(each, 40, 48) if isinstance(each, list) or isinstance(each["counts"], list) else each
        expected = peer.decode(peer.merge(runs) if isinstance(runs, list) else runs)
        if number < 6:
            np.testing.assert_array_equal(mask_of(labels, number), expected)
    assert source.read().left_out.total() == 1, "the last repeats the fourth"


def test_compressed_run_lengths_of_random_masks():
    rng = np.random.default_rng(0)
    for density in (0, 0.001, 0.1, 0.5, 0.9, 1):
        mask = rng.random((61, 130)) < density
        mask[0, 0] = True
        np.testing.assert_array_equal(decode(run_lengths(mask), mask.shape), mask)


def test_hidden_objects_keep_their_masks(tmp_path):
    data = content(annotation(SQUARE, 1), annotation(FRAME, 2), annotation([[22, 12, 28, 12, 28, 18, 22, 18]], 3))
    (source,) = read(tmp_path, data).sources
    labels = source.read().labels
    assert mask_of(labels, 1)[15, 25] and mask_of(labels, 2)[15, 25] and mask_of(labels, 3)[15, 25]
    assert mask_of(labels, 2).sum() == pytest.approx(44 * 36, rel=0.05)


def test_ids_are_the_same_as_numbers_strings_and_floats(tmp_path):
    data = content(annotation(SQUARE, "x", "7"), annotation(FRAME, None, 7.0), annotation([[1, 1, 9, 1, 9, 9]], 5, 7))
    data["annotations"][0]["category_id"] = "2"
    (source,) = read(tmp_path, data).sources
    assert source.read().categories == {1: "disc", 2: "block", 3: "block"}


def test_annotation_ids_may_restart_with_each_image(tmp_path, capsys):
    data = content(annotation(SQUARE, 1, 7), annotation(FRAME, 1, 8), annotation(SQUARE, 1, 9))
    data["images"] = [{"id": 7 + n, "file_name": f"{'abc'[n]}.png", "height": 40, "width": 48} for n in range(3)]
    sources = read(tmp_path, data)
    assert len(sources.sources) == 3 and not sources.left_out
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "size",
    [{}, {"height": None, "width": None}, {"height": "40", "width": "48"}, {"height": 40.0, "width": 48.0}],
    ids=str,
)
def test_sizes_may_be_missing_strings_or_floats(size, tmp_path):
    data = content(annotation(SQUARE))
    data["images"] = [{"id": 7, "file_name": "a.png", **size}]
    (source,) = read(tmp_path, data).sources
    assert mask_of(source.read().labels, 1)[15, 25]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (annotation(None, bbox=[1, 2, 3, 4]), "have a box but no mask"),
        (annotation([], bbox=[1, 2, 3, 4]), "have a box but no mask"),
        ({"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}, "have a box but no mask"),
        (annotation([[]]), "have no segmentation"),
        (annotation({}), "have no segmentation"),
        (annotation({"size": [40, 48], "counts": []}), "have no segmentation"),
        (annotation({"size": [40, 48], "counts": ""}), "have no segmentation"),
        (annotation(FRAME, iscrowd=1), "mark crowds"),
        (annotation(FRAME, iscrowd="1"), "mark crowds"),
        (annotation(SQUARE, 99), "repeat another"),
        (annotation([[100, 100, 120, 100, 120, 120]]), "are outside of the image"),
        (annotation([[-30, 5, -20, 5, -20, 25]]), "are outside of the image"),
        (annotation([[1e12, 1e12, 2e12, 1e12, 2e12, 2e12]]), "are outside of the image"),
        (annotation([[5, 5, 20, 20, 5, 5]]), "cover no pixel"),
        (annotation([[5, 5, 5, 5, 5, 5, 5, 5]]), "cover no pixel"),
        (annotation([[5, 5, 20, 20]]), "have fewer than three points"),
        (annotation([[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]), "have coordinates from 0 to 1"),
        (annotation({"size": [40, 48], "counts": [40 * 48]}), "cover no pixel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_object_is_counted_by_its_reason(bad, reason, tmp_path):
    data = content(annotation(SQUARE, 50), bad)
    sources = read(tmp_path, data)
    left_out = sources.left_out + sources.sources[0].read().left_out
    ((text, number),) = left_out.items()
    assert reason in text and number == 1


def test_objects_that_are_left_out_are_in_the_notes(tmp_path):
    data = content(annotation(SQUARE), annotation(SQUARE, 2), annotation(SQUARE, 3), annotation(SQUARE, 4, 8))
    data["images"].append({"id": 8, "file_name": "b.png"})
    assert parts_of(read(tmp_path, data)).left_out == {"annotations are left out: they repeat another one": 2}


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        ({"size": [40, 48], "counts": [10, 20]}, "run lengths add up to 30 pixels, and the image has 1920"),
        ({"size": [40, 48], "counts": [0, 10**30]}, "run lengths add up to"),
        ({"size": [40, 48], "counts": [2000, -80]}, "run lengths of 0 or more"),
        ({"size": [40, 48], "counts": [1.5, 1918.5]}, "run lengths of 0 or more"),
        ({"size": [40, 48], "counts": [float("nan"), 1920]}, "run lengths of 0 or more"),
        ({"size": [40, 48], "counts": "04"}, "run lengths add up to 4 pixels"),
        ({"size": [40, 48], "counts": "not a mask"}, "is no compressed run lengths"),
        ({"size": [40, 48], "counts": "o" * 100_000}, "is no compressed run lengths"),
        ({"size": [40, 48], "counts": "oo"}, "are cut off"),
        ({"size": [40, 48], "counts": {"a": 1}}, "expected run lengths"),
        ({"size": [100_000, 100_000], "counts": [0, 10**10]}, r"size \[40, 48\]"),
        ({"size": [48, 40], "counts": [0, 1920]}, r"size \[40, 48\] \(height, width\), got \[48, 40\]"),
        ({"size": 40, "counts": [0, 1920]}, r"size \[40, 48\]"),
        ([[1, 1, 20, float("nan"), 20, 20]], "not a finite number"),
        ([[1, 1, 20, 10**400, 20, 20]], "expected the coordinates"),
        ([[1, 1, float("inf"), 20, 20, 20]], "not a finite number"),
        ([[1, 1, 1e9, 20, 20, 20]], "an outline of 2e[+]09 pixels is too long"),
        ([[1, 1, 20, 1, 20]], "expected pairs of coordinates"),
        ([[1, 1, "x", 20, 20, 20]], "expected the coordinates"),
        ([[[1, 1], [2]], [[3, 3]]], "expected the coordinates"),
        ("polygon", "expected polygons or run lengths"),
        (17, "expected polygons or run lengths"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_segmentations_that_are_none_are_refused_with_the_name_of_the_annotation(segmentation, problem, tmp_path):
    sources = read(tmp_path, content(annotation(FRAME, 4), annotation(segmentation, 5)))
    with pytest.raises(DataError, match=rf"a\.png: annotation 5 \(2 of the list\): .*{problem}"):
        parts_of(sources)


def test_what_to_do_if_all_objects_are_elsewhere_is_said(tmp_path):
    data = content(annotation([[500, 500, 600, 500, 600, 600]]), annotation(SQUARE, 2, 8))
    data["images"].append({"id": 8, "file_name": "b.png"})
    with pytest.raises(DataError, match="Correct the annotations that are left out") as raised:
        parts_of(read(tmp_path, data))
    assert "1 annotations are left out: they are outside of the image" in str(raised.value)


@pytest.mark.parametrize("polygon", POLYGONS)
def test_other_spellings_of_a_polygon(polygon):
    np.testing.assert_array_equal(decode(polygon, (40, 48)), decode(SQUARE, (40, 48)))


def test_parts_of_one_object_may_be_polygons_and_run_lengths():
    empty, pixels = ({"size": [40, 48], "counts": counts} for counts in ([1920], [5, 10, 1905]))
    expected = decode(SQUARE, (40, 48)) | decode(pixels, (40, 48))
    np.testing.assert_array_equal(decode([SQUARE[0], empty, pixels], (40, 48)), expected)


def moved(change: Callable[[dict[str, Any]], Any], *annotations: dict[str, Any]) -> dict[str, Any]:
    """The usual content after `change`."""
    data = copy.deepcopy(content(*(annotations or [annotation(SQUARE)])))
    change(data)
    return data


def add_image(**entry: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["images"].append({"height": 40, "width": 48, **entry})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("{", "not a COCO annotation file: JSONDecodeError"),
        ("[" * 100_000, "not a COCO annotation file: RecursionError"),
        ([annotation(SQUARE)], "expected an object with a list of images"),
        ({"images": []}, "with a list of annotations"),
        ({"images": {}, "annotations": []}, "with a list of images"),
        (
            moved(lambda data: data["images"][0].pop("file_name")),
            "image 1 of the list: expected an id and a file_name",
        ),
        (moved(lambda data: data["images"].append("b.png")), "image 2 of the list: expected an id"),
        (moved(lambda data: data["annotations"].append(3)), "annotation 2 of the list refers to image None"),
        (moved(lambda data: data["annotations"][0].update(image_id=9)), "refers to image 9, which is not listed"),
        (
            moved(lambda data: data["images"][0].update(file_name="d.png")),
            "d.png: listed, but the file does not exist",
        ),
        (moved(lambda data: data["images"][0].update(file_name="x" * 5000)), "the file does not exist"),
        (
            moved(lambda data: data["images"][0].update(height="tall")),
            "expected numbers of pixels as height and width",
        ),
        (moved(lambda data: data["images"][0].update(height=10**400)), "expected numbers of pixels as height and"),
        (moved(lambda data: data["images"][0].update(height=-40)), "expected numbers of pixels as height and width"),
        (moved(add_image(id="7", file_name="b.png")), "b.png and a.png have one id, 7"),
        (
            moved(add_image(id=8, file_name="./a.png"), annotation(SQUARE), annotation(FRAME, 2, 8)),
            "a.png is listed as image 7 and as image 8",
        ),
        (
            moved(add_image(id=8, file_name="other/A.PNG"), annotation(SQUARE), annotation(FRAME, 2, 8)),
            "a.png is listed as image 7 and as image 8",
        ),
        (moved(lambda data: data["categories"].append({"id": 1, "name": "disc"})), "block and disc have one id, 1"),
        (moved(lambda data: data["annotations"].clear()), "has no object to use"),
        (content(annotation(SQUARE, iscrowd=1), annotation(FRAME, iscrowd=1)), "no object to use: 2 .* mark crowds"),
        (content(annotation([], bbox=[1, 2, 3, 4])), "no object to use: 1 .* have a box but no mask"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_files_are_refused_in_one_line(data, problem, tmp_path):
    with pytest.raises(DataError, match=rf"coco\.json: .*{problem}") as raised:
        read(tmp_path, data)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("height", "hint"), [(41, ""), (48, "Are width and height exchanged")])
def test_an_image_of_another_size_is_refused(height, hint, tmp_path):
    data = content(annotation(SQUARE))
    data["images"][0].update(height=height, width=40 if hint else 48)
    with pytest.raises(DataError, match=f"pixels .from the annotations., got 48 x 40.*{hint}"):
        parts_of(read(tmp_path, data))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("train/a b.png", "train/a b.png"),
        ("train\\a b.png", "train/a b.png"),
        ("train/a%20b.png", "train/a b.png"),
        ("a b.png", "train/a b.png"),
        ("A B.PNG", "train/a b.png"),
        ("C:\\Users\\me\\a b.png", "train/a b.png"),
        ("/data/upload/1/a b.png", "train/a b.png"),
        ("https://example.com/a%20b.png", "train/a b.png"),
        ("../../a b.png", "train/a b.png"),
        (unicodedata.normalize("NFD", "übung.png"), unicodedata.normalize("NFC", "übung.png")),
    ],
)
def test_finds_files_by_the_paths_that_tools_write(name, file, tmp_path):
    path = tmp_path / "images" / file
    path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(path)
    data = content(annotation(SQUARE))
    data["images"][0]["file_name"] = name
    assert [source.name for source in read(tmp_path, data).sources] == [str(path)]


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png", "train/../../secret.png", "..\\secret.png"])
def test_no_file_outside_of_the_folder_is_read(name, tmp_path):
    save_pair(tmp_path, "a", blocks())
    (tmp_path / "images" / "a.png").rename(tmp_path / "secret.png")
    data = content(annotation(SQUARE))
    data["images"][0]["file_name"] = name.format(folder=tmp_path)
    with pytest.raises(DataError, match=r"secret\.png: listed, but the file does not exist in"):
        read(tmp_path, data)


def test_a_name_that_two_files_have_is_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "images" / folder / "a.png")
    with pytest.raises(DataError, match=r"a\.png: could be .*one.*two"):
        read(tmp_path, content(annotation(SQUARE)))


def test_only_the_chosen_categories_are_used(tmp_path):
    data = content(annotation(SQUARE), annotation(FRAME, 2, category_id=2), annotation(FRAME, 3, category_id=5))
    sources = read(tmp_path, data, categories=["disc"])
    whole = sources.sources[0].read()
    assert list(whole.categories.values()) == ["disc"] and len(np.unique(whole.labels)) == 2
    assert dict(sources.left_out) == {"annotations are left out: they have other categories": 2}
    with pytest.raises(DataError, match=r"--categories dog: not in .*; expected some of block, disc"):
        read(tmp_path, data, categories=["dog", "disc"])


def test_categories_stay_with_the_objects_of_a_sample(tmp_path):
    data = content(
        annotation(SQUARE, category_id=2), annotation(FRAME, 2), annotation([[3, 22, 9, 22, 9, 36]], 3, category_id=5)
    )
    data["images"].append({"id": 8, "file_name": "b.png"})
    data["annotations"].append(annotation(SQUARE, 4, 8, category_id=2))
    parts = parts_of(read(tmp_path, data))
    named = {sample.source.name[-5:]: sample.categories for sample in parts.train + parts.validation}
    assert named == {"a.png": {1: "disc", 2: "block", 3: "category 5"}, "b.png": {1: "disc"}}


def test_images_that_are_named_by_their_url_alone_are_found(tmp_path):
    """As LVIS writes them."""
    image = {"id": 1, "coco_url": "http://images.cocodataset.org/train2017/a.png"}
    annotation = {"id": 1, "image_id": 1, "segmentation": [[20, 10, 30, 10, 30, 20, 20, 20]]}
    (source,) = read(tmp_path, {"images": [image], "annotations": [annotation]}).sources
    assert source.name.endswith("a.png")


def test_panoptic_annotations_are_refused_by_name(tmp_path):
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 1, "category_id": 1}]}
    data = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [annotation]}
    with pytest.raises(DataError, match=r"coco\.json: COCO panoptic annotations, .* as --masks, with --color-masks"):
        read(tmp_path, data)
