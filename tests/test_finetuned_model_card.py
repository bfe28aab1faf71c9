"""Cards of trained adapters and models: facts of the base, results, and blocks that load them as they stand there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard, constants
from peft import PeftModel

import finetune
import segment
from checkpoint_tools.base_provenance import described
from checkpoint_tools.checkout import SAM_TINY, split_class
from checkpoint_tools.licences import Licence
from checkpoint_tools.push_to_hub import PushError
from finetuning.finetuned_model_card import card
from finetuning.recipe_settings import ModelSettings
from finetuning.result_files import complete_adapter, push
from finetuning.trainable_weights import make_trainable
from segmentation.adapted_model import load_base


pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]

SHORT = ["--steps", "1", "--batch-size", "1", "--objects", "2"]
METRICS = {
    "data": "6 images from images",
    "objects": {"train": 20, "validation": 10},
    "steps": 4,
    "prompts": ["point"],
    "before": {"iou": 0.5, "loss": 1.0, "objects": 10},
    "after": {"iou": 0.75, "loss": 0.5, "objects": 10},
    "selected_by": "iou",
    "better_than_base": True,
}


def train(output: Path, *arguments: object) -> Path:
    finetune.main([*SHORT, "--output", str(output), *map(str, arguments)])
    return output


def untrained_adapter(folder: Path, base: str, image_size: int | None = None) -> str:
    """Writes what the recipe writes for an adapter, and returns its card."""
    settings = ModelSettings(base=base, image_size=image_size)
    model, processor = load_base(base, image_size=image_size)
    adapted = randomize_adapter(make_trainable(model, settings))
    adapted.save_pretrained(folder)
    made_of = described(base, Path(base))
    complete_adapter(folder, made_of, processor)
    text = str(card(settings, made_of, METRICS, "adapter", None))
    (folder / "README.md").write_text(text)
    return text


def randomize_adapter(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def run_block(text: str) -> dict[str, Any]:
    """Runs the code of a card as it is."""
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


@pytest.fixture
def split_tiny(tmp_path: Path) -> Path:
    path = tmp_path / "split"
    split_class().from_pretrained(SAM_TINY).save_pretrained(path)
    for name in ("processor_config.json", "README.md"):
        shutil.copy(SAM_TINY / name, path)
    return path


def assert_loaded(names: dict[str, Any], adapter: Path, side: int = 128) -> None:
    """The block gives the model that the adapter makes of sam-tiny, and a processor for its images."""
    options = {} if side == 128 else {"image_size": side}
    expected = PeftModel.from_pretrained(split_class().from_pretrained(SAM_TINY, **options), adapter).eval()
    assert not names["model"].training
    inputs = names["processor"](torch.zeros(3, 40, 50), input_points=[[[[20, 20]]]], return_tensors="pt")
    assert inputs["pixel_values"].shape[-1] == side
    with torch.no_grad():
        actual = names["model"](pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
        wanted = expected(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
    assert torch.equal(actual.pred_masks, wanted.pred_masks)


@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("kind", ["stock", "split"])
def test_block_of_an_adapter(kind: str, side: int | None, tmp_path: Path, split_tiny: Path, monkeypatch) -> None:
    """The base is given as a relative path, and the block is run in another folder."""
    base = SAM_TINY if kind == "stock" else split_tiny
    monkeypatch.chdir(base.parent)
    text = untrained_adapter(tmp_path / "adapter", base.name, side)
    assert ("`AutoPeftModel` and `AutoModel` cannot load it" in text) == (kind == "stock")
    assert bool(list((tmp_path / "adapter").glob("*.py"))) == (kind == "stock")
    assert str(base) not in text
    monkeypatch.chdir(tmp_path / "adapter")
    assert_loaded(run_block(text), tmp_path / "adapter", side or 128)


@pytest.mark.slow
def test_block_of_an_uploaded_adapter(hub, photos, tmp_path: Path, capsys) -> None:
    """In a process of its own. The base's commit is named: a later one is not loaded."""
    name = "user/sam-uploaded"
    repo = hub.add(name, SAM_TINY)
    train(tmp_path / "run", *photos, "--base", name, "--push-to-hub", "user/adapter")
    assert f"{name}, is a stock SAM: README.md beside the adapter says how to load it" in capsys.readouterr().out
    repo.commit("main", {})
    text = hub.repos["user/adapter"].files()["README.md"].decode()
    assert '"user/adapter"' in text
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (name, "adapter", "apache-2.0")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    check = "print(type(model).__name__, type(model.get_base_model()).__name__, processor.image_processor.size)"
    process = subprocess.run(
        [sys.executable, "-c", block + check], env=environment, capture_output=True, text=True, check=False
    )
    assert "SamSplitModel" in process.stdout, process.stderr


