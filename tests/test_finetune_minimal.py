"""The example that people copy into their own projects."""

import ast
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from checkpoint_tools.checkout import ROOT, SAM_TINY
from checkpoint_tools.conversions import to_split
from image_data.sources import Coins


FILE = ROOT / "examples" / "finetune_minimal.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_from_folders(example, tmp_path):
    to_split(str(SAM_TINY), tmp_path / "sam-split")
    coins = Coins().read()
    coins.labels[150:] = 0  # half of the coins suffice
    for name, array in (("images", coins.image), ("masks", coins.labels.astype(np.uint16))):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "coins.png")
    before, after = example.main(
        str(tmp_path / "sam-split"), tmp_path / "images", tmp_path / "masks", tmp_path / "adapter", steps=20
    )
    assert after > before + 0.1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_it_needs_nothing_of_this_repo():
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= {"torch", "transformers", "peft", "numpy", "PIL"}
