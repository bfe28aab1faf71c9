"""What the fine-tuning recipe reads, and what it refuses."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from labelled_images import MASK_SIDE, blocks, save_pair
from PIL import Image

from finetuning.folders import paired_files
from finetuning.images import read_image, read_mask
from finetuning.samples import train_validation_parts
from finetuning.sources import Coins, DataError


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
    assert image.dtype == np.uint8 and image.flags.writeable
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
    labels = np.array([[0, 1, 1], [200, 0, np.iinfo(dtype).max]], dtype=dtype)
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
    """Creates files with every problem at once; returns the expected messages."""
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
        "size.png": "a mask of 48 x 40 pixels (the image's size), got 44 x 40",
        "colour.png": "expected a 2-D integer mask",
        "text.png": "cannot be read",
        "deep.png": "it has 16 bits per colour",
        "float.tif": "expected uint8 or uint16 pixels",
        "pages.tif": "it has 9 pages; expected one",
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
    with pytest.raises(DataError, match="not a folder"):
        paired_files(tmp_path / "nowhere", tmp_path / "masks")


def test_long_lists_of_problems_are_cut():
    assert str(DataError(map(str, range(50)))).splitlines()[-1] == "and 30 more"


def test_coins():
    labels = Coins().read().labels
    assert len(np.unique(labels)) == 25
