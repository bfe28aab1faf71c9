"""The same coins in every format train the same model."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as peer

import finetune
from image_data.sources import Coins


RUN = ["--steps", "2", "--eval-every", "2", "--batch-size", "1", "--objects", "3", "--image-size", "128"]


def as_tiff(folder: Path, image: np.ndarray, labels: np.ndarray) -> list[str]:
    """With 16 bits."""
    for name, pixels in (("images", image.astype(np.uint16) * 257), ("masks", labels.astype(np.uint16))):
        (folder / name).mkdir(parents=True)
        tifffile.imwrite(folder / name / "coins.tif", pixels)
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--intensity", "dtype"]


def as_coco(folder: Path, image: np.ndarray, labels: np.ndarray) -> list[str]:
    folder.mkdir()
    Image.fromarray(image).save(folder / "coins.png")
    annotations = []
    for number in range(1, labels.max() + 1):
        runs = peer.encode(np.asfortranarray(labels == number, dtype=np.uint8))
        runs["counts"] = runs["counts"].decode()
        annotations.append({"id": number, "image_id": 1, "category_id": 1, "segmentation": runs})
    entries = {"images": [{"id": 1, "file_name": "coins.png"}], "annotations": annotations}
    (folder / "coins.json").write_text(json.dumps(entries))
    return ["--images", str(folder), "--coco", str(folder / "coins.json")]


def as_parquet(folder: Path, image: np.ndarray, labels: np.ndarray) -> list[str]:
    folder.mkdir()
    row = {}
    for name, pixels in (("image", image), ("mask", labels)):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        row[name] = [{"bytes": stream.getvalue(), "path": None}]
    features = datasets.Features({name: datasets.Image() for name in row})
    datasets.Dataset.from_dict(row, features).to_parquet(folder / "coins.parquet")
    return ["--dataset", str(folder / "coins.parquet")]


def as_single_objects(folder: Path, image: np.ndarray, labels: np.ndarray) -> list[str]:
    (folder / "masks" / "coins").mkdir(parents=True)
    (folder / "images").mkdir()
    Image.fromarray(image).save(folder / "images" / "coins.png")
    for number in range(1, labels.max() + 1):
        Image.fromarray((labels == number).astype(np.uint8) * 255).save(
            folder / "masks" / "coins" / f"{number:02}.png"
        )
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--mask-pattern", "{stem}/*.png"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    """The metrics of the coins that come with the recipe."""
    return metrics(tmp_path_factory.mktemp("coins") / "run", [])


def metrics(output: Path, arguments: list[str]) -> dict:
    finetune.main([*arguments, *RUN, "--output", str(output)])
    return json.loads((output / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
@pytest.mark.parametrize("write", [as_tiff, as_coco, as_parquet, as_single_objects])
def test_the_coins_are_the_same_in_every_format(write, expected, tmp_path):
    coins = Coins().read()
    actual = metrics(tmp_path / "run", write(tmp_path / "data", coins.image[..., 0], coins.labels.astype(np.uint8)))
    for name in ("objects", "before", "after"):
        assert actual[name] == expected[name]
    assert actual["objects"]["train"] > 5 and actual["before"] != actual["after"]
