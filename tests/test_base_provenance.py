"""`--base-model` names a copy of the base on the Hub, if it is the same model, so that others can load the adapter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import configure, rewrite
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, SamModel

import finetune
from checkpoint_tools.checkout import SAM_TINY, split_class


@pytest.fixture
def adapter(stock_dir: Path, tmp_path: Path) -> Path:
    """Of stock SAM's `qkv`."""
    path = tmp_path / "adapter"
    config = LoraConfig(target_modules=["qkv"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    get_peft_model(SamModel.from_pretrained(stock_dir), config).save_pretrained(path)
    return path


def named(folder: Path) -> tuple[str, str]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["base_model_name_or_path"], config["revision"]


def run_elsewhere(code: str, home: Path) -> str:
    """Runs code with an empty cache, as others do."""
    environment = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=home.parent
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


LOAD = """
from peft import AutoPeftModelForFeatureExtraction
model = AutoPeftModelForFeatureExtraction.from_pretrained("out", trust_remote_code=True)
print(type(model.get_base_model()).__name__, sorted(model.peft_config["default"].target_modules))
"""


@pytest.mark.slow
def test_a_converted_adapter_loads_by_itself(adapter, hub, stock_dir, split_dir, tmp_path, convert):
    """At the commit that was compared."""
    repo = hub.add("user/sam-split", split_dir)
    first = repo.refs["main"]
    convert(f"adapter-to-split adapter out --base {stock_dir} --base-model user/sam-split")
    assert named(tmp_path / "out") == ("user/sam-split", first)
    repo.commit("main", {})
    assert run_elsewhere(LOAD, tmp_path / "home").split() == ["SamSplitModel", "['k',", "'q',", "'v']"]


def test_the_way_back_names_the_stock_model(adapter, hub, stock_dir, split_dir, tmp_path, convert, refused):
    repo = hub.add("user/sam", stock_dir)
    hub.add("user/sam-split", split_dir)
    convert(f"adapter-to-split adapter out --base {stock_dir}")
    assert "name it with --base-model" in convert(f"adapter-to-fused out none --base {split_dir}")
    convert(f"adapter-to-fused out back --base {split_dir} --base-model user/sam")
    assert named(tmp_path / "back") == ("user/sam", repo.refs["main"])
    message = refused(f"adapter-to-fused out other --base {split_dir} --base-model user/sam-split")
    assert "fits (model_type 'sam'; convert.py to-sam makes it), got 'sam_split'" in message


def change_a_weight(folder: Path) -> None:
    rewrite(folder, lambda weights: weights["vision_encoder.layers.1.attn.q.weight"][0, 0].add_(1e-3))


def change_a_setting(folder: Path) -> None:
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    configure(folder, "vision_config", {**vision, "hidden_act": "relu"})


def fuse(folder: Path) -> None:
    split_class().from_pretrained(folder).to_sam().save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_weight, "is another model: its weights differ in vision_encoder.layers.1.attn.q.weight."),
        (change_a_setting, "has other settings: its outputs differ"),
        (fuse, "expected a model that the adapter fits (model_type 'sam_split'; upload.py makes it), got 'sam'"),
    ],
)
def test_another_model_is_refused(change, message, adapter, hub, stock_dir, split_dir, tmp_path, refused):
    model: PreTrainedModel = split_class().from_pretrained(split_dir)
    model.save_pretrained(tmp_path / "other")
    change(tmp_path / "other")
    hub.add("user/other", tmp_path / "other")
    output = refused(f"adapter-to-split adapter out --base {stock_dir} --base-model user/other")
    assert "--base-model user/other" in output
    assert message in output
    assert not (tmp_path / "out").exists()


def test_a_folder_is_refused(adapter, stock_dir, split_dir, refused):
    output = refused(f"adapter-to-split adapter out --base {stock_dir} --base-model {split_dir}")
    assert "is on this machine: expected the Hub id of a model" in output


def test_an_adapter_of_samed(hub, stock_dir, split_dir, tmp_path, convert):
    repo = hub.add("user/sam-split", split_dir)
    shapes = {"a": (2, 28), "b": (28, 2)}
    weights = {f"w_{factor}_{index:03d}": torch.randn(shape) for factor, shape in shapes.items() for index in range(6)}
    torch.save(weights, "lora.pth")
    convert(f"from-samed lora.pth out --base {stock_dir} --base-model user/sam-split")
    assert named(tmp_path / "out") == ("user/sam-split", repo.refs["main"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_a_trained_adapter_of_a_folder(hub, photos, tmp_path):
    """Its base was a stock SAM in a folder. The block of its card loads it elsewhere."""
    split_class().from_pretrained(SAM_TINY).save_pretrained(tmp_path / "split")
    hub.add("user/tiny", tmp_path / "split")
    options = ["--steps", "1", "--batch-size", "1", "--objects", "2", "--output", str(tmp_path / "run"), "--grid", "4"]
    options += ["--image-size", "64"]
    options += ["--license", "apache-2.0", "--push-to-hub", "user/adapter"]
    with pytest.raises(SystemExit, match=r"upload the base with upload\.py, and give its Hub id as --base-model"):
        finetune.main([*options, *photos])
    finetune.main([*options, *photos, "--base-model", "user/tiny"])
    files = hub.repos["user/adapter"].files()
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "user/tiny"
    assert config["revision"] == hub.repos["user/tiny"].refs["main"]
    assert not [name for name in files if name.endswith(".py")]
    text = files["README.md"].decode()
    assert ModelCard(text).data.base_model == "user/tiny"
    assert "AutoPeftModelForFeatureExtraction.from_pretrained(adapter" in text


def test_training_on_another_model_is_refused_before_it_begins(hub, photos, split_dir, tmp_path):
    hub.add("user/other", split_dir)
    with pytest.raises(SystemExit, match="--base-model user/other is another model"):
        finetune.main([*photos, "--base-model", "user/other", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
