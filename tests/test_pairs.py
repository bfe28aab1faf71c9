"""Image and mask files that belong together: turned, in pages, and with masks that have to be asked about."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from labelled_images import MASK_SIDE, Array, blocks, save_coco, save_pair
from PIL import Image

from finetuning.command_line import parse
from finetuning.prompts import OUTSIDE, ItemEncoder, Prompts, TrainingSet, ValidationSet
from image_data.coco import coco_images
from image_data.folders import paired_files
from image_data.labels import VOID, LabelReading
from image_data.layouts import read_data
from image_data.pillow_images import DataError, ImageReading
from image_data.samples import train_validation_parts
from image_data.sources import Coins


def folders(path: Path) -> tuple[Path, Path]:
    for name in ("images", "masks"):
        (path / name).mkdir()
    return path / "images", path / "masks"


def photo(path: Path, stored: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)


def test_masks_of_the_stored_size_are_turned_with_their_images(tmp_path):
    images, masks = folders(tmp_path)
    labels = blocks().astype(np.uint16)
    for orientation in (6, 8):
        photo(images / f"{orientation}.png", (labels % 251).astype(np.uint8), orientation)
        Image.fromarray(labels).save(masks / f"{orientation}.png")
    for source, turns in zip(paired_files(images, masks).sources, (-1, 1), strict=True):
        whole = source.read()
        np.testing.assert_array_equal(whole.labels, np.rot90(labels, turns))
        np.testing.assert_array_equal(whole.image[..., 0], whole.labels % 251)
        assert list(whole.notes) == [TURNED.format("masks")]


TURNED = "images were turned upright, as their EXIF orientation says, and their {} with them"


@pytest.mark.parametrize("kind", ["colours", "a file per object", "COCO"])
def test_objects_of_every_layout_are_turned_with_images_of_the_stored_size(kind, tmp_path):
    images, masks = folders(tmp_path)
    labels = blocks().astype(np.uint8)
    photo(images / "a.png", labels, 6)
    numbers = np.unique(labels)[1:]
    if kind == "colours":
        Image.fromarray(np.dstack([labels, 255 * (labels > 0), 0 * labels]).astype(np.uint8)).save(masks / "a.png")
        (source,) = paired_files(images, masks, color_masks=True).sources
    elif kind == "COCO":
        save_coco(tmp_path / "coco.json", "a.png", labels)
        (source,) = coco_images(images, tmp_path / "coco.json").sources
    else:
        (masks / "a").mkdir()
        for number in numbers:
            Image.fromarray(labels == number).save(masks / "a" / f"{number}.png")
        (source,) = paired_files(images, masks, mask_pattern="{stem}/*.png").sources
    whole = source.read()
    expected = np.rot90(labels, -1)
    assert whole.image.shape[:2] == whole.labels.shape == expected.shape
    pairs = np.unique(np.stack([whole.labels.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == 7, "each object is one of those that were drawn"
    assert list(whole.notes) == [TURNED.format("annotations" if kind == "COCO" else "masks")]


def test_masks_that_fit_both_ways_are_turned_if_asked_for(tmp_path):
    images, masks = folders(tmp_path)
    labels = blocks().astype(np.uint16)
    photo(images / "a.png", (labels % 251).astype(np.uint8), 3)
    Image.fromarray(labels).save(masks / "a.png")
    (source,) = paired_files(images, masks).sources
    whole = source.read()
    np.testing.assert_array_equal(whole.labels, labels)
    assert "not their masks (--turn-masks)" in next(iter(whole.notes))
    (source,) = paired_files(images, masks, labels=LabelReading(turn_masks=True)).sources
    np.testing.assert_array_equal(source.read().labels, labels[::-1, ::-1])


@pytest.mark.parametrize("turn_masks", [False, True])
def test_masks_that_are_upright_already_stay_so_and_no_option_is_advised(turn_masks, tmp_path):
    images, masks = folders(tmp_path)
    labels = (blocks() % 251).astype(np.uint8)
    photo(images / "a.png", labels, 6)
    Image.fromarray(np.rot90(labels, -1)).save(masks / "a.png")
    (source,) = paired_files(images, masks, labels=LabelReading(turn_masks=turn_masks)).sources
    whole = source.read()
    np.testing.assert_array_equal(whole.labels, np.rot90(labels, -1))
    assert list(whole.notes) == [
        "images were turned upright, as their EXIF orientation says; their masks fit as they are"
    ]


def test_masks_with_an_orientation_of_their_own_are_not_turned_again(tmp_path):
    images, masks = folders(tmp_path)
    labels = (blocks() % 251).astype(np.uint8)
    for folder in (images, masks):
        photo(folder / "a.png", labels, 6)
    (source,) = paired_files(images, masks, labels=LabelReading(turn_masks=True)).sources
    whole = source.read()
    np.testing.assert_array_equal(whole.labels, np.rot90(labels, -1))
    assert not whole.notes


def test_every_page_is_an_image(tmp_path):
    images, masks = folders(tmp_path)
    stack = np.stack([np.roll(blocks(), number, 1) for number in range(5)])
    tifffile.imwrite(images / "a.tif", (stack % 251).astype(np.uint8), photometric="minisblack")
    tifffile.imwrite(masks / "a.tif", stack.astype(np.uint16), photometric="minisblack")
    save_pair(tmp_path, "b", blocks())
    sources = paired_files(images, masks, reading=ImageReading(pages="each")).sources
    assert [source.name.removeprefix(str(images)) for source in sources] == [
        *(f"/a.tif, page {number}" for number in range(1, 6)),
        "/b.png",
    ]
    for source, labels in zip(sources, stack, strict=False):
        whole = source.read()
        np.testing.assert_array_equal(whole.labels, labels)
        np.testing.assert_array_equal(whole.image[..., 1], labels % 251)
    tifffile.imwrite(masks / "a.tif", stack[:3].astype(np.uint16), photometric="minisblack")
    with pytest.raises(DataError, match=r"--pages each: .*a.tif has 5 pages, and .*a.tif has 3"):
        paired_files(images, masks, reading=ImageReading(pages="each"))


def test_one_page_of_an_image_may_have_a_mask_of_one_page(tmp_path):
    images, masks = folders(tmp_path)
    tifffile.imwrite(images / "a.tif", np.stack([blocks() % 251] * 3).astype(np.uint8), photometric="minisblack")
    tifffile.imwrite(masks / "a.tif", blocks().astype(np.uint16))
    (source,) = paired_files(images, masks, reading=ImageReading(pages="3")).sources
    np.testing.assert_array_equal(source.read().labels, blocks())


def test_questions_name_the_file(tmp_path):
    for stem in ("a", "b"):
        _, mask = save_pair(tmp_path, stem, blocks())
        Image.fromarray(((blocks() > 0) * 255).astype(np.uint8)).save(mask)
    images, masks = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(DataError, match=r"2 labels in 12 separate parts; .*masks.a.png has 1 in 6.*--instances"):
        paired_files(images, masks)
    sources = paired_files(images, masks, labels=LabelReading(instances="components")).sources
    assert sum(len(s.ids) for s in train_validation_parts(sources, MASK_SIDE, 0.5).train) == 6


def test_negative_labels_name_the_file(tmp_path):
    save_pair(tmp_path, "a", blocks())
    labels = blocks().astype(np.int16)
    labels[:3] = -1
    tifffile.imwrite(tmp_path / "masks" / "a.tif", labels)
    (tmp_path / "masks" / "a.png").unlink()
    sources = paired_files(tmp_path / "images", tmp_path / "masks").sources
    with pytest.raises(DataError, match=r"a.tif: negative label -1"):
        train_validation_parts(sources, MASK_SIDE)


def test_pixels_without_a_label_do_not_count(processor):
    """They are no target, and no negative point."""
    labels = blocks().astype(np.int16)
    labels[:, 24:][labels[:, 24:] == 0] = VOID
    parts = train_validation_parts([Array(labels, str(n)) for n in range(2)], MASK_SIDE, 0.5, min_area=1)
    assert {number for sample in parts.train for number in sample.ids} == set(np.unique(blocks())) - {0}
    encode = ItemEncoder(processor, MASK_SIDE, Prompts("point", negative_points=20))
    for item in (ValidationSet(parts.validation, encode)[0], TrainingSet(parts.train, encode, 1, augment=["none"])[0]):
        targets = item["labels"].numpy()[:, :27]  # 40 of 48 rows
        assert (targets[..., 17:] != 0).mean() > 0.5 and (targets == OUTSIDE).any()
        assert (targets[..., :15] != OUTSIDE).all()
        negative = item["input_points"][item["input_labels"] == 0] * 48 / 64
        rows, columns = negative.round().int().numpy().T[::-1].clip(0, [[39], [47]])
        near = [
            (labels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] != VOID).any()
            for y, x in zip(rows, columns, strict=True)
        ]
        assert len(near) > 20 and all(near)


@pytest.mark.parametrize(
    ("arguments", "image", "label"),
    [
        ([], ImageReading(), LabelReading()),
        (["--channels", "3", "2", "1", "--pages", "each"], ImageReading((3, 2, 1), "each"), LabelReading()),
        (["--intensity", "min-max", "--max-pixels", "9"], ImageReading(intensity="min-max", max_pixels=9), None),
        (["--intensity", "percentile", "2", "98"], ImageReading(intensity="percentile 2 98"), None),
        (["--void", "none", "--background", "0", "7"], None, LabelReading((0, 7), ())),
        (["--void", "-1", "255", "--instances", "components"], None, LabelReading(None, (-1, 255), "components")),
        (["--threshold", "128", "--turn-masks"], None, LabelReading(threshold=128, turn_masks=True)),
    ],
)
def test_options_say_how_to_read(arguments, image, label, tmp_path):
    data = parse([*arguments, "--images", "i", "--masks", "m", "--output", str(tmp_path)]).data
    assert data.image_reading == (image or ImageReading())
    assert data.label_reading == (label or LabelReading())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--void", "all"], "--void all: expected numbers, or none"),
        (["--channels", "0"], "--channels 0: expected one to three"),
        (["--intensity", "log"], "--intensity log: expected min-max"),
    ],
)
def test_wrong_options_are_named(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert problem in capsys.readouterr().err


def coins_as(form: str, folder: Path) -> list[str]:
    """Writes the coins, and returns the options that read them."""
    whole = Coins().read()
    images, masks = folders(folder)
    options = ["--images", str(images), "--masks", str(masks)]
    if form == "16-bit TIFF":
        tifffile.imwrite(images / "coins.tif", whole.image[..., 0].astype(np.uint16) * 257, photometric="minisblack")
        tifffile.imwrite(masks / "coins.tif", whole.labels.astype(np.uint16), compression="zlib")
        return [*options, "--intensity", "dtype"]
    Image.fromarray(whole.image).save(images / "coins.png")
    numbers = range(1, whole.labels.max() + 1)
    if form == "PNG":
        Image.fromarray(whole.labels).save(masks / "coins.png")
    elif form == "binary PNG":
        Image.fromarray(whole.labels > 0).save(masks / "coins.png")
        options += ["--instances", "components"]
    elif form == "a file per object":
        (masks / "coins").mkdir()
        for number in numbers:
            Image.fromarray(whole.labels == number).save(masks / "coins" / f"{number:02}.png")
        options += ["--mask-pattern", "{stem}/*.png"]
    elif form == "COCO":
        save_coco(folder / "coco.json", "coins.png", whole.labels)
        options = ["--images", str(images), "--coco", str(folder / "coco.json")]
    return options


@pytest.mark.parametrize("form", ["PNG", "16-bit TIFF", "binary PNG", "a file per object", "COCO"])
def test_the_coins_are_the_same_in_every_form(form, tmp_path, processor):
    """The same pixels, objects and prompts, and so the same IoU."""
    (tmp_path / "files").mkdir()
    arguments = [*coins_as(form, tmp_path / "files"), "--output", str(tmp_path / "out")]
    encode = ItemEncoder(processor, MASK_SIDE, Prompts("mixed", negative_points=1))
    items = []
    for options in (arguments, arguments[-2:]):
        parts, _ = read_data(parse(options).data, MASK_SIDE, seed=0)
        items.append(ValidationSet(parts.validation, encode)[0])
    actual, expected = items
    assert actual["labels"].shape[0] == 10
    if form == "binary PNG":  # its objects have numbers in another order
        assert {one.numpy().tobytes() for one in actual["labels"]} == {
            one.numpy().tobytes() for one in expected["labels"]
        }
        torch.testing.assert_close(actual["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
        return
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
