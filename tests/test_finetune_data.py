"""What the fine-tuning recipe reads, refuses, cuts, keeps for validation and asks the model about."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from images_and_masks import BadData, Coins, Source, coco_images, paired_files, read_image, read_mask
from PIL import Image
from prompts import OUTSIDE, PADDING, Collator, Encoder, Prompts, TrainingSet, ValidationSet
from pycocotools import mask as rle
from samples import Sample, shrink, split, tiles


MASK_SIDE = 32  # of the tiny models


class Array(Source):
    """An image and labels in memory."""

    def __init__(self, labels: np.ndarray, name: str = "array"):
        self.name = name
        self.labels = labels
        self.image = np.stack([labels * 20 % 256] * 3, -1).astype(np.uint8)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        return self.image, self.labels


def blocks(height: int = 40, width: int = 48) -> np.ndarray:
    """Labels of six blocks of 8 x 10 pixels, numbered with gaps."""
    labels = np.zeros((height, width), dtype=np.int64)
    for number in range(6):
        row, column = divmod(number, 3)
        labels[4 + 20 * row : 12 + 20 * row, 3 + 16 * column : 13 + 16 * column] = 10 * number + 300
    return labels


def save_pair(folder: Path, stem: str, labels: np.ndarray) -> tuple[Path, Path]:
    paths = folder / "images" / f"{stem}.png", folder / "masks" / f"{stem}.png"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([labels * 20 % 256] * 3, -1).astype(np.uint8)).save(paths[0])
    Image.fromarray(labels.astype(np.uint16)).save(paths[1])
    return paths


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
WIDE = np.arange(12, dtype=np.uint16).reshape(3, 4) * 300 + 1000  # scaled to 0 ... 255
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)
STRETCHED = np.round(np.arange(12).reshape(3, 4) * 255 / 11)


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("grey.png", GREY, GREY),
        ("grey16.png", WIDE, STRETCHED),
        ("rgb.png", COLOUR, COLOUR),
        ("rgba.png", np.dstack([COLOUR, GREY]), COLOUR),
        ("grey.tif", GREY, GREY),
        ("grey16.TIF", WIDE, STRETCHED),
        ("rgb.tiff", COLOUR, COLOUR),
        ("rgba.tiff", np.dstack([COLOUR, GREY]), COLOUR),
        ("rgb16.tiff", np.dstack([WIDE] * 3), STRETCHED),
        ("rgba16.tiff", np.dstack([WIDE] * 3 + [65535 + 0 * WIDE]), STRETCHED),
        ("planes.tiff", np.moveaxis(COLOUR, 2, 0), COLOUR),
        ("bits.png", GREY > 100, 255 * (GREY > 100)),
    ],
)
def test_reads_every_kind_of_image(name, pixels, expected, tmp_path):
    path = tmp_path / name
    if name.lower().endswith(("tif", "tiff")):
        planar = "separate" if name.startswith("planes") else None
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", planarconfig=planar)
    else:
        Image.fromarray(pixels).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    if expected.ndim == 2:
        expected = np.dstack([expected] * 3)
    np.testing.assert_array_equal(image, expected)


def test_reads_jpeg_as_it_is_meant_to_be_seen(tmp_path):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    np.testing.assert_allclose(read_image(tmp_path / "turned.jpg"), upright, atol=3)


def test_reads_palette_images_as_colours_and_palette_masks_as_labels(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode=None).convert("P")
    image.putdata([0, 1, 2, 1])
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), [[0, 1], [2, 1]])
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png")[0], [[0, 0, 0], [255, 0, 0]])


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_reads_masks(suffix, dtype, tmp_path):
    labels = np.array([[0, 1, 1], [200, 0, 255]], dtype=dtype) * (dtype == np.uint16 or 1)
    path = tmp_path / f"mask.{suffix}"
    tifffile.imwrite(path, labels) if suffix == "tif" else Image.fromarray(labels).save(path)
    np.testing.assert_array_equal(read_mask(path), labels)


def png_of_16_bit_colours(height: int, width: int) -> bytes:
    """Black, by hand, as Pillow writes none."""
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(bytes((1 + 6 * width) * height)),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def broken_folders(folder: Path) -> dict[str, str]:
    """Makes every mistake at once; returns what must be said about each file."""
    for stem in ("good", "size", "colour", "text", "deep", "float", "pages", "lonely", "twice"):
        save_pair(folder, stem, blocks())
    images, masks = folder / "images", folder / "masks"
    Image.fromarray(blocks(40, 44).astype(np.uint16)).save(masks / "size.png")
    Image.fromarray(COLOUR).save(masks / "colour.png")
    (images / "text.png").write_text("no image")
    (images / "deep.png").write_bytes(png_of_16_bit_colours(40, 48))
    for stem, pixels in (("float", np.zeros((40, 48), np.float32)), ("pages", np.zeros((9, 40, 48), np.uint8))):
        (images / f"{stem}.png").unlink()
        tifffile.imwrite(images / f"{stem}.tif", pixels, photometric="minisblack")
    return {
        "size.png": "48 x 40 pixels and its mask 44 x 40",
        "colour.png": "expected one integer per pixel",
        "text.png": "cannot be read",
        "deep.png": "it has 16 bits per colour",
        "float.tif": "expected 8 or 16 bits",
        "pages.tif": "it has 9 pages; expected one",
    }


def test_names_every_bad_file_at_once(tmp_path):
    expected = broken_folders(tmp_path)
    with pytest.raises(BadData) as raised:
        split(paired_files(tmp_path / "images", tmp_path / "masks"), MASK_SIDE)
    lines = str(raised.value).splitlines()
    assert len(lines) == len(expected)
    for name, problem in expected.items():
        assert [problem in line for line in lines if name in line] == [True]


def test_names_every_unpaired_file(tmp_path):
    for stem in ("good", "no-mask", "no-image", "twice"):
        save_pair(tmp_path, stem, blocks())
    (tmp_path / "masks" / "no-mask.png").unlink()
    (tmp_path / "images" / "no-image.png").unlink()
    Image.fromarray(COLOUR).save(tmp_path / "images" / "twice.jpg")
    Image.fromarray(COLOUR).save(tmp_path / "masks" / "lossy.jpg")
    (tmp_path / "images" / ".hidden").touch()
    with pytest.raises(BadData) as raised:
        paired_files(tmp_path / "images", tmp_path / "masks")
    lines = str(raised.value).splitlines()
    assert len(lines) == 4
    for name, problem in {
        "images/no-mask.png": "no partner",
        "masks/no-image.png": "no partner",
        "masks/lossy.jpg": "is none of .png",
        "images/twice": "same name",
    }.items():
        assert any(name in line and problem in line for line in lines), name
    with pytest.raises(BadData, match="not a folder"):
        paired_files(tmp_path / "nowhere", tmp_path / "masks")


def test_long_lists_of_problems_are_cut():
    assert str(BadData(map(str, range(50)))).splitlines()[-1] == "and 30 more"


def coco_file(folder: Path, **changes) -> Path:
    labels = blocks()
    save_pair(folder, "a", labels)
    block = np.asfortranarray(labels == 310, dtype=np.uint8)
    run_lengths = {**rle.encode(block)}
    run_lengths["counts"] = run_lengths["counts"].decode()
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 40, "width": 48},
            {"id": 8, "file_name": "empty.png", "height": 40, "width": 48},
        ],
        "categories": [{"id": 1, "name": "block"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "area": 900, "segmentation": [[2, 2, 46, 2, 46, 38, 2, 38]]},
            {"id": 2, "image_id": 7, "category_id": 1, "area": 80, "segmentation": run_lengths},
            {"id": 3, "image_id": 7, "category_id": 1, "area": 9, "segmentation": [[0, 0, 1, 0, 1, 1]], "iscrowd": 1},
        ],
        **changes,
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_the_smaller_object_is_in_front_without_areas(tmp_path):
    outlines = [[20, 10, 30, 10, 30, 20, 20, 20], [2, 2, 46, 2, 46, 38, 2, 38]]
    annotations = [
        {"id": number, "image_id": 7, "category_id": 1, "area": None, "segmentation": [outline]}
        for number, outline in enumerate(outlines, start=1)
    ]
    (source,), _ = coco_images(tmp_path / "images", coco_file(tmp_path, annotations=annotations))
    _, labels = source.read()
    assert labels[15, 25] == 2
    assert labels[5, 5] == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_reads_coco_polygons_and_run_lengths(tmp_path, capsys):
    sources, notes = coco_images(tmp_path / "images", coco_file(tmp_path))
    (source,) = sources
    _, labels = source.read()
    np.testing.assert_array_equal(labels == 2, blocks() == 310)
    assert (labels[2:38, 2:46] > 0).all()
    assert [note[:10] for note in notes] == ["1 images a", "1 annotati"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": [{"id": 7, "file_name": "b.png", "height": 40, "width": 48}]}, "b.png: is named in"),
        ({"images": [{"id": 7, "file_name": "a.png", "height": 41, "width": 48}]}, "48 x 40 pixels"),
        (
            {"annotations": [{"id": 1, "image_id": 9, "category_id": 1, "segmentation": []}]},
            "image 9, which it does not list",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 7, "category_id": 1, "segmentation": {"counts": "x"}}]},
            "annotation 5 is broken",
        ),
        ({"annotations": []}, "annotates no object"),
        ({"images": [{"id": 7}]}, "not a COCO annotation file"),
    ],
)
def test_refuses_bad_coco(changes, problem, tmp_path):
    file = coco_file(tmp_path, **changes)
    with pytest.raises(BadData, match=problem):
        split(coco_images(tmp_path / "images", file)[0], MASK_SIDE)
    file.write_text("{")
    with pytest.raises(BadData, match="not a COCO annotation file"):
        coco_images(tmp_path / "images", file)


def test_tiles_cover_the_image_and_overlap():
    seen = np.zeros((100, 37), dtype=int)
    windows = list(tiles((slice(0, 100), slice(0, 37)), 40, 0.25))
    for window in windows:
        assert seen[window].shape == (40, 37)
        seen[window] += 1
    assert seen.min() == 1
    assert [window[0].start for window in windows] == [0, 30, 60]


def test_labels_agree_between_tiles():
    labels = blocks()
    found = split([Array(labels), Array(labels.copy())], MASK_SIDE, 0.5, tile=24, min_area=1)
    for sample in found.train + found.validation:
        assert np.array_equal(sample.read()[1], labels[sample.window])
        assert set(sample.ids) == set(np.unique(labels[sample.window])) - {0}
    shown = [label for sample in found.train for label in sample.ids]
    assert set(shown) == set(np.unique(labels)) - {0}
    assert len(shown) > 6, "overlapping tiles share objects"


def test_tiny_fragments_are_left_out_and_counted():
    labels = blocks()
    labels[0, 0], labels[39, 0] = 1, 2
    found = split([Array(labels), Array(labels.copy())], MASK_SIDE, 0.5, min_area=4)
    for sample in found.train + found.validation:
        assert not {1, 2} & set(sample.ids)
        assert (shrink(labels, MASK_SIDE) == sample.ids[:, None, None]).sum((1, 2)).min() >= 4
    assert any(note.startswith("4 objects") for note in found.notes)


def test_whole_images_are_kept_for_validation():
    sources: list[Source] = [Array(blocks(), str(number)) for number in range(10)]
    found = split(sources, MASK_SIDE, 0.3, tile=24)
    names = [{sample.source.name for sample in samples} for samples in (found.train, found.validation)]
    assert [len(part) for part in names] == [7, 3]
    assert not names[0] & names[1]
    again = split(sources, MASK_SIDE, 0.3, tile=24)
    assert {sample.source.name for sample in again.validation} == names[1]
    assert {sample.source.name for sample in split(sources, MASK_SIDE, 0.3, seed=1).validation} != names[1]


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_of_one_image_a_part_is_kept_and_nothing_reaches_into_both(tile, turned):
    labels = blocks().T if turned else blocks()
    found = split([Array(labels)], MASK_SIDE, 0.5, tile=tile, min_area=1)
    parts = []
    for samples in (found.train, found.validation):
        seen = np.zeros(labels.shape, dtype=bool)
        for sample in samples:
            seen[sample.window] = True
        parts.append((seen, {label for sample in samples for label in sample.ids}))
    (train, train_ids), (validation, validation_ids) = parts
    assert not (train & validation).any()
    assert train_ids and validation_ids and not train_ids & validation_ids
    spanning = {310, 340}  # the blocks in the middle
    assert not spanning & (train_ids | validation_ids)
    assert any(note.startswith("2 objects reach") for note in found.notes)


def test_nothing_to_validate_on_is_said():
    labels = np.zeros((40, 48), dtype=np.int64)
    labels[4:12, 4:12] = 1
    with pytest.raises(BadData, match="no object to validate on"):
        split([Array(labels)], MASK_SIDE)


def test_coins():
    _, labels = Coins().read()
    assert len(np.unique(labels)) == 25


def training_set(processor, size: int = 12, **changes) -> TrainingSet:
    samples = split([Array(blocks(), str(n)) for n in range(4)], MASK_SIDE, 0.25, min_area=1).train
    kind = changes.pop("prompts", Prompts("mixed", points=2, negative_points=2))
    return TrainingSet(samples, Encoder(processor, MASK_SIDE, kind), size, **{"step_size": 3, **changes})


def test_items_depend_on_seed_and_number_alone(processor):
    items = list(map(training_set(processor).__getitem__, range(12)))
    torch.manual_seed(5), np.random.seed(5)
    again = training_set(processor, size=100)
    for number in reversed(range(12)):
        torch.testing.assert_close(again[number], items[number], rtol=0, atol=0)
    other = training_set(processor, seed=1)
    assert not all(torch.equal(other[n]["pixel_values"], items[n]["pixel_values"]) for n in range(12))


def test_each_sample_is_drawn_before_any_is_drawn_again(processor):
    drawn = training_set(processor)
    for turn in range(4):
        assert len({drawn.draw(3 * turn + place).source.name for place in range(3)}) == 3


def test_a_step_has_prompts_of_one_kind(processor):
    items = training_set(processor)
    kinds = ["box" if "input_boxes" in items[number] else "point" for number in range(12)]
    assert kinds == ["point"] * 3 + ["box"] * 3 + ["point"] * 3 + ["box"] * 3
    batch = Collator(multimask=True)([items[number] for number in range(3)])
    assert batch["input_points"].shape == (3, 6, 4, 2)
    assert batch["labels"].shape == (3, 6, MASK_SIDE, MASK_SIDE)
    assert batch["multimask_output"] is True


@pytest.mark.parametrize("augment", ["none", "crop", "turn"])
def test_prompts_belong_to_the_targets(augment, processor):
    """Positive points lie in the target mask, negative ones beside it, boxes around it."""
    items = training_set(processor, augment=augment, prompts=Prompts("mixed", points=2, negative_points=2, jitter=0))
    for number in range(12):
        item = items[number]
        for index, target in enumerate(item["labels"]):
            rows, columns = np.nonzero(target.numpy() == 1)
            if "input_boxes" in item:
                box = item["input_boxes"][index].numpy() / 2  # of 64 pixels to masks of 32
                np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=2)
                continue
            for (x, y), label in zip(item["input_points"][index], item["input_labels"][index], strict=True):
                near = target[max(0, int(y / 2) - 1) : int(y / 2) + 2, max(0, int(x / 2) - 1) : int(x / 2) + 2]
                assert label == 0 or (near == 1).any()
                assert label == 1 or (near <= 0).any()
    assert (items[0]["labels"] == OUTSIDE).any() == True  # noqa: E712, it is not square


def test_an_object_that_fills_the_image_has_no_points_beside_it(processor):
    everything = Sample(Array(np.ones((40, 40), dtype=np.int64)), np.s_[:, :], np.array([1]))
    encode = Encoder(processor, MASK_SIDE, Prompts("point", points=1, negative_points=1))
    assert ValidationSet([everything], encode)[0]["input_labels"].tolist() == [[1, PADDING]]


def test_validation_asks_for_every_object_once(processor):
    samples = split([Array(blocks(), str(n)) for n in range(4)], MASK_SIDE, 0.5).validation
    items = ValidationSet(samples, Encoder(processor, MASK_SIDE, Prompts("mixed")), objects=4)
    shapes = [len(items[index]["labels"]) for index in range(len(items))]
    assert shapes == [4, 2, 4, 2] * 2
    np.testing.assert_allclose(items[0]["input_points"][0, 0] * 48 / 64, [7, 7], atol=1.5)  # the middle of the block
