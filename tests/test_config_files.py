"""Processors and configurations are data: no code that a checkpoint names is run, asked about or passed on."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, configure
from transformers import SamProcessor

import convert
import finetune
import segment
from checkpoint_tools.config_files import SETTINGS, read_processor
from segmentation.adapted_model import ModelError, load_base
from segmentation.settings import SegmentationSettings


OLD = {  # as facebook/sam-vit-base has it
    **{f"do_{step}": True for step in ("convert_rgb", "normalize", "pad", "rescale", "resize")},
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "SamImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "pad_size": {"height": 1024, "width": 1024},
    "processor_class": "SamProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 1024},
}
OTHER = {**OLD, "do_normalize": False, "image_mean": [0, 0, 0], "image_std": [1, 1.0, 1], "size": {"longest_edge": 64}}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": OLD},
        {"preprocessor_config.json": OLD, "processor_config.json": {"processor_class": "SamProcessor"}},
        {"processor_config.json": {"image_processor": OLD, "processor_class": "SamProcessor"}},
        {"preprocessor_config.json": OLD, "processor_config.json": {"image_processor": OTHER}},
        {"preprocessor_config.json": {**OTHER, "mask_size": {"longest_edge": 16}, "device": None, "do_pad": None}},
        {"preprocessor_config.json": {**OLD, "image_processor_type": "SamImageProcessorFast"}},
        {"preprocessor_config.json": {"image_processor_type": "SamImageProcessor"}},
    ],
)
def test_old_and_new_files_are_read_as_transformers_reads_them(files: dict[str, dict], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    expected = SamProcessor.from_pretrained(tmp_path).image_processor.to_dict()
    actual = read_processor(tmp_path).image_processor.to_dict()
    if "do_pad" in files.get("preprocessor_config.json", {}) and expected["do_pad"] is None:
        expected["do_pad"] = True  # nothing, for a setting that must be something, is the default here
    assert {name: actual.get(name) for name in SETTINGS} == {name: expected.get(name) for name in SETTINGS}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("size", {"shortest_edge": 64}, "size={'shortest_edge': 64}, expected sides in pixels"),
        ("size", {"longest_edge": "64"}, "expected sides"),
        ("pad_size", 3.5, "expected sides"),
        ("image_mean", [0.5], "expected a list of 3 numbers"),
        ("image_mean", [float("nan")] * 3, "expected a list of 3 numbers"),
        ("image_std", [1, 0, 1], "other than 0"),
        ("do_rescale", "yes", "expected true or false"),
        ("resample", "bilinear", "expected a whole number"),
        ("rescale_factor", [1], "expected a number"),
        ("image_processor_type", "ViTImageProcessor", "is 'ViTImageProcessor', expected SamImageProcessor"),
    ],
)
def test_settings_that_cannot_be_right(name: str, value: object, problem: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**OLD, name: value}))
    with pytest.raises(ValueError) as caught:
        read_processor(tmp_path)
    assert problem in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", "3", "null"])
def test_files_that_are_no_settings(content: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"processor_config\.json"):
        read_processor(tmp_path)


# --- through the commands


CODE = "raise SystemExit('code of the base was run')"


@pytest.fixture
def foreign_base(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base whose settings name code wherever transformers looks for it, and a user who would say yes to it."""
    folder = shutil.copytree(base_dir, tmp_path / "foreign")
    auto_map = {f"Auto{name}": f"evil.Evil{name}" for name in ("Config", "Model", "Processor", "ImageProcessor")}
    configure(folder, "auto_map", auto_map)
    configure(folder, "custom_pipelines", {"mask-generation": {"impl": "evil.EvilPipeline", "pt": ["AutoModel"]}})
    configure(folder, "_name_or_path", "/home/somebody/secret")
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        config[part] |= {"auto_map": auto_map, "custom_pipelines": {}, "_name_or_path": "/home/somebody/secret"}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor |= {"auto_map": auto_map, "processor_class": "EvilProcessor"}
    processor["image_processor"] |= {"auto_map": auto_map, "evil": True}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**processor["image_processor"], "auto_map": auto_map})
    )
    (folder / "evil.py").write_text(CODE)

    def say_yes(prompt: str) -> str:
        raise AssertionError(f"asked {prompt}")

    monkeypatch.setattr("builtins.input", say_yes)
    return folder


def assert_nothing_foreign(folder: Path) -> None:
    texts = {path.name: path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".py", ".md")}
    assert not any(word in text for text in texts.values() for word in ("evil", "Evil", "/home/somebody", CODE))
    assert {name for name in texts if name.endswith(".py")} <= {path.name for path in ROOT.glob("*_sam_split.py")}
    assert '"custom_pipelines"' not in texts["config.json"]
    ours = json.loads((ROOT / "config.json").read_text())["auto_map"]
    assert json.loads(texts["config.json"]).get("auto_map", ours) == ours


def test_upload_passes_nothing_on(foreign_base: Path, run_upload, verified: list, tmp_path: Path) -> None:
    run_upload("--base", foreign_base, "--output", tmp_path / "out")
    assert_nothing_foreign(tmp_path / "out")


def test_how_a_fine_tuned_model_is_used_is_passed_on(
    base_dir: Path, run_upload, verified: list, tmp_path: Path
) -> None:
    folder = shutil.copytree(base_dir, tmp_path / "tuned")
    for content, problem in (
        (asdict(SegmentationSettings(tile=512, min_iou=0.7).but(channels=[3, 2, 1], intensity="min-max")), ""),
        ({"tile": {"a": {"b": 1}}}, "has tile="),
    ):
        (folder / "segmentation.json").write_text(json.dumps(content))
        message = run_upload("--base", folder, "--output", tmp_path / "out", fails=bool(problem))
        assert problem in message
        if not problem:
            written = json.loads((tmp_path / "out" / "segmentation.json").read_text())
            assert written == json.loads((folder / "segmentation.json").read_text())
            shutil.rmtree(tmp_path / "out")


@pytest.fixture
def run_convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()

    return run


def test_convert_passes_nothing_on(foreign_base: Path, run_convert, tmp_path: Path) -> None:
    for command in ("to-split", "to-sam"):
        run_convert(command, foreign_base, tmp_path / command)
        assert_nothing_foreign(tmp_path / command)


def test_fine_tuning_and_segmenting_run_nothing(foreign_base: Path, tmp_path: Path) -> None:
    model, processor = load_base(str(foreign_base))
    processor.save_pretrained(tmp_path / "processor")
    assert "vil" not in (tmp_path / "processor" / "processor_config.json").read_text()
    assert model.config.vision_config.image_size == 64


def test_a_base_without_a_processor_is_named(base_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_dir, tmp_path / "bare")
    (folder / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="bare has no processor"):
        load_base(str(folder))
    for command in (finetune.main, segment.main):
        arguments = ["--base", str(folder), "--output", str(tmp_path / "out")]
        if command is segment.main:
            arguments = [str(ROOT / "docs" / "images" / "coins.png"), "--point", "9", "9", *arguments]
        with pytest.raises(SystemExit, match="bare has no processor"):
            command(arguments)
