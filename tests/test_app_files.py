"""Files on the page of `app.py`: the images that users open, and what they download."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoint_tools.checkout import ROOT
from image_data.coco_masks import decode
from segment import main as run_segment
from webapp import session as actions
from webapp.downloads import write_files
from webapp.drawing import draw
from webapp.handlers import status_of
from webapp.model import ModelSource, SharedModel, load_shared
from webapp.open_image import open_file
from webapp.session import ActionError, Session


COINS = ROOT / "docs" / "images" / "coins.png"
COIN, OTHER_COIN = (335.5, 43.5), (277.5, 53.5)
THRESHOLDS = {"min_iou": 0.3, "min_stability": 0.3, "grid": 8}


@pytest.fixture(scope="module")
def model() -> SharedModel:
    return load_shared(ModelSource(changes={**THRESHOLDS, "max_pixels": 200_000}))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of images as strangers bring them, and of what is none."""
    coins = Image.open(COINS).convert("RGB")
    coins.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    coins.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    coins.convert("RGBA").save(tmp_path / "<b>bold & clear.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("L", (5000, 1)).save(tmp_path / "line.png")
    Image.new("L", (2000, 101)).save(tmp_path / "large.png")
    coins.save(tmp_path / "stack.tif", save_all=True, append_images=[coins])
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "half.png").write_bytes((tmp_path / "palette.png").read_bytes()[:3000])
    (tmp_path / "empty.tif").touch()
    return tmp_path


def test_16_bits_and_turned_images_are_read_as_segment_reads_them(model, tmp_path):
    grey = np.asarray(Image.open(COINS)).astype(np.uint16)
    Image.fromarray(grey * 64 + 500).save(tmp_path / "deep.png")
    photo = Image.open(COINS).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    deep = open_file(model, tmp_path / "deep.png").pixels.astype(int)
    assert np.abs(np.diff(deep[..., 0] - grey / grey.max() * 255)).max() < 60
    assert deep.max() == 255
    assert open_file(model, tmp_path / "turned.jpg").size == (384, 303)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.jpg", "cannot be read"),
        ("half.png", "truncated"),
        ("empty.tif", "cannot be read"),
        (
            "large.png",
            r"2000 x 101 .* more than --max-pixels 200000: .* \(Options of app.py and segment.py.\)",
        ),
        ("stack.tif", r"has 2 pages. Use .*--pages 1 .* \(Options of app.py and segment.py.\)"),
        ("line.png", "5000 x 1 pixels are too narrow for a model that sees 128 x 128"),
    ],
)
def test_files_that_cannot_be_opened_are_named_with_the_reason(model, files, name, message):
    with pytest.raises(ValueError, match=rf"^{name}: .*{message}") as error:
        open_file(model, files / name)
    assert str(files) not in str(error.value)


@pytest.mark.parametrize("name", ["cmyk.jpg", "palette.png", "<b>bold & clear.png"])
def test_images_of_all_kinds_are_clicked_on(model, files, name):
    image = open_file(model, files / name)
    session = actions.add_click(Session(image), (image.size[1] * 0.87, image.size[0] * 0.14), "inside")
    assert session.current.segment.area > 0
    assert draw(session).shape == image.fitted.shape
    assert np.abs(image.pixels.astype(int) - np.asarray(Image.open(COINS))[..., None]).mean() < 10


def test_a_page_for_larger_images_or_single_pages_is_one_option_away(files):
    model = load_shared(ModelSource(changes={"max_pixels": 300_000}))
    assert load_shared(ModelSource()).settings.reading.max_pixels == 50_000_000
    assert open_file(model, files / "large.png").size == (101, 2000)
    model = load_shared(ModelSource(changes={"pages": "2"}))
    assert open_file(model, files / "stack.tif").size == (303, 384)


def test_files_to_download_hold_the_same_masks(model, tmp_path):
    session = actions.finish_object(actions.add_click(Session(open_file(model, COINS)), COIN, "inside"))
    session = actions.add_click(session, (40, 260), "inside")
    overlay, labels, annotations = write_files(session, tmp_path / "files")
    numbers = np.asarray(Image.open(labels))
    assert Image.open(overlay).size == (384, 303)
    content = json.loads(annotations.read_text())
    for number, (segment, entry) in enumerate(zip(session.segments, content["annotations"], strict=True), start=1):
        mask = segment.full((303, 384))
        np.testing.assert_array_equal(decode(entry["segmentation"], (303, 384)), mask)
        assert (numbers[mask] == number).mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "is_automatic"),
    [
        (["--point", "335.5", "43.5", "--not", "277.5", "53.5", "--box", "18", "102", "76", "147"], False),
        (["--everything", "--min-iou", "0.3", "--min-stability", "0.3", "--grid", "8"], True),
    ],
)
def test_files_to_download_are_those_of_segment(model, tmp_path, arguments, is_automatic):
    run_segment([str(COINS), "--output", str(tmp_path / "segment"), *arguments])
    session = Session(open_file(model, COINS))
    if is_automatic:
        session = actions.find_all(session, model.settings)
    else:
        session = actions.add_click(actions.add_click(session, COIN, "inside"), OTHER_COIN, "outside")
        session = actions.finish_object(session)
        session = actions.add_click(actions.add_click(session, (18, 147), "box"), (76, 102), "box")
    written = write_files(session, tmp_path / "page")
    assert len(session.objects) > 1
    assert len(written) == 3
    for path in written:
        assert path.read_bytes() == (tmp_path / "segment" / path.name).read_bytes(), path.name


def test_masks_that_vanish_in_a_tiny_image_are_said_to_be_small(model, files):
    pixel = Session(open_file(model, files / "pixel.png"))
    with pytest.raises(ActionError, match="smaller than a pixel"):
        actions.find_all(pixel, model.settings.but(min_iou=0.0, min_stability=0.0, grid=4))
    clicked = actions.add_click(pixel, (0.87, 0.14), "inside")
    assert "mask is empty" in status_of(clicked)
    with pytest.raises(ActionError, match="no mask to keep"):
        actions.finish_object(clicked)
