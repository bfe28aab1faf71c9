"""Spaces: what is staged, that it starts from there, and what the Hub gets."""

import ast
import inspect
import json
import re
import runpy
import shutil
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import torch
from hub import Hub
from huggingface_hub import RepoCard, constants
from peft import LoraConfig, get_peft_model

from checkpoint_tools import spaces
from checkpoint_tools.checkout import ROOT, SAM_TINY, split_class
from checkpoint_tools.output_folders import MARKER
from segmentation import adapted_model
from segmentation.adapted_model import load_adapted


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
CARD = """---
license: mit
library_name: peft
---

# Coins

Made of coins.

On ten coins that it has not seen:

| | before | after |
|---|---|---|
| iou | 0.5 | 0.9 |

## Something else

| a | b |
|---|---|
"""


def upload(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["upload.py", *arguments])
    runpy.run_path(str(ROOT / "upload.py"), run_name="__main__")


def imported_by(folder: Path) -> set[str]:
    """The distributions that the Python files of a folder import, in their functions, too."""
    nodes = [node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    roots = {root for root in roots if not any((folder / f"{root}{ending}").exists() for ending in ("", ".py"))}
    return {packages_distributions().get(root, [root])[0] for root in roots}


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> Hub:
    """A Hub with sam-tiny, and an adapter of it with a card."""
    hub.add("user/tiny", SAM_TINY)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    adapter = tmp_path / "adapter"
    get_peft_model(split_class().from_pretrained(SAM_TINY), config).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "user/tiny"}))
    (adapter / "README.md").write_text(CARD)
    hub.add("user/coins", adapter)
    return hub


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Takes the place of the process that the slow test starts, and counts it."""
    calls: list[tuple] = []
    monkeypatch.setattr(spaces, "verify_space", lambda *args: calls.append(args) or 1234)
    return calls


@pytest.mark.slow
def test_a_space_starts_from_the_staged_folder_before_it_is_pushed(models, monkeypatch, tmp_path, capfd):
    upload(monkeypatch, "--space", "user/click", "--adapter", "user/coins", "--output", str(tmp_path / "space"))
    output = capfd.readouterr().out
    assert "a click on coins.png gives a mask of" in output
    pushed = models.repos["spaces/user/click"].files()
    staged = {
        path.relative_to(tmp_path / "space").as_posix(): path.read_bytes()
        for path in (tmp_path / "space").rglob("*")
        if path.is_file() and path.name != MARKER
    }
    assert {name: content for name, content in pushed.items() if name != ".gitattributes"} == staged
    assert not [name for name in staged if "__pycache__" in name]
    (tmp_path / "space" / "app.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(ValueError, match="The staged Space does not work: RuntimeError: broken"):
        spaces.verify_space(tmp_path / "space", spaces.EXAMPLE, constants.ENDPOINT, None)


@pytest.mark.slow
def test_the_models_are_pinned_and_described(models, monkeypatch, answers, tmp_path):
    base, adapter = (models.repos[name].refs["main"] for name in ("user/tiny", "user/coins"))
    upload(monkeypatch, "--space", "user/click", "--adapter", "user/coins", "--output", str(tmp_path / "space"))
    assert len(answers) == 1
    app = (tmp_path / "space" / "app.py").read_text()
    for name, value in {
        "base": "user/tiny",
        "revision": base,
        "adapter": "user/coins",
        "adapter_revision": adapter,
    }.items():
        assert f'        {name}="{value}",\n' in app
    card = RepoCard.load(tmp_path / "space" / "README.md", repo_type="space")
    data = card.data.to_dict()
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", version("gradio"), "app.py")
    assert 0 < len(data["short_description"]) <= 60
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (data["models"], data["license"]) == (["user/coins", "user/tiny"], "mit")
    assert "On ten coins that it has not seen:\n\n| | before | after |" in card.text
    assert "| a | b |" not in card.text
    (code,) = re.findall("```python\n(.*?)```", card.text, re.DOTALL)
    signature, calls = inspect.signature(load_adapted), []
    monkeypatch.setattr(adapted_model, "load_adapted", lambda *args, **kwargs: calls.append((args, kwargs)) or (1, 2))
    exec(code, {})
    (call,) = calls
    assert signature.bind(*call[0], **call[1]).arguments == {
        **{"adapter": "user/coins", "base": "user/tiny"},
        **{"revision": base, "adapter_revision": adapter},
    }
    pins = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert {f"transformers=={version('transformers')}", f"peft=={version('peft')}"} <= {*pins}
    assert not [pin for pin in pins if "+" in pin or pin.startswith("gradio")]
    missing = imported_by(tmp_path / "space") - {pin.partition("==")[0] for pin in pins} - {"gradio", "spaces"}
    assert not missing, "the Space would not start"


@pytest.mark.slow
def test_an_unknown_licence_stays_unknown(models, monkeypatch, answers, tmp_path):
    tiny = shutil.copytree(SAM_TINY, tmp_path / "tiny")
    (tiny / "README.md").unlink()
    models.add("user/silent", tiny)
    upload(monkeypatch, "--space", "user/click", "--base", "user/silent")
    text = models.repos["spaces/user/click"].files()["README.md"].decode()
    assert "\nlicense: unknown\n" in text
    assert "Licence of the weights: unknown." in text
    assert "The model's card states no results." in text


@pytest.mark.slow
def test_a_dry_run_pushes_nothing_and_a_second_push_makes_no_commit(models, monkeypatch, answers, capsys):
    upload(monkeypatch, "--space", "user/click", "--base", "user/tiny", "--dry-run")
    assert "spaces/user/click" not in models.repos
    upload(monkeypatch, "--space", "user/click", "--base", "user/tiny")
    repo = models.repos["spaces/user/click"]
    head = repo.refs["main"]
    upload(monkeypatch, "--space", "user/click", "--base", "user/tiny")
    assert repo.refs["main"] == head
    assert "No changes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", str(SAM_TINY)), "a Space loads its model from the Hub"),
        (("--base", "user/none"), "user/none is not there"),
        (("--base", "user/tiny", "--repo-id", "user/other"), "Push the model first, then its Space"),
        (("--adapter", "user/local"), "is not on the Hub: name one that is with --base"),
    ],
)
def test_what_a_space_cannot_be_made_of(models, monkeypatch, answers, tmp_path, capsys, arguments, message):
    local = tmp_path / "local"
    local.mkdir()
    (local / "adapter_config.json").write_text('{"base_model_name_or_path": "checkpoints/sam-tiny/x"}')
    models.add("user/local", local)
    with pytest.raises(SystemExit) as end:
        upload(monkeypatch, "--space", "user/click", *arguments)
    assert message in f"{end.value} {capsys.readouterr().err}"
    assert not answers
    assert "spaces/user/click" not in models.repos


@pytest.mark.slow
def test_private_models_are_said_to_need_a_secret(models, monkeypatch, answers, capsys):
    models.repos["user/tiny"].private = True
    upload(monkeypatch, "--space", "user/click", "--base", "user/tiny")
    assert answers[0][3] == "hf_writer"
    assert "add a secret HF_TOKEN" in capsys.readouterr().out
