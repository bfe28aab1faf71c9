"""What the fine-tuning recipe reads, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from labelled_images import MASK_SIDE, blocks, png, save_pair
from PIL import Image

from image_data.folders import paired_files
from image_data.pillow_images import DataError
from image_data.samples import train_validation_parts
from image_data.sources import Coins


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)


def broken_folders(folder: Path) -> dict[str, str]:
    """Creates files with every problem at once; returns the expected messages."""
    for stem in ("good", "size", "colour", "text", "deep", "complex", "bands", "pages"):
        save_pair(folder, stem, blocks())
    images, masks = folder / "images", folder / "masks"
    Image.fromarray(blocks(40, 44).astype(np.uint16)).save(masks / "size.png")
    Image.fromarray(COLOUR).save(masks / "colour.png")
    (images / "text.png").write_text("no image")
    (images / "deep.png").write_bytes(png(40, 48, 16, 2, bytes(40 * (1 + 6 * 48))))
    for stem, pixels in (
        ("complex", np.zeros((40, 48), np.complex64)),
        ("bands", np.zeros((40, 48, 5), np.uint8)),
        ("pages", np.zeros((9, 40, 48), np.uint8)),
    ):
        (images / f"{stem}.png").unlink()
        planar = "contig" if stem == "bands" else None
        tifffile.imwrite(images / f"{stem}.tif", pixels, photometric="minisblack", planarconfig=planar)
    return {
        "size.png": "a mask of 48 x 40 pixels (the image's size), got 44 x 40",
        "colour.png": "expected a 2-D integer mask",
        "text.png": "cannot be read",
        "deep.png": "it has 16 bits per colour",
        "complex.tif": "expected integer or floating-point pixels",
        "bands.tif": "--channels 1 2 3",
        "pages.tif": "it has 9 pages. Use --pages each",
    }


def test_names_every_bad_file_at_once(tmp_path):
    expected = broken_folders(tmp_path)
    with pytest.raises(DataError) as raised:
        train_validation_parts(paired_files(tmp_path / "images", tmp_path / "masks").sources, MASK_SIDE)
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
    with pytest.raises(DataError) as raised:
        paired_files(tmp_path / "images", tmp_path / "masks")
    lines = str(raised.value).splitlines()
    assert len(lines) == 4
    for name, problem in {
        "images/no-mask.png": "no file no-mask.*",
        "masks/no-image.png": "no file no-image.*",
        "masks/lossy.jpg": "unsupported file type, expected one of .png",
        "images/twice": "same name",
    }.items():
        assert any(name in line and problem in line for line in lines), name
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        paired_files(tmp_path / "nowhere", tmp_path / "masks")


def test_long_lists_of_problems_are_cut():
    assert str(DataError(map(str, range(50)))).splitlines()[-1] == "and 30 more"


def test_coins():
    labels = Coins().read().labels
    assert len(np.unique(labels)) == 25