@pytest.mark.parametrize("kind", ["split model", "stock model"])
def test_blocks_of_whole_models(kind: str, tmp_path: Path, monkeypatch) -> None:
    model, processor = load_base(str(SAM_TINY))
    (model if kind == "split model" else model.to_sam()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    text = str(card(ModelSettings(), described(str(SAM_TINY), SAM_TINY), METRICS, kind, None))
    monkeypatch.chdir(tmp_path)
    names = run_block(text)
    assert type(names["model"]).__name__ == ("SamSplitModel" if kind == "split model" else "SamModel")
    assert names["processor"].image_processor.size["longest_edge"] == 128
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.base_model) == ("apache-2.0", "transformers", None)


def test_facts_of_the_base(tmp_path: Path) -> None:
    base = shutil.copytree(SAM_TINY, tmp_path / "mine")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: facebook/sam-vit-base\n---\n"
    )
    (base / "LICENSE").write_text("mine")
    made_of = described(str(base), base)
    text = str(card(ModelSettings(base=str(base)), made_of, METRICS, "split model", None))
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")
    assert (data.base_model, data.base_model_relation) == ("facebook/sam-vit-base", "finetune")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("iou", 0.75, "6 images from images")
    assert "That of `mine`: mine (LICENSE)." in text
    assert str(tmp_path) not in text


def test_uploads_need_a_licence_and_a_base_that_others_have(hub, tmp_path: Path) -> None:
    bare = shutil.copytree(SAM_TINY, tmp_path / "bare")
    (bare / "README.md").unlink()
    hub.add("user/bare", bare)
    for arguments, problem in (
        (["--base", "user/bare"], "--push-to-hub: user/bare: its licence is unknown"),
        (["--base", "user/bare", "--license", "other"], "give --license-name and --license-link"),
        (["--base", str(SAM_TINY)], "which others do not have"),
    ):
        with pytest.raises(SystemExit, match=problem):
            train(tmp_path / "run", *arguments, "--push-to-hub", "user/adapter")
    assert not (tmp_path / "run").exists()
    assert "user/adapter" not in hub.repos
    assert described(str(bare), bare, Licence("mit")).licence.problem is None


@pytest.mark.slow
def test_changes_on_the_way_are_found(hub, tmp_path: Path) -> None:
    untrained_adapter(tmp_path / "adapter", str(SAM_TINY))
    settings = SimpleNamespace(hub_model_id="user/changed", hub_token=None, hub_private_repo=None, hub_revision=None)
    push(tmp_path / "adapter", settings)
    push(tmp_path / "adapter", settings)  # the same again
    hub.tamper = lambda files: files.pop("processor_config.json")
    (tmp_path / "adapter" / "segmentation.json").write_text("{}")
    with pytest.raises(PushError, match=r"it lacks processor_config\.json"):
        push(tmp_path / "adapter", settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"base_model_name_or_path": None}, "does not name the model that it was trained on: give it with --base"),
        ({"base_model_name_or_path": 3}, "does not name the model"),
        ({"base_model_name_or_path": "/home/somebody/sam"}, "/home/somebody/sam: there is no such folder"),
        ({"r": "x"}, "does not fit .* or is damaged"),
        ({"peft_type": "NOPE"}, "not an adapter"),
        ([], "not an adapter"),
        (3, "not an adapter"),
    ],
    ids=str,
)
def test_adapters_with_settings_of_a_wrong_shape(settings: Any, problem: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    untrained_adapter(adapter, str(SAM_TINY))
    file = adapter / "adapter_config.json"
    if isinstance(settings, dict):
        settings = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps(settings))
    photo = str(ROOT / "docs" / "images" / "coins.png")
    with pytest.raises(SystemExit, match=problem):
        segment.main([photo, "--point", "9", "9", "--adapter", str(adapter), "--output", str(tmp_path / "out")])
