"""The repo itself: its README, its ViT-B configuration and what its code files import."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import README, run_python
from huggingface_hub import ModelCard
from PIL import Image
from transformers import SamConfig, SamImageProcessor, SamProcessor

from checkpoint_tools.staging import ROOT, split_class


def test_readme_snippets_run(split_dir, stock_dir, tmp_path):
    """In order and in one process, on small stand-ins for the checkpoints they name."""
    Image.effect_noise((200, 180), 80).save(tmp_path / "photo.png")
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert code.count("<user>/sam-vit-base-split") == code.count('"facebook/sam-vit-base"') == 1
    code = code.replace("<user>/sam-vit-base-split", str(split_dir)).replace("facebook/sam-vit-base", str(stock_dir))
    check = """
        import os
        os.chdir({directory!r})
        exec({code!r})
        from transformers import SamModel
        back = SamModel.from_pretrained("sam-tuned")
        assert masks[0].shape == (1, 3, 180, 200)
        torch.testing.assert_close(back(**inputs).pred_masks, merged(**inputs).pred_masks)
        AutoModel.from_pretrained("sam-vit-base-split", trust_remote_code=True)
        AutoProcessor.from_pretrained("sam-vit-base-split")
    """
    assert "trainable params: " in run_python(check.format(directory=str(tmp_path), code=code))


def test_demo_runs(tmp_path):
    """With two steps of training; that it learns is for a longer run to show."""
    output = run_python(
        f"""
        import runpy, sys
        sys.argv = ["demo.py", "--steps", "2", "--output", {str(tmp_path)!r}]
        runpy.run_path({str(ROOT / "demo.py")!r}, run_name="__main__")
        """
    )
    assert "trainable params: 36,864" in output
    assert "the same masks" in output
    assert (tmp_path / "finetune" / "masks.png").stat().st_size > 10_000


def test_model_card_metadata():
    data = ModelCard(README).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "mask-generation")
    assert data.base_model == "facebook/sam-vit-base"
    assert {"peft", "lora", "custom_code"} <= set(data.tags)


def test_readme_names_the_tested_versions():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for package, oldest, newest in rows:
        for version, file in ((oldest, "floor.txt"), (newest, "newest.txt")):
            assert f"{package}=={version}\n" in (ROOT / "requirements" / file).read_text()


def test_configuration_is_the_one_of_vit_b(tmp_path):
    """Read by the library, as different releases write different defaults."""
    with torch.device("meta"):
        model = split_class()(SamConfig())
    model.save_pretrained(tmp_path, state_dict={})
    written, expected = (json.loads((path / "config.json").read_text()) for path in (ROOT, tmp_path))
    for config in (written, expected):
        del config["transformers_version"]
        for part in ("prompt_encoder_config", "mask_decoder_config"):
            del config[part]["model_type"]  # empty in transformers 5.0
    assert written == expected


def test_processor_is_the_one_of_sam(tmp_path):
    SamProcessor(SamImageProcessor()).save_pretrained(tmp_path)
    expected = json.loads((tmp_path / "processor_config.json").read_text())
    assert json.loads((ROOT / "processor_config.json").read_text()) == expected
    assert json.loads((ROOT / "preprocessor_config.json").read_text()) == {
        **expected["image_processor"],
        "processor_class": "SamProcessor",
    }


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_sam_split.py")), ids=lambda p: p.name)
def test_remote_code_imports_only_what_every_user_has(path: Path):
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (ROOT / f"{node.module}.py").exists(), "flat relative imports only"
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] in allowed


def test_quick_start_gives_no_warning(split_dir, stock_dir, tmp_path):
    """Nor does loading and saving from a stock checkpoint, with every warning an error."""
    Image.effect_noise((200, 180), 80).save(tmp_path / "photo.png")
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2])
    code = code.replace("<user>/sam-vit-base-split", str(split_dir)).replace("facebook/sam-vit-base", str(stock_dir))
    run_python(f"import os\nos.chdir({str(tmp_path)!r})\n{code}", options=("-W", "error"))
    assert (tmp_path / "sam-vit-base-split" / "model.safetensors").exists()


COMMANDS = ["convert", "demo", "finetune", "segment", "upload", "verify"]
MODULES = [f"{path.parent.name}.{path.stem}" for path in (ROOT / "benchmarks").glob("[!_]*.py")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_start_from_anywhere(command, tmp_path):
    words = [sys.executable, str(ROOT / f"{command}.py"), "--help"]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"python {command}.py" in process.stdout


@pytest.mark.parametrize("module", [*sorted(MODULES), "pretraining.train_sam_tiny"])
def test_modules_start(module):
    words = [sys.executable, "-m", module, "--help"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m {module}" in process.stdout
