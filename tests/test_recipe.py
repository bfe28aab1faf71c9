"""The fine-tuning recipe as it is run: learning, resuming, several processes, and output files."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import CODE_FILES, assert_same_outputs
from labelled_images import blocks, save_pair
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import default_collate
from transformers import AutoModel, SamModel

import finetune
from checkpoint_tools.checkout import ROOT, SAM_TINY
from checkpoint_tools.output_folders import MARKER, locked
from finetuning import recipe
from finetuning.click_rounds import Prompting
from finetuning.loss_and_metrics import MaskMetrics, object_scores
from finetuning.prompts import ItemEncoder, Prompts, ValidationSet
from finetuning.resuming import last_checkpoint
from finetuning.trainable_weights import trained
from image_data.layouts import read_data
from segmentation.adapted_model import load_base
from segmentation.settings import SegmentationSettings


pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # the name that 5.0 knows
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),  # checkpoints within a second
]

MASK_SIDE = 64  # of sam-tiny, as random weights would turn rounding errors into other masks
ADAPTER_FILES = {  # of a stock base
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "segmentation.json", "processor_config.json"),
    *CODE_FILES,
    "LICENSE-code",
}
SMALL_RUN = [
    *("--image-size", "128", "--steps", "4", "--eval-every", "2", "--batch-size", "2"),
    *("--objects", "3", "--learning-rate", "0.01", "--grid", "8"),
]


def run(output: Path, *arguments: str) -> dict:
    """Runs the recipe in this process and returns the metrics that it writes."""
    finetune.main([*arguments, "--output", str(output)])
    return json.loads((output / "metrics.json").read_text())


def losses(metrics: dict) -> list[float]:
    return [entry["loss"] for entry in metrics["history"] if "loss" in entry]


@pytest.fixture(scope="module")
def whole_run(photos, tmp_path_factory) -> tuple[Path, dict, list[str]]:
    """A run with all that can be exported; its folder, metrics and arguments."""
    output = tmp_path_factory.mktemp("run") / "whole"
    arguments = [*photos, *SMALL_RUN]
    return output, run(output, *arguments, "--export", "merged", "stock"), arguments


def validate(model: torch.nn.Module, items: ValidationSet) -> dict[str, float]:
    prompting = Prompting()
    metrics = MaskMetrics(prompting.validated)
    with torch.no_grad():
        for index in range(len(items)):
            batch = default_collate([items[index]])
            predictions = prompting.predict_to_validate(model, batch, batch["labels"])
            scores = object_scores(tuple(zip(*predictions.values(), strict=True)), batch["labels"])
            result = metrics(SimpleNamespace(predictions=scores), compute_result=index == len(items) - 1)
    return result


def test_leaves_everything_behind(whole_run):
    output, metrics, _ = whole_run
    assert {path.name for path in output.iterdir()} == {
        *("adapter", "merged", "sam", "checkpoint-2", "checkpoint-4"),
        *("run.yaml", "settings.json", "metrics.json", "data.json", "data.png", "curves.png", "masks.png", MARKER),
    }
    assert {path.name for path in (output / "adapter").iterdir()} == ADAPTER_FILES
    assert all((output / name).stat().st_size > 5000 for name in ("curves.png", "masks.png"))
    assert metrics["steps"] == 4
    assert sum(metrics["objects"].values()) == 6 * 6 - 3 and metrics["objects"]["validation"] % 3


def test_adapter_says_where_it_comes_from(whole_run):
    output, metrics, _ = whole_run
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(SAM_TINY)
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert sorted(config["target_modules"]) == ["q", "v"]
    card = (output / "adapter" / "README.md").read_text()
    assert f"| iou | {metrics['before']['iou']:.3f} | {metrics['after']['iou']:.3f} |" in card
    assert str(ROOT) not in card


def test_adapter_reloads_to_the_same_metrics(whole_run):
    output, metrics, arguments = whole_run
    model, processor = load_base(str(SAM_TINY))
    parts, _ = read_data(finetune.parse_args(arguments).data, MASK_SIDE, seed=0)
    items = ValidationSet(parts.validation, ItemEncoder(processor, MASK_SIDE, Prompts()))
    before, after = ({**metrics[when]} for when in ("before", "after"))
    del before["loss"], after["loss"]
    assert before == pytest.approx(validate(model, items), abs=1e-6)
    assert abs(metrics["before"]["iou"] - metrics["after"]["iou"]) > 1e-3
    for reloaded in (
        PeftModel.from_pretrained(model, output / "adapter"),
        AutoModel.from_pretrained(output / "merged", trust_remote_code=True),
        SamModel.from_pretrained(output / "sam"),
    ):
        assert after == pytest.approx(validate(reloaded.eval(), items), abs=1e-6)


def test_exported_stock_sam_gives_the_same_masks(whole_run):
    output = whole_run[0]
    inputs = {"pixel_values": torch.randn(2, 3, 128, 128), "input_points": 128 * torch.rand(2, 2, 1, 2)}
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load_base(str(SAM_TINY))[0], output / "adapter").eval()(**inputs)
        assert_same_outputs(SamModel.from_pretrained(output / "sam")(**inputs), adapted)
        assert_same_outputs(AutoModel.from_pretrained(output / "merged", trust_remote_code=True)(**inputs), adapted)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(whole_run, tmp_path, capsys):
    output, expected, arguments = whole_run
    shutil.copytree(output, tmp_path / "again")
    (tmp_path / "again" / "checkpoint-4" / "trainer_state.json").unlink()  # as if interrupted
    metrics = run(tmp_path / "again", *arguments, "--resume")
    goes_on = f"Not whole: checkpoint-4. The run goes on from {tmp_path / 'again' / 'checkpoint-2'}."
    assert goes_on in capsys.readouterr().out
    assert metrics["after"] == expected["after"]
    assert losses(metrics) == losses(expected)
    actual, weights = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "again", output)
    )
    assert all(torch.equal(actual[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_resuming_a_run_that_stopped_by_itself_trains_no_further(photos, tmp_path):
    """As if it had been killed while its results were written."""
    arguments = [*photos, *SMALL_RUN, "--learning-rate", "0.3", "--eval-every", "1", "--patience", "2", "--grid", "4"]
    expected = run(tmp_path / "run", *arguments, "--steps", "12")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    metrics = run(tmp_path / "run", *arguments, "--steps", "12", "--resume")
    assert metrics["steps"] == expected["steps"] < 12, "it stopped"
    assert losses(metrics) == losses(expected)
    assert (metrics["best_step"], metrics["after"]) == (expected["best_step"], expected["after"])
    assert (tmp_path / "run" / "adapter" / "README.md").read_text() == card


def test_a_run_killed_before_its_first_checkpoint_is_in_nobodys_way(photos, tmp_path, monkeypatch):
    """At any moment, as there is nothing to lose."""

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train", killed)
    output = tmp_path / "run"
    options: list[list[str]] = [[], [], ["--resume"], ["--resume"], []]
    missing = ["", "", "data.png data.json", "run.yaml", "run.yaml settings.json"]
    for option, names in zip(options, missing, strict=True):
        for name in names.split():
            (output / name).unlink()
        with pytest.raises(SystemExit, match=r"Interrupted.* --resume"):
            run(output, *photos, *SMALL_RUN, *option)
        written = {"run.yaml", "settings.json", "data.json", "data.png", MARKER}
        assert {path.name for path in output.iterdir()} == written
    (output / "notes.txt").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        run(output, *photos, *SMALL_RUN)


def damage(file: str, checkpoint: str = "checkpoint-4") -> Callable[[Path], object]:
    def cut(output: Path) -> None:
        path = next(output.glob(f"{checkpoint}/{file}"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.parametrize(
    "spoil",
    [
        damage("trainer_state.json"),
        damage("adapter_model.safetensors"),
        damage("optimizer.pt"),
        lambda output: (output / "checkpoint-4" / "trainer_state.json").write_text("[]"),
        lambda output: shutil.copytree(output / "checkpoint-4", output / "checkpoint-best"),
    ],
    ids=["state cut", "weights cut", "optimizer cut", "state is a list", "a copy named best"],
)
def test_resume_falls_back_to_the_last_whole_checkpoint(spoil, whole_run, tmp_path):
    again = shutil.copytree(whole_run[0], tmp_path / "again")
    spoil(again)
    checkpoint, damaged = last_checkpoint(again)
    if (again / "checkpoint-best").exists():
        assert (checkpoint, damaged) == (again / "checkpoint-4", [])
    else:
        assert (checkpoint, damaged) == (again / "checkpoint-2", ["checkpoint-4"])
    for folder in again.glob("checkpoint-*"):
        (folder / "trainer_state.json").write_text("{")
    checkpoint, damaged = last_checkpoint(again)
    assert (checkpoint, damaged) == (None, ["checkpoint-4", "checkpoint-2"])


@pytest.mark.parametrize("content", ['{"base": ', "[]", ""])
def test_resume_refuses_damaged_settings(content, whole_run, tmp_path):
    output, _, arguments = whole_run
    again = shutil.copytree(output, tmp_path / "again")
    (again / "settings.json").write_text(content)
    with pytest.raises(SystemExit, match=r"settings\.json is damaged, .* start again with --force"):
        run(again, *arguments, "--resume")


def test_resume_refuses_a_lost_best_checkpoint(whole_run, tmp_path):
    output, _, arguments = whole_run
    shutil.copytree(output, tmp_path / "moved")
    for file in tmp_path.glob("moved/*/trainer_state.json"):
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "best_model_checkpoint": "elsewhere/checkpoint-2"})
        )
    with pytest.raises(SystemExit, match="the best checkpoint elsewhere/checkpoint-2 does not exist"):
        run(tmp_path / "moved", *arguments, "--resume")


def test_resume_refuses_other_settings(whole_run, tmp_path):
    output, _, arguments = whole_run
    with pytest.raises(SystemExit, match="rank 16 then and 8 now"):
        run(output, *arguments, "--resume", "--rank", "8")
    with pytest.raises(SystemExit, match="is not empty"):
        run(output, *arguments)
    images = Path(arguments[arguments.index("--images") + 1])
    save_pair(images.parent, "new", blocks())
    try:
        with pytest.raises(SystemExit, match=r"other settings: data [0-9a-f]{12} then"):
            run(output, *arguments, "--resume")
    finally:
        (images / "new.png").unlink()
        (images.parent / "masks" / "new.png").unlink()
    with pytest.raises(SystemExit, match="is a file: choose another name"):
        run(output / "metrics.json", *arguments)
    (output / "adapter" / "notes.txt").touch()
    with pytest.raises(SystemExit, match=r"also holds adapter/notes\.txt, which no command wrote there"):
        run(output, *arguments, "--force")
    (output / "adapter" / "notes.txt").unlink()
    (tmp_path / "precious.txt").touch()
    with pytest.raises(SystemExit, match="not marked as an earlier output"):
        run(tmp_path, *arguments, "--force")
    assert (tmp_path / "precious.txt").exists()


@pytest.mark.parametrize("option", ["--force", "--check"])
def test_one_run_at_a_time_writes_to_a_folder(option, photos, tmp_path):
    """Even with --force."""
    output = tmp_path / "run"
    output.mkdir()
    with locked(output), pytest.raises(SystemExit, match="Another run writes to"):
        run(output, *photos, *SMALL_RUN, option)
    assert not any(output.iterdir())


@pytest.mark.slow
def test_weights_worse_than_the_base_are_not_passed_off_as_better(photos, tmp_path, capsys):
    arguments = [*photos, *SMALL_RUN, "--learning-rate", "5", "--warmup-steps", "0", "--eval-every", "1"]
    metrics = run(tmp_path / "run", *arguments, "--steps", "2", "--select", "automatic", "--grid", "4")
    before, after = metrics["before"]["automatic"], metrics["after"]["automatic"]
    assert after < before and not metrics["better_than_base"]
    problem = f"no checkpoint is better than the base by automatic: {before:.3f} before, {after:.3f} after"
    output = capsys.readouterr().out
    assert f"Warning: {problem}" in output
    assert f"clicks {metrics['before']['iou_clicks']:.3f} to {metrics['after']['iou_clicks']:.3f}" in output
    assert problem in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_training_that_diverges(photos, tmp_path, capsys):
    """The first step has a learning rate of zero."""
    arguments = [*photos, *SMALL_RUN, "--learning-rate", "1e9", "--eval-every", "1", "--warmup-steps", "2"]
    metrics = run(tmp_path / "late", *arguments)
    note = "Training diverged: at step 2, the validation loss is not a number. The weights of step 1 are used."
    assert note in capsys.readouterr().out
    assert metrics["steps"] == 2 and metrics["best_step"] == 1 and metrics["after"] == metrics["before"]
    assert "NaN" not in (tmp_path / "late" / "metrics.json").read_text(), "which is no JSON"
    arguments += ["--output", str(tmp_path / "early"), "--warmup-steps", "0"]
    with pytest.raises(SystemExit, match=r"--learning-rate 1e\+09: training diverged: at step 1"):
        finetune.main(arguments)
    assert not (tmp_path / "early" / "adapter").exists()
    with pytest.raises(SystemExit, match=r"training diverged: at step 1.* Start again"):
        finetune.main([*arguments, "--resume"])


def test_adapter_brings_how_it_is_to_be_used(whole_run):
    output, _, _ = whole_run
    settings = SegmentationSettings.load(output / "adapter")
    assert (settings.image_size, settings.tile, settings.multimask, settings.grid) == (128, None, "single-point", 8)
    assert settings.min_iou < SegmentationSettings().min_iou, "swept, not the default of a large model"


@pytest.mark.slow
def test_best_checkpoint_is_restored(photos, tmp_path):
    """With steps so large that the first are the best."""
    arguments = [*photos, *SMALL_RUN, "--learning-rate", "0.3", "--eval-every", "1"]
    metrics = run(tmp_path / "wild", *arguments, "--patience", "2", "--steps", "30")
    validations = {entry["step"]: entry["eval_iou"] for entry in metrics["history"][1:] if "eval_iou" in entry}
    best = max(validations, key=lambda step: validations[step])
    assert metrics["best_step"] == best
    assert metrics["steps"] == best + 2 < 30, "stopped early"
    assert metrics["after"]["iou"] == pytest.approx(validations[best], abs=1e-9)
    checkpoint = tmp_path / "wild" / f"checkpoint-{best}" / "adapter_model.safetensors"
    actual, weights = (load_file(path) for path in (tmp_path / "wild/adapter/adapter_model.safetensors", checkpoint))
    assert all(torch.equal(actual[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_two_processes_and_accumulation_equal_one_with_twice_the_batch(photos, tmp_path):
    """Launched from another folder, on a part of the images without divisors in common."""
    arguments = [*photos, *SMALL_RUN, "--dropout", "0", "--rounds", "2"]
    arguments += ["--eval-every", "1", "--steps", "3"]
    one = run(tmp_path / "one", *arguments, "--batch-size", "2")
    accumulated = run(tmp_path / "accumulated", *arguments, "--batch-size", "1", "--accumulate", "2")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "finetune.py"), *arguments, "--batch-size", "1", "--output", "two"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("trainable params") == 1, "only one process reports"
    assert not re.search("FutureWarning|kernels", process.stderr), "nothing that users cannot change"
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["before"]["objects"] == one["before"]["objects"] == one["objects"]["validation"]
    for metrics in (accumulated, two):
        assert losses(metrics) == pytest.approx(losses(one), abs=1e-5)
        assert metrics["before"]["iou"] == pytest.approx(one["before"]["iou"], abs=1e-6)
        assert metrics["after"]["iou"] == pytest.approx(one["after"]["iou"], abs=1e-3)


def test_a_launch_that_starts_one_process_of_two_is_refused(monkeypatch, capsys):
    """As `accelerate launch --num_processes 2 --cpu` does."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit):
        finetune.main([])
    assert "accelerate launch --multi_gpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fsdp", "two_machines"])
