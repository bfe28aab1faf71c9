"""What is told of the data before training, and `--check`, which stops there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from labelled_images import blocks, save_pair
from PIL import Image

import finetune
from checkpoint_tools.checkout import ROOT
from image_data.image_cache import ImageCache
from image_data.pillow_images import ImageReading
from image_data.samples import CACHE, train_validation_parts
from image_data.sources import LabelledImage, Source
from segmentation.overlays import COLOURS
from segmentation.settings import SegmentationSettings


def check(folder: Path, output: Path, *options: str) -> dict:
    """Runs the check as users do, and returns what it writes."""
    finetune.main(
        ["--images", f"{folder}/images", "--masks", f"{folder}/masks", "--output", str(output), "--check", *options]
    )
    return json.loads((output / "data.json").read_text())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(5):
        labels = np.kron(blocks(), np.ones((5, 5), dtype=int))
        labels[labels == 300 + 10 * number] = 0
        labels[0, 0] = 7  # too small
        save_pair(tmp_path, f"photo{number}", labels)
    return tmp_path


def test_the_check_counts_and_draws_and_trains_nothing(photos, tmp_path, capsys):
    written = check(photos, tmp_path / "out", "--validation", "0.4")
    assert written["images"] == {"train": 3, "validation": 2}
    assert written["objects"] == {"train": 15, "validation": 10}
    assert list(written["left_out"].values()) == [5]
    assert "smaller than 4 pixels" in next(iter(written["left_out"]))
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "data.json",
        "data.png",
    ]
    printed = capsys.readouterr().out
    for line in (
        "5 images from images: 15 training objects, 10 validation objects.",
        "images             3 to learn from, 2 to validate on",
        "objects per image  5",
        "sides              240 pixels",
        "pixels per object  2,000 in the image",
        "in the model's masks of 96 x 96",
        "left out: 5 objects (or parts cut off by a tile) are left out: smaller than 4 pixels",
        "are the outlines those of your objects? Nothing was trained.",
    ):
        assert line in printed
    areas = re.search(r"(\d+) to (\d+) .*in the model's masks", printed)
    assert areas is None or 2000 * 0.16 * 0.8 < int(areas[1]) <= int(areas[2]) < 2000 * 0.16 * 1.2


def test_test_images_are_counted_too(photos, tmp_path, capsys):
    for kind in ("images", "masks"):
        for number, part in enumerate(("train", "train", "train", "valid", "test")):
            (photos / kind / part).mkdir(exist_ok=True)
            (photos / kind / f"photo{number}.png").rename(photos / kind / part / f"photo{number}.png")
    written = check(photos, tmp_path / "out")
    assert written["images"] == {"train": 3, "validation": 1, "test": 1}
    assert written["objects"] == {"train": 15, "validation": 5, "test": 5}
    assert "15 training objects, 5 validation objects, 5 test objects." in capsys.readouterr().out


def test_the_picture_outlines_the_objects_that_are_used(photos, tmp_path):
    check(photos, tmp_path / "out")
    with Image.open(tmp_path / "out" / "data.png") as file:
        picture = np.asarray(file.convert("RGB")).astype(int)
    assert picture.shape[1] > 1400
    cell = picture[12 + 44 : 12 + 44 + 400, 12 : 12 + 480]  # 240 x 200 pixels at twice the size
    is_outline = (cell[..., None, :] == COLOURS).all(-1).any(-1)
    labels = np.kron(blocks(), np.ones((10, 10), dtype=int))
    objects = [label for label in np.unique(labels) if label and is_outline[labels == label].any()]
    assert len(objects) == 5
    inside = np.kron(blocks(), np.ones((10, 10), dtype=int)) > 0
    assert is_outline.any() and not is_outline[~inside].any()


@pytest.mark.slow
def test_a_run_may_follow_in_the_same_folder_but_a_check_replaces_no_run(photos, tmp_path, capsys):
    check(photos, tmp_path / "out")
    assert check(photos, tmp_path / "out", "--validation", "0.4")["images"] == {"train": 3, "validation": 2}
    options = ["--images", f"{photos}/images", "--masks", f"{photos}/masks", "--output", str(tmp_path / "out")]
    finetune.main([*options, "--steps", "1", "--image-size", "64", "--objects", "2"])
    assert {"data.png", "data.json", "run.yaml", "adapter"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(SystemExit) as exit_:
        finetune.main([*options, "--check"])
    assert "is not empty" in str(exit_.value)


@pytest.mark.slow
def test_tiles_are_advised_where_objects_are_tiny(tmp_path, capsys):
    for number in range(3):
        labels = np.zeros((900, 900), dtype=int)
        labels.reshape(30, 30, 30, 30)[:, 5:15, :, 5:15] = 1 + np.arange(900).reshape(30, 1, 30, 1)
        save_pair(tmp_path, f"photo{number}", labels)
    written = check(tmp_path, tmp_path / "out", "--min-area", "0")
    assert any("--tile 128 shows them larger" in note for note in written["notes"])
    finer = check(tmp_path, tmp_path / "out", "--min-area", "0", "--tile", "128")
    assert not any("--tile" in note for note in finer["notes"])
    assert "cut into" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        check(tmp_path, tmp_path / "out", "--min-area", "9")
    assert "No training objects left. Images are scaled down" in str(exit_.value) and "--tile" in str(exit_.value)
    assert "2700 objects" in str(exit_.value)


def test_copies_of_training_images_among_the_others_are_told(photos, tmp_path, capsys):
    for kind in ("images", "masks"):
        for number, part in enumerate(("train", "train", "train", "valid", "test")):
            (photos / kind / part).mkdir(exist_ok=True)
            (photos / kind / f"photo{number}.png").rename(photos / kind / part / f"photo{number}.png")
    assert not any("pixels of a training image" in note for note in check(photos, tmp_path / "out")["notes"])
    with Image.open(photos / "images" / "train" / "photo1.png") as file:
        file.save(photos / "images" / "valid" / "photo3.png", compress_level=1)
    (remark,) = [note for note in check(photos, tmp_path / "out")["notes"] if "pixels of a training image" in note]
    assert remark.startswith("1 of the validation images") and "--group-pattern" in remark
    assert re.search(r"valid/photo3\.png those of .*train/photo1\.png", remark)
    assert f"note: {remark}" in capsys.readouterr().out


def test_too_narrow_images_are_named(tmp_path):
    labels = np.zeros((2, 900), dtype=int)
    labels[:, 100:300], labels[:, 500:700] = 1, 2
    for number in range(3):
        save_pair(tmp_path, f"photo{number}", labels)
    with pytest.raises(SystemExit) as exit_:
        check(tmp_path, tmp_path / "out")
    assert "photo0.png: 900 x 2 pixels are too narrow" in str(exit_.value)


class Counted(Source):
    """An image that counts how often it is read."""

    def __init__(self, name: str, side: int = 40):
        self.name = name
        self.side = side
        self.reads = 0

    def read(self) -> LabelledImage:
        self.reads += 1
        labels = np.zeros((self.side, self.side), dtype=np.uint8)
        labels[5:25, 5:25] = 1
        return LabelledImage(np.zeros((self.side, self.side, 3), dtype=np.uint8), labels)


def test_the_check_reads_every_image_once_and_keeps_none():
    cached = dict(CACHE.images)
    sources: list[Source] = [Counted(str(number)) for number in range(60)]
    train_validation_parts(sources, 64)
    assert {source.reads for source in sources} == {1}
    assert dict(CACHE.images) == cached


def test_images_are_cached_by_their_bytes():
    cache = ImageCache(limit=4 * 40 * 40 * 4)
    small, large = [Counted(str(number)) for number in range(5)], Counted("large", 200)
    for source in small[:4] * 3:
        cache.read(source)
    assert [source.reads for source in small] == [1, 1, 1, 1, 0]
    cache.read(small[4]), cache.read(small[0])
    assert small[0].reads == 2, "the one that was used longest ago makes room"
    cache.read(large), cache.read(large)
    assert large.reads == 1 and list(cache.images) == [large]
    for source in small[1:4] * 2:
        cache.read(source)
    assert [source.reads for source in small[1:4]] == [2, 2, 2], "there is room again"


def test_the_documentation_shows_what_is_printed(tmp_path, capsys):
    finetune.main(["--check", "--output", str(tmp_path / "out")])
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    shown = page.split("```text\n")[1].split("```")[0]
    assert shown in capsys.readouterr().out


def test_all_problems_are_listed_and_nothing_is_written(tmp_path):
    for stem in ("good", "text", "size"):
        save_pair(tmp_path, stem, blocks())
    (tmp_path / "images" / "text.png").write_text("no image")
    Image.fromarray(blocks(40, 44).astype(np.uint16)).save(tmp_path / "masks" / "size.png")
    with pytest.raises(SystemExit) as exit_:
        check(tmp_path, tmp_path / "out")
    lines = sorted(str(exit_.value).splitlines())
    assert len(lines) == 2
    assert "size.png: expected a mask of 48 x 40 pixels" in lines[0] and "text.png: cannot be read" in lines[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_how_images_are_read_is_stored_with_the_weights(tmp_path):
    for number in range(3):
        image, _ = save_pair(tmp_path, f"photo{number}", blocks())
        pixels = np.dstack([blocks() * 3, blocks(), blocks() * 2]).astype(np.uint16)
        tifffile.imwrite(image.with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")
        image.unlink()
    options = ["--images", f"{tmp_path}/images", "--masks", f"{tmp_path}/masks", "--output", f"{tmp_path}/out"]
    options += ["--channels", "3", "1", "--intensity", "min-max"]
    finetune.main([*options, "--steps", "1", "--image-size", "64", "--objects", "2"])
    reading = SegmentationSettings.load(tmp_path / "out" / "adapter").reading
    assert reading == ImageReading((3, 1), None, "min-max")


@pytest.mark.parametrize(
    ("mask", "advice"),
    [
        (np.zeros((40, 48), np.uint8), "No training objects left. All pixels are background: are these the masks?"),
        (blocks().astype(np.float32), "dtype float32. Save it as integers."),
        (np.dstack([blocks() % 256] * 2 + [blocks() // 2]).astype(np.uint8), "say --color-masks"),
        (np.full((40, 48), 7, np.uint8), "7 fills the image, as in"),
        (((blocks() > 0) * 255).astype(np.uint8), "--instances components"),
    ],
)
def test_wrong_masks_are_answered_with_what_to_do(mask, advice, tmp_path):
    for number in range(2):
        _, path = save_pair(tmp_path, f"photo{number}", blocks())
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), mask)
    with pytest.raises(SystemExit) as exit_:
        check(tmp_path, tmp_path / "out")
    assert advice in str(exit_.value) and "Traceback" not in str(exit_.value)
