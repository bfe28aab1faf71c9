"""The repo itself: its documentation, its ViT-B configuration and what its code files import."""

import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import run_python
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import SamConfig, SamImageProcessor, SamProcessor

from checkpoint_tools.checkout import ROOT, SAM_TINY, split_class


PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "checkpoints/sam-tiny/README.md")
}
README = PAGES["README.md"]
WITHOUT_BLOCKS = {page: re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S) for page, text in PAGES.items()}
# What commands write, and what is elsewhere: the documentation names it, but no checkout has it.
NOT_IN_A_CHECKOUT = {
    "annotations.json",
    "data.json",
    "metrics.json",
    "run.yaml",
    "segmentation.json",
    "settings.json",
    "adapter/",
    "model/",
    "merged/",
    "sam/",
    "adapter_config.json",
}
OPTIONS_OF_ACCELERATE = {"--multi_gpu", "--num_processes", "--cpu"}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
WARNINGS_ARE_ERRORS = (
    *("-W", "error"),
    *("-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    *("-W", "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),  # older releases have no other name
)

# The first page runs where only what it says is installed ...
WITHOUT_OTHER_PACKAGES = """
import sys

for name in ("bitsandbytes", "matplotlib", "onnx", "pycocotools", "scipy", "skimage", "tifffile", "torchvision"):
    sys.modules[name] = None
"""
# ... and ends with a stock checkpoint, with the masks of the merged model.
IS_BACK_IN_STOCK = """
from transformers import SamModel

assert masks[0].shape == (1, 1, 303, 384)
merged, back = model.merge_and_unload().eval(), SamModel.from_pretrained("build/sam-tuned")
torch.testing.assert_close(back(**inputs).pred_masks, merged(**inputs).pred_masks)
"""


def blocks(page: str, language: str) -> str:
    """The code blocks of a page, one below the other."""
    matches = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGES[page], re.MULTILINE | re.DOTALL)
    return "\n".join(re.sub(rf"^{indentation}", "", code, flags=re.MULTILINE) for indentation, code in matches)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what a checkout has, and with the adapter that `finetune.py` writes by default."""
    names = ("config.json", "checkpoints", "checkpoint_tools", "docs", "image_data", "segmentation", "webapp")
    for path in (*ROOT.glob("*_sam_split.py"), *(ROOT / name for name in names)):
        (tmp_path / path.name).symlink_to(path)
    config = LoraConfig(target_modules=["q", "v"], task_type="FEATURE_EXTRACTION")
    adapted = get_peft_model(split_class().from_pretrained(SAM_TINY), config)
    adapted.save_pretrained(tmp_path / "build" / "finetune" / "adapter")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in PAGES[page]])
def test_python_blocks_run(page: str, checkout: Path, split_dir: Path) -> None:
    """In order and in one process, without warnings, and print what the page says."""
    code = blocks(page, "python").replace("<user>/sam-vit-base-split", str(split_dir))
    code = code.replace(', revision="<commit>"', "")
    if page == "README.md":
        code = WITHOUT_OTHER_PACKAGES + code + IS_BACK_IN_STOCK
    output = run_python(f"import os\nos.chdir({str(checkout)!r})\nexec({code!r})", options=WARNINGS_ARE_ERRORS)
    promised = re.findall(r"It prints `([^`]+)`", PAGES[page]) + re.findall(r"# (trainable params: .*)", PAGES[page])
    for text in promised:
        assert text in output


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command in the documentation, by page, in words."""
    for page in PAGES:
        lines = blocks(page, "bash").replace("\\\n", " ").splitlines()
        inline = re.findall(r"`((?:python|make|accelerate|pytest) [^`]+)`", WITHOUT_BLOCKS[page])
        for line in [*lines, *inline]:
            words = shlex.split(line, comments=True)
            if words and words[1:2] != ["-c"]:
                yield page, words