def test_worked_configurations_are_accelerates_own(name, load):
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes >= 2
    if name == "fsdp":
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in load()._no_split_modules


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "full", "--train-decoder", "full", "--prompt", "box"],
        ["--train-decoder", "full", "--gradient-checkpointing", "--multimask", "--loss", "focal", "--export", "stock"],
        ["--load-in-4bit", "--bf16", "--dora", "--last-layers", "2", "--tile", "32", "--minutes", "0"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_ways_to_train(arguments, photos, tmp_path, capsys, caplog):
    metrics = run(tmp_path / "run", *photos, *SMALL_RUN, *arguments)
    assert "missing keys" not in caplog.text, "transformers warns of a tied weight"
    assert metrics["steps"] == (1 if "--minutes" in arguments else 4)
    assert all(math.isfinite(loss) for loss in losses(metrics))
    folder = tmp_path / "run" / ("model" if "--method" in arguments else "adapter")
    base, _ = load_base(str(SAM_TINY))
    before = copy.deepcopy(base.state_dict())
    model = trained(base, folder)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if "stock" in arguments:
        assert "the same masks" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own way of sending files
def test_uploads_the_adapter_and_nothing_else(hub, photos, tmp_path):
    hub.add("user/sam", SAM_TINY)
    options = ["--base", "user/sam", "--steps", "1", "--push-to-hub", "user/adapter"]
    run(tmp_path / "run", *photos, *SMALL_RUN, *options)
    adapter = tmp_path / "run" / "adapter"
    uploaded = hub.repos["user/adapter"].files()
    assert uploaded.pop(".gitattributes")
    assert uploaded == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert uploaded.keys() == ADAPTER_FILES
    config = json.loads(uploaded["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("user/sam", hub.repos["user/sam"].refs["main"])


def test_upload_without_login_is_refused_before_training(photos, tmp_path):
    with pytest.raises(SystemExit, match="hf auth login"):
        run(tmp_path / "run", *photos, "--push-to-hub", "some/one")
    assert not (tmp_path / "run").exists()


def test_bad_files_are_named_before_anything_is_written(tmp_path):
    image, _ = save_pair(tmp_path, "photo", blocks())
    image.write_text("no image")
    folders = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    with pytest.raises(SystemExit, match=r"photo\.png: cannot be read"):
        run(tmp_path / "run", *folders)
    assert not (tmp_path / "run").exists()


def test_bad_base_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="nothing: there is no such folder, and it is no Hub id"):
        run(tmp_path / "run", "--base", str(tmp_path / "nothing"))


@pytest.mark.slow
def test_coins_are_learnt(tmp_path):
    """The bare command, cut short. The adapter brings the scale of the half that it has learnt."""
    metrics = run(tmp_path / "coins", "--steps", "12", "--eval-every", "6", "--grid", "16")
    assert metrics["after"]["iou"] > metrics["before"]["iou"] + 0.05
    assert metrics["better_than_base"]
    assert SegmentationSettings.load(tmp_path / "coins" / "adapter").tile == 303
