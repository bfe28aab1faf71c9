"""Image and mask files are read as Pillow shows them, and what Pillow cannot show is asked about."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from labelled_images import png
from PIL import Image, ImageCms, ImageOps

from image_data.images import read_image, read_mask
from image_data.pillow_images import DataError, ImageReading


RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
WIDE = RNG.integers(900, 5000, (9, 14)).astype(np.uint16)
LABELS = np.arange(9 * 14, dtype=np.uint8).reshape(9, 14)


def in_mode(mode: str) -> Image.Image:
    """The same colours in another mode of Pillow."""
    image = Image.fromarray(COLOUR)
    if mode == "P":
        return image.quantize(64)
    if mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    if mode in ("LA", "RGBA", "RGBX", "PA"):
        base = image.convert({"PA": "P", "LA": "L"}.get(mode, "RGB"))
        bands = [*base.split(), Image.fromarray(255 - GREY)]
        merged = Image.merge(mode, bands)
        if mode == "PA":
            merged.putpalette(base.getpalette())
        return merged
    return image.convert(mode)


def as_pillow_shows(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


MODES = {
    ".tif": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    ".jpg": ("L", "RGB", "CMYK"),
    ".bmp": ("1", "L", "P", "RGB", "RGBA"),
    ".webp": ("L", "RGB", "RGBA"),
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_images_are_as_pillow_shows_them(suffix, mode, tmp_path):
    path = tmp_path / f"image{suffix}"
    in_mode(mode).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.writeable
    expected = np.asarray(in_mode(mode).convert("RGB")) if mode == "YCbCr" else as_pillow_shows(path)
    np.testing.assert_array_equal(image, expected)
    assert mode == "1" or len(np.unique(image)) > 20


COMPRESSED = [(how, mode) for how in ("tiff_lzw", "tiff_deflate", "packbits") for mode in ("L", "P", "RGB", "I;16")]
COMPRESSED += [("jpeg", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")] + [("group4", "1"), ("tiff_ccitt", "1")]


@pytest.mark.parametrize(("compression", "mode"), COMPRESSED)
def test_compressed_tiff_needs_nothing_else(compression, mode, tmp_path):
    path = tmp_path / "image.tif"
    (Image.fromarray(WIDE) if mode == "I;16" else in_mode(mode)).save(path, compression=compression)
    if mode == "I;16":
        np.testing.assert_array_equal(read_mask(path), WIDE)
    else:
        np.testing.assert_array_equal(read_image(path), as_pillow_shows(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.webp", "image.tif", "wide.tif", "bands.tif"])
def test_images_and_masks_are_turned_upright(name, orientation, tmp_path):
    path, exif = tmp_path / name, Image.Exif()
    exif[0x0112] = orientation
    tags = [(274, "H", 1, orientation, True)]
    stored = np.asarray(Image.fromarray(GREY).resize((280, 180), Image.Resampling.NEAREST))  # survives JPEG
    reading = ImageReading(channels=(2,)) if name == "bands.tif" else ImageReading()
    if name == "wide.tif":
        tifffile.imwrite(path, stored.astype(np.uint16) * 257, extratags=tags, photometric="minisblack")
    elif name == "bands.tif":
        bands = np.dstack([0 * stored, stored])
        tifffile.imwrite(path, bands, extratags=tags, photometric="minisblack", planarconfig="contig")
    else:
        options = {"quality": 100} if name.endswith("jpg") else {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(stored).save(path, exif=exif, **options)
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert (expected.shape == (280, 180)) == (orientation > 4)
    full_range = ImageReading(reading.channels, intensity="dtype")
    np.testing.assert_allclose(read_image(path, full_range)[..., 0].astype(int), expected, atol=3)
    if name in ("image.png", "image.tif", "image.webp"):
        np.testing.assert_array_equal(read_mask(path), expected)


SIGNED = ("int16", "int8", "float32", "float64", "float16")


@pytest.mark.parametrize(
    ("dtype", "minimum"), [(dtype, 0) for dtype in ("uint16", "uint32", "bool", *SIGNED)] + [(d, -100) for d in SIGNED]
)
def test_other_types_are_scaled_by_their_range(dtype, minimum, tmp_path):
    values = np.linspace(minimum, 100, 126).reshape(9, 14).round()
    values = values > 50 if dtype == "bool" else values.astype(dtype)
    tifffile.imwrite(tmp_path / "image.tif", values, photometric="minisblack")
    image = read_image(tmp_path / "image.tif", ImageReading(intensity="min-max"))
    expected = np.round((values - float(minimum)) * 255 / (100 - minimum)) if dtype != "bool" else values * 255
    np.testing.assert_allclose(image, np.dstack([expected] * 3), atol=1)
    assert image.min() == 0 and image.max() == 255


def test_a_hot_pixel_does_not_make_the_image_black(tmp_path):
    hot = WIDE.copy()
    hot[3, 4] = 65535
    tifffile.imwrite(tmp_path / "hot.tif", np.tile(hot, (20, 20))[:, :-1])
    tifffile.imwrite(tmp_path / "clean.tif", np.tile(WIDE, (20, 20))[:, :-1])
    by_range = ImageReading(intensity="min-max")
    assert read_image(tmp_path / "hot.tif", by_range).mean() < 20
    images = [
        read_image(tmp_path / name, ImageReading(intensity="percentile 1 99")) for name in ("hot.tif", "clean.tif")
    ]
    difference = np.abs(images[0].astype(int) - images[1])
    assert np.median(difference) == 0 and images[0].mean() > 100
    pixels = np.tile(WIDE, (20, 20))[:, :-1]
    low, high = np.percentile(pixels, [1, 99.8])
    default = read_image(tmp_path / "clean.tif")[..., 0]
    assert (default[pixels <= low] == 0).all() and (default[pixels >= high] == 255).all()
    assert 0 < default[(low < pixels) & (pixels < high)].mean() < 255


def test_few_bright_pixels_are_not_lost(tmp_path):
    sparse = np.full((100, 100), 7, dtype=np.uint16)
    sparse[50, 50], sparse[10, 10] = 707, 357
    tifffile.imwrite(tmp_path / "sparse.tif", sparse)
    image = read_image(tmp_path / "sparse.tif")
    assert image[50, 50, 0] == 255 and image[10, 10, 0] == 128 and image[0, 0, 0] == 0
    tifffile.imwrite(tmp_path / "flat.tif", 0 * sparse)
    assert not read_image(tmp_path / "flat.tif").any()


def test_numbers_that_are_not_finite_do_not_move_the_scale(tmp_path):
    values = np.linspace(0, 1, 126, dtype=np.float32).reshape(9, 14)
    clean = values.copy()
    values[0, 0], values[8, 13], values[4, 4] = -np.inf, np.inf, np.nan
    for name, pixels in (("odd.tif", values), ("clean.tif", clean)):
        tifffile.imwrite(tmp_path / name, pixels)
    odd, expected = (
        read_image(tmp_path / name, ImageReading(intensity="min-max")) for name in ("odd.tif", "clean.tif")
    )
    assert odd[4, 4, 0] == 0 and odd[0, 0, 0] == 0 and odd[8, 13, 0] == 255
    np.testing.assert_allclose(np.delete(odd[..., 0], [4], 0).astype(int), np.delete(expected[..., 0], [4], 0), atol=3)


def test_the_whole_range_of_a_type(tmp_path):
    by_type = ImageReading(intensity="dtype")
    tifffile.imwrite(tmp_path / "wide.tif", WIDE)
    np.testing.assert_array_equal(read_image(tmp_path / "wide.tif", by_type)[..., 0], np.round(WIDE / 257))
    tifffile.imwrite(tmp_path / "float.tif", WIDE.astype(np.float32))
    with pytest.raises(ValueError, match=r"float.tif: --intensity dtype: expected numbers from 0 to 1"):
        read_image(tmp_path / "float.tif", by_type)


def test_16_bit_colours_have_one_scale_and_chosen_bands_their_own(tmp_path):
    pixels = np.dstack([WIDE, WIDE // 10, WIDE // 100])
    tifffile.imwrite(tmp_path / "rgb.tif", pixels, photometric="rgb")
    red, green, blue = read_image(tmp_path / "rgb.tif").mean((0, 1))
    assert red > 100 > green > blue
    alpha = np.full_like(WIDE, 65535)
    tifffile.imwrite(tmp_path / "rgba.tif", np.dstack([pixels, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.tif"), read_image(tmp_path / "rgb.tif"))
    tifffile.imwrite(tmp_path / "bands.tif", pixels, photometric="minisblack", planarconfig="contig")
    means = read_image(tmp_path / "bands.tif", ImageReading((1, 2, 3))).mean((0, 1))
    assert np.ptp(means) < 5


@pytest.mark.parametrize("bands", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_bands_are_asked_about(bands, planar, dtype, tmp_path):
    pixels = RNG.integers(0, 256, (bands, 9, 14)).astype(dtype)
    path = tmp_path / "bands.tif"
    if planar == "pages":
        tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "CYX"})
    else:
        stored = pixels if planar == "separate" else np.moveaxis(pixels, 0, 2)
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar)
    with pytest.raises(ValueError, match=rf"bands.tif: it has {bands} bands.* --channels 1 2"):
        read_image(path)
    as_is = "min-max" if dtype == "uint8" else "dtype"
    image = read_image(path, ImageReading((2, 1), intensity=as_is))
    scale = 1 if dtype == "uint8" else 257
    expected = np.dstack([pixels[1], pixels[0], 0 * pixels[0]]) / scale
    np.testing.assert_array_equal(image, np.round(expected))
    with pytest.raises(ValueError, match=f"--channels {bands + 1}: the image has {bands} bands"):
        read_image(path, ImageReading((bands + 1,)))


def test_pages_are_asked_about(tmp_path):
    pixels = RNG.integers(0, 256, (3, 9, 14), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", pixels, photometric="minisblack")
    frames = [Image.fromarray(page) for page in pixels]
    frames[0].save(tmp_path / "stack.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "stack.webp", save_all=True, append_images=frames[1:], lossless=True)
    for name in ("stack.tif", "stack.png", "stack.webp"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read: it has 3 pages. Use --pages each"):
            read_image(tmp_path / name)
        with pytest.raises(ValueError, match=r"--pages each is for training .* or use --pages 1 for the first"):
            read_image(tmp_path / name, ImageReading(pages="each"))  # as segment.py does, of one page
        with pytest.raises(ValueError, match=r"--pages 4: it has 3 pages"):
            read_image(tmp_path / name, ImageReading(pages="4"))
        image = read_image(tmp_path / name, ImageReading(pages="2"))
        np.testing.assert_array_equal(image[..., 0], pixels[1])
        np.testing.assert_array_equal(
            read_image(tmp_path / name, ImageReading(pages="each"), page=2)[..., 2], pixels[2]
        )
    np.testing.assert_array_equal(
        read_image(tmp_path / "stack.tif", ImageReading((3, 2, 1))), np.moveaxis(pixels[::-1], 0, 2)
    )


def test_a_stack_of_images_with_bands(tmp_path):
    stack = RNG.integers(0, 256, (4, 2, 9, 14), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack, imagej=True, metadata={"axes": "ZCYX"})
    image = read_image(tmp_path / "stack.tif", ImageReading((2,), "each"), page=3)
    np.testing.assert_array_equal(image[..., 0], stack[3, 1])


def test_the_largest_image_of_a_pyramid_is_read(tmp_path):
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        file.write(COLOUR, photometric="rgb")
        file.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1)
    with tifffile.TiffWriter(tmp_path / "sub.tif") as file:
        file.write(COLOUR, photometric="rgb", subifds=1)
        file.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1)
    for name in ("pages.tif", "sub.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name), COLOUR)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_are_not_bands(rows, tmp_path):
    for suffix in (".png", ".tif"):
        Image.fromarray(COLOUR[:rows]).save(tmp_path / f"colour{suffix}")
        np.testing.assert_array_equal(read_image(tmp_path / f"colour{suffix}"), COLOUR[:rows])
        Image.fromarray(GREY[:rows]).save(tmp_path / f"grey{suffix}")
        assert read_image(tmp_path / f"grey{suffix}").shape == (rows, 14, 3)
    tifffile.imwrite(tmp_path / "wide.tif", WIDE[:rows])
    assert read_image(tmp_path / "wide.tif").shape == (rows, 14, 3)


def test_white_may_be_0_in_any_depth(tmp_path):
    for dtype in (np.uint8, np.uint16, np.uint32):
        values = LABELS.astype(dtype)
        tifffile.imwrite(tmp_path / "image.tif", values, photometric="miniswhite")
        np.testing.assert_array_equal(read_mask(tmp_path / "image.tif"), np.iinfo(dtype).max - values)


def test_premultiplied_alpha_is_divided_out_in_any_depth(tmp_path):
    alpha = np.maximum(GREY, 1)
    stored = np.dstack([(COLOUR * (alpha[..., None] / 255)).astype(np.uint8), alpha])
    for name, scale in (("8.tif", 1), ("16.tif", 257)):
        pixels = stored.astype(np.uint16) * scale if scale > 1 else stored
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", extrasamples=["assocalpha"])
    narrow, wide = (read_image(tmp_path / name, ImageReading(intensity="dtype")) for name in ("8.tif", "16.tif"))
    np.testing.assert_array_equal(narrow, as_pillow_shows(tmp_path / "8.tif"))
    np.testing.assert_allclose(wide.astype(int), narrow, atol=1)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_masks_are_numbers_in_every_container(suffix, tmp_path):
    image = Image.fromarray(LABELS)
    if suffix in (".png", ".tif"):
        palette = Image.fromarray(LABELS).convert("P")
        palette.putpalette(RNG.permutation(256).repeat(3).astype(np.uint8).tobytes())
        palette.save(tmp_path / f"palette{suffix}")
        np.testing.assert_array_equal(read_mask(tmp_path / f"palette{suffix}"), LABELS)
    for mode in ("L", "RGB", *(["RGBA"] if suffix != ".bmp" else [])):
        image.convert(mode).save(tmp_path / f"mask{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
        np.testing.assert_array_equal(read_mask(tmp_path / f"mask{suffix}"), LABELS)
    if suffix != ".webp":
        Image.fromarray(LABELS > 60).save(tmp_path / f"bits{suffix}")
        assert set(np.unique(read_mask(tmp_path / f"bits{suffix}")).astype(int)) <= {0, 1, 255}


def test_masks_that_jpeg_has_changed_are_refused(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "mask.png", "JPEG")
    Image.fromarray(LABELS).save(tmp_path / "mask.tif", compression="jpeg")
    for name in ("mask.png", "mask.tif"):
        with pytest.raises(ValueError, match=f"{name}: .*JPEG.* changes numbers"):
            read_mask(tmp_path / name)


def test_a_jpeg_with_previews_is_one_image(tmp_path):
    first, preview = Image.fromarray(COLOUR), Image.fromarray(COLOUR[:4, :4])
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[preview])
    np.testing.assert_array_equal(read_image(tmp_path / "phone.jpg"), as_pillow_shows(tmp_path / "phone.jpg"))


def test_masks_of_4_bits_keep_their_numbers(tmp_path):
    labels = LABELS % 16
    rows = b"".join(b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in labels)
    (tmp_path / "mask.png").write_bytes(png(9, 14, 4, 0, rows))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), labels)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "uint32"])
def test_labels_of_any_integer_type(dtype, tmp_path):
    labels = LABELS.astype(dtype)
    labels[0, 0] = np.iinfo(dtype).max
    tifffile.imwrite(tmp_path / "mask.tif", labels)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), labels)


def test_too_large_files_are_refused_before_they_are_decoded(tmp_path):
    tifffile.imwrite(tmp_path / "bomb.tif", GREY, compression="zlib")
    with tifffile.TiffFile(tmp_path / "bomb.tif", mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength"):
            file.pages.first.tags[name].overwrite(20_000)
    with pytest.raises(ValueError, match=r"bomb.tif: .*20000 x 20000 pixels.* more than --max-pixels 178956970"):
        read_image(tmp_path / "bomb.tif")
    small = ImageReading(max_pixels=100)
    tifffile.imwrite(
        tmp_path / "wide.tif", np.zeros((5, 10, 9), np.float64), photometric="minisblack", planarconfig="contig"
    )
    Image.fromarray(GREY).save(tmp_path / "image.png")
    for name in ("wide.tif", "image.png"):
        with pytest.raises(ValueError, match=f"{name}: .*more than --max-pixels 100"):
            read_image(tmp_path / name, small)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit == 89_478_485, "that of Pillow, which other code relies on"


def test_what_would_lose_bits_is_refused(tmp_path):
    (tmp_path / "deep.png").write_bytes(png(9, 14, 16, 2, bytes(9 * (1 + 6 * 14))))
    with pytest.raises(ValueError, match=r"deep.png: .*16 bits per colour"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"intensity": "percentile 99 1"}, "--intensity percentile 99 1: expected min-max, dtype, or percentile"),
        ({"intensity": "percentile"}, "expected min-max"),
        ({"intensity": "sqrt"}, "expected min-max"),
        ({"intensity": "percentile a b"}, "expected min-max"),
        ({"channels": [0]}, "--channels 0: expected one to three numbers"),
        ({"channels": [1, 2, 3, 4]}, "--channels 1 2 3 4: expected one to three"),
        ({"pages": "all"}, "--pages all: expected each"),
        ({"pages": "0"}, "--pages 0: expected each"),
        ({"max_pixels": 0}, "--max-pixels 0: expected"),
    ],
)
def test_settings_out_of_range_are_named(changes, problem):
    with pytest.raises(DataError, match=problem):
        ImageReading(**changes)