def python_command(words: list[str]) -> list[str]:
    """The script or module that a command runs, with the name of its sub-command, and its arguments."""
    start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    script, *arguments = words[start + (words[start] == "-m") :]
    return [f"{script} {arguments[0]}", *arguments[1:]] if script == "convert.py" else [script, *arguments]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` prints, and libraries beside it, by command; in one process, as imports take most of the time."""
    names = sorted({python_command(words)[0] for _, words in commands() if words[0] in ("python", "accelerate")})
    output = run_python(
        f"""
        import contextlib, io, json, os, runpy, sys
        os.chdir({str(ROOT)!r})
        sys.path.insert(0, "")
        texts = {{}}
        for name in {names}:
            script, *subcommand = name.split()
            sys.argv = [script, *subcommand, "--help"]
            sys.modules.pop(script, None)  # imported by a command before this one
            run = runpy.run_path if script.endswith(".py") else runpy.run_module
            text = io.StringIO()
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), contextlib.suppress(SystemExit):
                run(script, run_name="__main__")
            texts[name] = text.getvalue()
        print(json.dumps(texts))
        """
    )
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_commands_exist(helps: dict[str, str]) -> None:
    """With all of their options."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, words in commands():
        where = f"{page}: {' '.join(words)}"
        program = Path(words[0]).name
        if program in ("python", "accelerate"):
            name, *arguments = python_command(words)
            called = Path(name).name if ".py" in name else f"python -m {name}"
            assert helps[name].startswith(f"usage: {called} "), where
            assert str(ROOT) not in helps[name], where
            for option in filter(lambda word: word.startswith("--"), arguments):
                assert re.search(rf"{option}\b", helps[name]), f"{where}: there is no {option}"
            for config in re.findall(r"--config_file (\S+)", where):
                assert (ROOT / config).is_file(), where
        elif program == "make":
            assert {word for word in words[1:] if "=" not in word} <= {*targets}, where
        elif program == "pip":
            for extra in re.findall(r"\.\[(\w+)\]", where):
                assert extra in extras, where
            for file in re.findall(r"\S+\.txt", where):
                assert (ROOT / file).is_file(), where
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/")), where
        else:
            assert program in ("mkdir", "unzip") or words[:3] == ["python3", "-m", "venv"], where


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page: str, helps: dict[str, str]) -> None:
    """Those that are named outside of commands, of whatever command."""
    known = {*OPTIONS_OF_ACCELERATE, *re.findall(r"--[\w-]+", " ".join(helps.values()))}
    for code in re.findall(r"`(--[^`]+)`", WITHOUT_BLOCKS[page]):
        assert {word for word in code.split() if word.startswith("--")} <= known, code


def slug(heading: str) -> str:
    """The anchor that GitHub and the Hub give to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", WITHOUT_BLOCKS[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_exist(page: str) -> None:
    for name in re.findall(r"`([\w./*-]+(?:\.(?:py|md|json|toml|txt|yaml|jpg)|\w/))`", WITHOUT_BLOCKS[page]):
        places = (ROOT, (ROOT / page).parent)
        assert name in NOT_IN_A_CHECKOUT or any(any(place.glob(name)) for place in places), name


def test_every_page_is_linked_from_the_first_or_from_the_index() -> None:
    index = PAGES["docs/README.md"]
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page.removeprefix('docs/')})" in index
        elif page in ("docs/README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
            assert f"]({page})" in README


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda path: path.name)
def test_pictures_are_small(picture: Path) -> None:
    assert picture.stat().st_size < 150_000


def test_the_tested_versions_are_named() -> None:
    header, *rows = re.findall(r"^\| (.*) \|$", PAGES["docs/versions.md"].partition("##")[0], re.MULTILINE)
    files = re.findall(r"`(requirements/\w[\w-]*\.txt)`", header)
    assert len(files) == len([*(ROOT / "requirements").glob("*.txt")]) - 1, "all but no-deps.txt"
    pins = {file: (ROOT / file).read_text() for file in files}
    packages = set()
    for row in rows:
        package, *versions = (cell.strip() for cell in row.split("|"))
        packages.add(package)
        for file, version in zip(files, versions, strict=True):
            assert not version or re.search(rf"^{package}=={re.escape(version)}(\+\w+)?$", pins[file], re.M), row
    assert {"transformers", "torch", "peft", "huggingface_hub"} <= packages


def test_costs_are_those_last_measured() -> None:
    """The tables of `make bench`."""
    rows = re.findall(r"^\|.*\|$", (ROOT / "benchmarks" / "results.md").read_text(), re.MULTILINE)
    assert len(rows) > 5
    assert {*rows} <= {*PAGES["docs/cost.md"].splitlines()}


def test_the_changelog_begins_with_the_version_of_the_code() -> None:
    code = (ROOT / "configuration_sam_split.py").read_text(encoding="utf-8")
    version = re.search(r'^SAM_SPLIT_VERSION = "([^"]+)"', code, re.MULTILINE)
    latest = re.search(r"^## ([\d.]+)", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert version and latest
    assert version[1] == latest[1]


@pytest.mark.slow
def test_demo_runs(tmp_path: Path) -> None:
    """With two steps of training; that it learns is for a longer run to show."""
    output = run_python(
        f"""
        import runpy, sys
        sys.path.insert(0, {str(ROOT)!r})
        sys.argv = ["demo.py", "--steps", "2", "--output", {str(tmp_path)!r}]
        runpy.run_path({str(ROOT / "demo.py")!r}, run_name="__main__")
        """
    )
    assert "trainable params: 195,132" in output  # adapters and the mask decoder
    assert "the same masks" in output
    (before,) = re.findall(r"mean IoU rises from ([\d.]+)", " ".join(README.split()))
    assert f"{before} before" in output
    assert (tmp_path / "finetune" / "masks.png").stat().st_size > 10_000


def test_model_card_metadata() -> None:
    data = ModelCard(README).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "mask-generation")
    assert data.base_model == "facebook/sam-vit-base"
    assert {"peft", "lora", "custom_code"} <= set(data.tags)


def test_configuration_is_the_one_of_vit_b(tmp_path: Path) -> None:
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


def test_processor_is_the_one_of_sam(tmp_path: Path) -> None:
    SamProcessor(SamImageProcessor()).save_pretrained(tmp_path)
    expected = json.loads((tmp_path / "processor_config.json").read_text())
    assert json.loads((ROOT / "processor_config.json").read_text()) == expected
    assert json.loads((ROOT / "preprocessor_config.json").read_text()) == {
        **expected["image_processor"],
        "processor_class": "SamProcessor",
    }


@pytest.mark.parametrize("path", sorted(ROOT.glob("*_sam_split.py")), ids=lambda p: p.name)
def test_remote_code_imports_only_what_every_user_has(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {name.name.split(".")[0] for name in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (ROOT / f"{node.module}.py").exists(), "flat relative imports only"
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] in allowed


def test_packages_use_only_those_below_them() -> None:
    layers = ("checkpoint_tools", "image_data", "segmentation", "evaluation", "finetuning")
    for number, package in enumerate(layers):
        above = {*layers[number + 1 :], "webapp", "benchmarks", "pretraining"}
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and not node.level:
                    assert str(node.module).split(".")[0] not in above, f"{path}:{node.lineno}"
