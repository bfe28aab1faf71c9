"""Images and masks in folders, as people lay them out."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_images import MASK_SIDE, blocks
from PIL import Image

from image_data.folders import paired_files
from image_data.labels import LabelReading
from image_data.overlaps import mask_of
from image_data.patterns import Pattern
from image_data.pillow_images import DataError
from image_data.samples import train_validation_parts
from image_data.sources import SourceList


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_all(folder: Path, *names: str) -> None:
    """Saves images, and masks where the path says so."""
    for name in names:
        is_mask = "mask" in name or "label" in name
        save(folder / name, blocks().astype(np.uint16) if is_mask else (blocks() % 251).astype(np.uint8))


def pairs(folder: Path, images: str, masks: str, **options: Any) -> dict[str, str]:
    """The masks by image, relative to the folder."""
    sources = paired_files(folder / images, folder / masks, **options).sources
    assert all(np.array_equal(source.read().labels, blocks()) for source in sources)
    return {str(s.image.relative_to(folder)): str(s.mask.relative_to(folder)) for s in sources}


@pytest.mark.parametrize(
    ("images", "masks", "options", "expected"),
    [
        ("i", "mask", {}, {"i/a.png": "mask/a.png", "i/b.c.png": "mask/b.c.png"}),
        ("i", "mask", {}, {"i/x/a.png": "mask/x/a.png", "i/a.png": "mask/a.png", "i/y/z/a.jpg": "mask/y/z/a.png"}),
        ("i", "i/masks", {}, {"i/a.png": "i/masks/a.png", "i/x/a.png": "i/masks/x/a.png"}),
        ("d/i", "d", {"mask_pattern": "masks/{stem}.png"}, {"d/i/a.png": "d/masks/a.png"}),
        ("i", "mask", {"mask_pattern": "{stem}_label.png"}, {"i/a.png": "mask/a_label.png"}),
        ("d", "d", {"mask_pattern": "{stem}_mask.*"}, {"d/a.png": "d/a_mask.png", "d/x/a_b.png": "d/x/a_b_mask.tif"}),
        ("d", "d", {"mask_pattern": "mask_{stem}.PNG"}, {"d/a.png": "d/mask_a.png"}),
        (
            "d",
            "d",
            {"image_pattern": "{stem}_img.png", "mask_pattern": "{stem}_masks.png"},
            {"d/001_img.png": "d/001_masks.png", "d/002_img.png": "d/002_masks.png"},
        ),
        (
            "d",
            "d",
            {"image_pattern": "{stem}/image.png", "mask_pattern": "{stem}/labels.tif"},
            {"d/a/image.png": "d/a/labels.tif", "d/x/b/image.png": "d/x/b/labels.tif"},
        ),
    ],
    ids=["names", "nested", "inside", "beside", "suffix", "together", "prefix", "both", "folders"],
)
def test_pairs_files_by_name(images, masks, options, expected, tmp_path):
    save_all(tmp_path, *expected, *expected.values())
    assert pairs(tmp_path, images, masks, **options) == expected


def test_names_are_equal_on_all_systems(tmp_path):
    save(tmp_path / "i" / unicodedata.normalize("NFD", "übung.png"), blocks().astype(np.uint8))
    save(tmp_path / "masks" / unicodedata.normalize("NFC", "übung.png"), blocks().astype(np.uint16))
    assert len(paired_files(tmp_path / "i", tmp_path / "masks").sources) == 1


def test_other_files_are_no_matter_if_a_pattern_says_what_to_read(tmp_path):
    save_all(tmp_path, "d/a.png", "d/a_mask.png", "d/.hidden_mask.png", "d/.cache/b.png")
    (tmp_path / "d" / "a_notes.txt").touch()
    assert len(pairs(tmp_path, "d", "d", image_pattern="{stem}.png", mask_pattern="{stem}_mask.png")) == 1
    with pytest.raises(DataError, match=r"a_notes\.txt: unsupported file type"):
        pairs(tmp_path, "d", "d", mask_pattern="{stem}_mask.png")


@pytest.mark.parametrize(
    ("files", "options", "problem"),
    [
        (["d/a.png", "d/a_mask.png"], {}, r"--images and --masks are both .*expected --mask-pattern"),
        (["d/a.png", "d/a_mask.png"], {"mask_pattern": "a_mask.png"}, r"a_mask\.png: expected \{stem\} in it, once"),
        (["d/a.png", "d/b_mask.png"], {"mask_pattern": "{stem}_mask.png"}, r"a\.png: no file a_mask\.png in"),
        (["d/x/a.png", "d/a_mask.png"], {"mask_pattern": "{stem}_mask.png"}, r"x/a\.png: no file x/a_mask\.png in"),
        (["d/a.png", "d/a_mask.png", "d/a_mask.tif"], {"mask_pattern": "{stem}_mask.*"}, r"a_mask\.tif: has the same"),
        (["d/a_mask.png"], {"mask_pattern": "{stem}_mask.png"}, r"a_mask\.png: no file a\.\* in"),
        (
            ["d/a.png"],
            {"mask_pattern": "{stem}_mask.png", "image_pattern": "{stem}_x.png"},
            r"holds no image \{stem\}_x",
        ),
    ],
)
def test_files_that_have_no_partner_are_named(files, options, problem, tmp_path):
    save_all(tmp_path, *files)
    with pytest.raises(DataError, match=problem):
        pairs(tmp_path, "d", "d", **options)


@pytest.mark.parametrize("pattern", ["{stem}/*.png", "{stem}_*.png", "{stem}/masks/*.png"])
def test_each_file_is_an_object_where_the_pattern_has_a_star(pattern, tmp_path):
    """Also of images of which one's name begins as another's, and of objects that overlap."""
    for stem in ("a", "a_1"):
        save_all(tmp_path, f"i/{stem}.png")
        for number in range(4):
            mask = np.zeros((40, 48), dtype=np.uint8)
            mask[5 : 20 + number, 5 + number : 20] = 255 * (number != 3)
            save(tmp_path / "m" / pattern.format(stem=stem).replace("*", f"{number}"), mask)
    sources = paired_files(tmp_path / "i", tmp_path / "m", mask_pattern=pattern).sources
    assert len(sources) == 2
    for source in sources:
        whole = source.read()
        areas = [mask_of(whole.labels, number).sum() for number in (1, 2, 3)]
        assert areas == [15 * 15, 16 * 14, 17 * 13] and whole.labels.max() == 3
        assert whole.left_out == {"mask files are left out: they are empty": 1}


def test_soft_edges_of_one_object(tmp_path):
    save_all(tmp_path, "i/a.png")
    mask = np.zeros((40, 48), np.uint8)
    mask[5:20, 5:20], mask[8:17, 8:17] = 90, 200
    save(tmp_path / "m" / "a" / "0.png", mask)
    given = {"mask_pattern": "{stem}/*.png", "labels": LabelReading(threshold=128)}
    (source,) = paired_files(tmp_path / "i", tmp_path / "m", **given).sources
    np.testing.assert_array_equal(source.read().labels, mask == 200)


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (blocks(), r"0\.png: expected one object .*got the values \[300 310"),
        (np.ones((4, 4)), r"0\.png: expected a mask of 48 x 40 pixels, got 4 x 4"),
    ],
)
def test_a_file_that_is_not_one_object_is_refused(mask, problem, tmp_path):
    save_all(tmp_path, "i/a.png")
    save(tmp_path / "m" / "a" / "0.png", mask.astype(np.uint16))
    sources = paired_files(tmp_path / "i", tmp_path / "m", mask_pattern="{stem}/*.png").sources
    with pytest.raises(DataError, match=problem):
        train_validation_parts(sources, MASK_SIDE)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_each_colour_but_black_is_an_object(alpha, background, tmp_path):
    labels = blocks() + (not background)
    colours = np.stack([labels * 7 % 256, labels // 2, labels * 0 + 3], -1).astype(np.uint8) * (labels > 0)[..., None]
    save_all(tmp_path, "i/a.png")
    save(tmp_path / "m" / "a.png", np.dstack([colours, labels * 0 + 255]).astype(np.uint8) if alpha else colours)
    given = LabelReading(background=(0,))
    (source,) = paired_files(tmp_path / "i", tmp_path / "m", color_masks=True, labels=given).sources
    read = source.read().labels
    assert (
        len(np.unique(labels))
        == len(np.unique(read))
        == len(np.unique(np.stack([labels, read]).reshape(2, -1).T, axis=0))
    )
    assert (read == 0).sum() == (labels == 0).sum() and read.dtype == np.uint8


WHITE, CREAM, RED, GREEN = (255, 255, 255), (224, 224, 192), (128, 0, 0), (0, 128, 0)


def coloured(folder: Path, background: tuple, *objects: tuple, border: tuple | None = None) -> SourceList:
    """Reads two colour masks with squares side by side, perhaps with a border around each."""
    mask = np.full((40, 20 * len(objects), 3), background, dtype=np.uint8)
    for place, colour in enumerate(objects):
        mask[8:32, 20 * place + 3 : 20 * place + 17] = colour if border is None else border
        mask[10:30, 20 * place + 5 : 20 * place + 15] = colour
    for name in ("i/a.png", "m/a.png", "i/b.png", "m/b.png"):
        save(folder / name, mask)
    return paired_files(folder / "i", folder / "m", color_masks=True)


def test_colours_are_examined_as_numbers_are(tmp_path):
    sources = coloured(tmp_path / "white", WHITE, RED, GREEN)
    assert "16777215 surrounds all else, and is the background" in sources.notes[0]
    assert len(np.unique(sources.sources[0].read().labels)) == 3
    with pytest.raises(DataError, match=r"14737600 is in 2 of 2 masks.* say --void 14737600"):
        coloured(tmp_path / "border", (0, 0, 0), RED, GREEN, border=CREAM)
    with pytest.raises(DataError, match=r"4 labels in 8 separate parts.* say --instances components"):
        coloured(tmp_path / "classes", (0, 0, 0), RED, RED, GREEN, GREEN)


def test_numbers_of_16_bits_are_no_colours(tmp_path):
    save_all(tmp_path, "i/a.png", "masks/a.png")
    (source,) = paired_files(tmp_path / "i", tmp_path / "masks", color_masks=True).sources
    with pytest.raises(ValueError, match=r"a\.png: expected colours of 8 bits for --color-masks"):
        source.read()


def test_a_photograph_is_no_colour_mask(tmp_path):
    save_all(tmp_path, "i/a.png")
    save(tmp_path / "m" / "a.png", np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8))
    (source,) = paired_files(tmp_path / "i", tmp_path / "m", color_masks=True).sources
    with pytest.raises(ValueError, match="colours, and --color-masks expects one per object"):
        source.read()


def test_what_a_pattern_finds_in_a_name():
    assert Pattern("{stem}_*.png").keys("x/a_b_1.png") == ["x/a_b", "x/a"]
    assert Pattern("{stem}.*").keys("a.b.png") == ["a.b", "a"]
    assert Pattern("a+{stem}.png").keys("aab.png") == []
    assert Pattern("{group}_*", "group").keys("patient 1_slide 2.png") == ["patient 1"]
