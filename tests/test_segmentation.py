"""Segmenting an image from the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, SamModel, pipeline
from transformers.utils import is_torchvision_available

import segment
from checkpoint_tools.staging import SAM_TINY, split_class
from finetuning.sources import Coins
from pretraining.drawn_scenes import draw_scene


POINTS = ["--point", "50", "155", "--point", "110", "160"]  # two coins


@pytest.fixture(scope="module")
def coins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "coins.png"
    Image.fromarray(Coins().read().image).save(path)
    return path


def run(*arguments: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the overlay and the label image."""
    segment.main(list(map(str, arguments)))
    output = Path(arguments[arguments.index("--output") + 1])
    pictures = []
    for kind in ("masks", "labels"):
        with Image.open(output.with_name(f"{output.name}-{kind}.png")) as file:
            pictures.append(np.asarray(file))
    return pictures[0], pictures[1]


def test_points_give_the_masks_of_stock_sam(coins, tmp_path):
    shown, labels = run(coins, *POINTS, "--output", tmp_path / "new" / "photo")
    stock, processor = SamModel.from_pretrained(SAM_TINY), AutoProcessor.from_pretrained(SAM_TINY)
    with Image.open(coins) as image:
        inputs = processor(image, input_points=[[[[50, 155]], [[110, 160]]]], return_tensors="pt")
        original = np.asarray(image)
    with torch.no_grad():
        outputs = stock(
            pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float(), multimask_output=False
        )
    (masks,) = processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    expected = np.where(masks[1, 0], 2, masks[0, 0])  # the last is in front
    np.testing.assert_array_equal(labels, expected)
    assert set(np.unique(labels)) == {0, 1, 2}
    np.testing.assert_array_equal(shown[labels == 0], original[labels == 0])
    assert (shown[labels > 0] != original[labels > 0]).any(-1).mean() > 0.99


def test_boxes_and_several_masks(coins, tmp_path):
    _, labels = run(coins, "--box", "20", "120", "85", "190", "--multimask", "--output", tmp_path / "photo")
    inside = np.zeros(labels.shape, dtype=bool)
    inside[115:196, 15:91] = True
    assert labels.any() and (labels > 0)[inside].sum() > 0.8 * (labels > 0).sum()


def test_an_adapter_brings_its_base(coins, tmp_path, monkeypatch):
    model = split_class().from_pretrained(SAM_TINY)
    config = LoraConfig(target_modules=["q", "v"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    _, adapted = run(coins, *POINTS, "--adapter", "adapter", "--output", "photo")
    _, plain = run(coins, *POINTS, "--output", "plain")
    assert (adapted != plain).any()
    Path("adapter", "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"adapter: does not fit .* or is damaged"):
        run(coins, *POINTS, "--adapter", "adapter", "--output", "damaged")


def test_pictures_replace_only_those_of_an_earlier_run(coins, tmp_path):
    run(coins, *POINTS, "--output", tmp_path / "photo")
    with pytest.raises(SystemExit, match=r"photo-masks\.png exists: .* --force"):
        run(coins, *POINTS, "--output", tmp_path / "photo")
    run(coins, *POINTS, "--output", tmp_path / "photo", "--force")
    mine = tmp_path / "mine-labels.png"
    mine.write_bytes(coins.read_bytes())
    with pytest.raises(SystemExit, match=r"mine-labels\.png is not marked as an earlier output"):
        run(coins, *POINTS, "--output", tmp_path / "mine", "--force")
    with pytest.raises(SystemExit, match="which is read, are the same"):
        run(mine, *POINTS, "--output", tmp_path / "mine", "--force")
    assert mine.read_bytes() == coins.read_bytes()


@pytest.mark.parametrize(
    ("options", "thresholds"),
    [
        (["--min-iou", "0.5", "--min-stability", "0.6"], {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}),
        ([], {}),  # the defaults of the pipeline
    ],
    ids=["given", "default"],
)
def test_everything_gives_the_masks_of_stock_sam(options, thresholds, tmp_path, logged):
    pytest.importorskip("torchvision", reason="duplicate masks are removed with torchvision")
    scene, _ = draw_scene(np.random.default_rng(3), 128, difficulty=0.5)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    _, labels = run(tmp_path / "scene.png", "--everything", "--grid", "8", *options, "--output", tmp_path / "all")
    processor = AutoProcessor.from_pretrained(SAM_TINY)
    generate = pipeline(
        "mask-generation", SamModel.from_pretrained(SAM_TINY), image_processor=processor.image_processor
    )
    masks = generate(Image.fromarray(scene), points_per_crop=8, **thresholds)["masks"]
    assert len(masks) > (1 if thresholds else 0)
    expected = np.zeros_like(labels)
    for number, mask in enumerate(sorted(map(np.asarray, masks), key=np.sum, reverse=True), start=1):
        expected[mask] = number
    np.testing.assert_array_equal(labels, expected)
    assert logged == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["photo.png"], "expected --point, --box or --everything"),
        (["photo.png", "--everything", "--point", "1", "1"], "expected --point, --box or --everything"),
        (["photo.png", "--box", "1", "1", "2", "2", "--point", "1", "1"], "expected one kind"),
        pytest.param(
            ["photo.png", "--everything"],
            "pip install torchvision",
            marks=pytest.mark.skipif(is_torchvision_available(), reason="it is there"),
        ),
    ],
)
def test_contradictory_arguments_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit) as raised:
        segment.main(arguments)
    assert raised.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--point", "385", "10"], "outside of the image of 384 x 303"),
        (["--box", "9", "9", "9", "20"], "expected left < right"),
        (["--point", "1", "1", "--base", "nothing"], "nothing: not a SAM v1 checkpoint"),
        (["--point", "1", "1", "--adapter", "nothing"], "nothing: not an adapter"),
    ],
)
def test_nothing_is_written_for_bad_prompts_and_models(arguments, problem, coins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=problem):
        segment.main([str(coins), *arguments])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(SystemExit, match=r"photo\.png: cannot be read"):
        segment.main([str(tmp_path / "photo.png"), "--point", "1", "1"])
