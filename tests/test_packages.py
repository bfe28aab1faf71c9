"""What the documentation says to install is enough for each command, and a missing package is named in one line."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from modulefinder import ModuleFinder

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


GROUPS = {
    **dict.fromkeys(("convert", "upload", "verify"), "tools"),
    **dict.fromkeys(("finetune", "segment", "evaluate", "demo"), "finetune"),
    "app": "app",
}
# What comes with `datasets` and gradio, which `--dataset` and `--space` ask for, and what is on ZeroGPU alone.
ASKED_FOR = {"datasets", "gradio_client", "httpx", "spaces"}
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


RUN = """
import runpy, sys, types

class Finder:
    def find_spec(name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder)
if {empty!r}:
    sys.modules[{empty!r}] = types.ModuleType({empty!r})
sys.argv = [{command!r}, "--help"]
sys.path.insert(0, {folder!r})
runpy.run_path({folder!r} + "/" + {command!r}, run_name="__main__")
"""


def run(command: str, missing: str = "", empty: str = "") -> str:
    """Runs `--help` of a command where a package is missing, or empty, and returns the one line that it ends with."""
    code = RUN.format(command=f"{command}.py", folder=str(ROOT), missing=missing, empty=empty)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = process.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", GROUPS)
def test_a_package_that_is_missing(command):
    expected = f'{command}.py needs huggingface_hub, which is not installed: pip install ".[{GROUPS[command]}]"'
    assert run(command, missing="huggingface_hub") == expected


@pytest.mark.slow
def test_a_package_that_is_imported_late():
    expected = 'finetune.py needs skimage, which is not installed: pip install ".[finetune]"'
    assert run("finetune", missing="skimage") == expected


def test_a_package_that_is_too_old():
    line = run("convert", empty="transformers")
    assert line.startswith("convert.py needs another version of transformers (")
    assert line.endswith('): pip install --upgrade ".[tools]"')


@pytest.mark.parametrize("command", GROUPS)
def test_a_group_holds_all_that_its_command_imports(command):
    """Itself, or as what one of its packages needs."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.run_script(str(ROOT / f"{command}.py"))
    imported = {name.partition(".")[0] for name in finder.any_missing()} - sys.stdlib_module_names - ASKED_FOR
    assert "torch" in imported
    distributions, installed = packages_distributions(), closure(GROUPS[command])
    for name in imported:
        assert {canonicalize_name(each) for each in distributions[name]} & installed, name


def closure(group: str) -> set[str]:
    """Returns all that pip installs for a group."""
    names: set[str] = set()
    waiting = list(DECLARED[group])
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "sam-split":
            waiting += [each for extra in requirement.extras for each in DECLARED[extra]]
        elif name not in names and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            names.add(name)
            try:
                waiting += requires(name) or []
            except PackageNotFoundError:  # for another platform
                continue
    return names


def test_the_documentation_names_the_groups():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        group
        for document in documents
        for groups in re.findall(r'pip install "\.\[([\w,]+)\]"', document.read_text(encoding="utf-8"))
        for group in groups.split(",")
    }
    assert named >= {*GROUPS.values(), "datasets", "notebook"}
    assert named <= DECLARED.keys()
