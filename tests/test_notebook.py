"""The notebook: what is committed is the script's, and it runs from top to bottom."""

import os
import re
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from checkpoint_tools.checkout import ROOT


SCRIPT, NOTEBOOK = (ROOT / "examples" / f"finetune_sam.{suffix}" for suffix in ("py", "ipynb"))


def test_notebook_is_that_of_the_script():
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, 4)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells], "run make notebook"
    assert NOTEBOOK.stat().st_size < 500_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    texts = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs
    )
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|content)/", texts), "paths of a machine"
    assert not [output for output in outputs if set(output.get("data", {})) == {"text/plain"}], (
        "values nobody asked for"
    )
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 4, "it is committed with its pictures"


def test_colab_opens_this_notebook_and_installs_what_it_needs():
    text = SCRIPT.read_text(encoding="utf-8")
    repo, file = re.search(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([\w/.]+)", text).groups()
    source, folder = re.search(r"!git clone .* https://github\.com/(\S+) (\S+)", text).groups()
    assert (repo, ROOT / file) == (source, NOTEBOOK)
    package, group = re.search(r'%pip install --quiet "([^"\[]+)\[(\w+)\]"', text).groups()
    assert package == folder == re.search(r"%cd (\S+)", text)[1]
    assert group in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path):
    """In a folder of its own, from which links lead to the checkout."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "build":
            os.symlink(path, tmp_path / path.name)
    notebook = jupytext.read(SCRIPT)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    before, *after = (float(line.split()[-1]) for line in printed.splitlines() if line.startswith("Mean IoU"))
    assert before < 0.85 < min(after)
    assert "Pixels that differ from stock SamModel: 0" in printed
    assert (tmp_path / "build" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()
