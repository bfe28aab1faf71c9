"""Decoders trained on embeddings from the disk: as if the frozen encoder ran in every step."""

import json
from pathlib import Path

import numpy as np
import pytest
from labelled_images import Array, blocks, save_pair
from safetensors import safe_open
from safetensors.torch import load_file, save

import finetune
from finetuning.embedding_cache import NAME, EmbeddingCache
from finetuning.recipe_settings import SAM_TINY
from image_data.samples import Sample
from segmentation.adapted_model import load_base


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    for number in range(4):
        save_pair(tmp_path, f"photo{number}", np.roll(blocks(), number, axis=1))
    folders = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--validation", "0.5"]
    small = "--image-size 64 --steps 4 --eval-every 2 --batch-size 1 --accumulate 2 --grid 4 --learning-rate 0.01"
    return [*folders, *small.split(), "--method", "decoder", "--augment", "none", "--rounds", "1"]


def losses(output: Path) -> list[float]:
    history = json.loads((output / "metrics.json").read_text())["history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss", "eval_iou_clicks") if name in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bfloat16"])
def test_losses_are_the_same(precision, arguments, tmp_path):
    arguments += precision
    cache = ["--cache-embeddings", str(tmp_path / "embeddings")]
    finetune.main([*arguments, "--output", str(tmp_path / "plain")])
    finetune.main([*arguments, *cache, "--output", str(tmp_path / "cached")])
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")
    assert len(set(losses(tmp_path / "cached"))) > 4, "it learns"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").iterdir()}
    assert len(files) == 4
    finetune.main([*arguments, *cache, "--output", str(tmp_path / "again")])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").iterdir()} == files
    assert losses(tmp_path / "again") == losses(tmp_path / "plain")


def test_name_depends_on_image_weights_and_preprocessing(tmp_path):
    model, processor = load_base(str(SAM_TINY))
    image, other = Array(blocks()).image, Array(np.roll(blocks(), 1)).image
    paths = {EmbeddingCache(tmp_path, model, processor, "no").path(each) for each in (image, other, image.copy())}
    assert len(paths) == 2
    paths.add(EmbeddingCache(tmp_path, model, processor, "bf16").path(image))
    paths.add(EmbeddingCache(tmp_path, model, load_base(str(SAM_TINY), image_size=64)[1], "no").path(image))
    model.vision_encoder.layers[5].mlp.lin2.bias.data[0] += 1e-6
    paths.add(EmbeddingCache(tmp_path, model, processor, "no").path(image))
    assert len(paths) == 5


def test_only_what_is_missing_or_not_as_written_is_encoded(tmp_path):
    model, processor = load_base(str(SAM_TINY), image_size=64)
    calls: list[int] = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    cache = EmbeddingCache(tmp_path / "embeddings", model, processor, "no")
    samples = [Sample(Array(np.roll(blocks(), n)), np.s_[:, :], np.array([300])) for n in range(2)]
    cache.fill(samples[:1], show_progress=False)
    cache.fill(samples, show_progress=False)
    assert len(calls) == 2
    path, other = (cache.path(sample.read()[0]) for sample in samples)
    whole, embedding = path.read_bytes(), load_file(path)[NAME]
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    contents = [whole[:-1], b"", bytes(flipped), other.read_bytes()]
    for tensors in ({"masks": embedding}, {NAME: embedding[:1]}, {NAME: embedding.half()}, {NAME: embedding * 2}):
        contents.append(save(tensors, safe_open(path, framework="pt").metadata()))
    for content in contents:
        path.write_bytes(content)
        cache.fill(samples, show_progress=False)
        assert path.read_bytes() == whole
    assert len(calls) == 2 + len(contents)
    for sample in samples:
        image, _ = sample.read()
        pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"]
        assert cache.read(image).equal(model.get_image_embeddings(pixel_values)[0])
