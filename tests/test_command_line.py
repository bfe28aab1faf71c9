"""The settings of the recipe: command line, files, and what is refused before anything is written."""

import json
import re
from pathlib import Path

import pytest
import yaml

import evaluate
import finetune
from checkpoint_tools.checkout import SAM_TINY
from finetuning.command_line import write_file
from finetuning.training_arguments import TrainingSettings


def refusal(arguments: list[str], capsys) -> str:
    """The message with which the command refuses its arguments."""
    with pytest.raises(SystemExit) as raised:
        finetune.main(arguments)
    assert raised.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--images", "a"], "--images together with --masks or --coco"),
        (["--images", "a", "--masks", "b", "--coco", "c"], "expected one of them"),
        (["--validation", "1"], "--validation 1.0: expected a share from more than 0 to less than 1"),
        (["--validation", "0"], "--validation 0.0: expected a share"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--max-steps", "0"], "--steps 0: expected 1 or more"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--learning-rate", "-1"], "--learning-rate -1.0: expected more than 0"),
        (["--learning-rate", "nan"], "--learning-rate nan: expected more than 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: expected 0 or more"),
        (["--dropout", "1.5"], "--dropout 1.5: expected a share from 0 to less than 1"),
        (["--seed", str(2**32)], "--seed 4294967296: expected 4,294,967,295 or less"),
        (["--warmup-steps", "inf"], "--warmup-steps inf: expected 1,000,000,000 or less"),
        (["--schedule", "cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (["--schedule", "warmup_stable_decay"], "--lr-scheduler-kwargs None: get_wsd_schedule() missing"),
        (["--load-best-model-at-end", "false"], "the recipe works with True only"),
        (["--ignore-data-skip"], "the recipe works with False only"),
        (["--resume", "--save-only-model"], "the checkpoints hold no optimizer"),
        (["--alpha", "0"], "--alpha 0.0: expected more than 0"),
        (["--minutes", "-1"], "--minutes -1.0: expected 0 or more"),
        (["--method", "full", "--load-in-4bit"], "trains no adapters, so expected no --load-in-4bit."),
        (["--method", "decoder", "--train-decoder", "lora"], "adds no adapters"),
        (["--method", "all"], "invalid choice: 'all'"),
        (["--select", "best"], "--select best: expected one of iou, iou_point, iou_box, iou_clicks, automatic"),
        (["--select", "iou_clicks", "--prompts", "box"], "--select iou_clicks: expected one of iou, iou_box"),
        (["--overlap", "0.95"], "--overlap 0.95: expected a share from 0 to 0.9"),
        (["--cache-embeddings", "x"], "--cache-embeddings and --method lora: expected --method decoder"),
        (["--cache-embeddings", "x", "--method", "decoder", "--augment", "crop"], "expected --augment none"),
        (["--augment", "none", "blur"], "--augment none blur: expected none alone, or others"),
        (["--method", "decoder", "--train-decoder", "none"], "nothing would be trained"),
        (["--export", "whole"], "invalid choice: 'whole'"),
        (["--schedule", "zigzag"], "invalid choice: 'zigzag'"),
        (["--label-names", "masks"], "--label-names ['masks']: the recipe works with ['labels'] only"),
        (["--num-train-epochs", "2"], "--num-train-epochs 2.0: the recipe works with 3.0 only"),
        (["--data-seed", "3"], "--data-seed 3: the recipe works with None only"),
        (["--hub-strategy", "end"], "--hub-strategy end: the recipe works with every_save only"),
        (["--method", "full", "--rank", "4", "--target", "k"], "trains no adapters, so expected no --target, --rank."),
        (["--bf16", "--fp16"], "not both"),
        (["--fp16", "--use-cpu"], "--fp16: CPUs cannot train in it; use --bf16."),
        (["--report-to", "comet_ml"], "--report-to comet_ml: not installed, or unknown to transformers"),
        (["--deepspeed", "none.json"], "--deepspeed none.json: not installed: pip install deepspeed"),
        (["--push-to-hub"], "expected USER/NAME"),
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_out_of_range_are_refused(arguments, problem, capsys, tmp_path):
    output = tmp_path / "run"
    assert problem in refusal([*arguments, "--output", str(output)], capsys)
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("steps: 3\nstepz: 4\nlearning-rat: 1", "run.yaml: unknown settings: stepz, learning-rat."),
        ("steps: 3\nsteps: 4", "run.yaml: expected each setting once, got steps and steps."),
        ("batch-size: 3\nper_device_train_batch_size: 4", "got batch-size and per_device_train_batch_size."),
        ("steps: [3, 4]", "run.yaml: steps: expected one value, got 2."),
        ("- steps", "run.yaml: expected settings by name, as in `steps: 500`, got list."),
        ("steps: [", "run.yaml: cannot be read: while parsing"),
        ("steps: many", "invalid int value: 'many'"),
        ("method: all", "invalid choice: 'all'"),
        ("dropout: 1.5", "--dropout 1.5: expected a share"),
    ],
)
def test_bad_files_are_refused(content, problem, capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert problem in refusal([str(file)], capsys)
    assert "cannot be read" in refusal([str(tmp_path / "none.json")], capsys)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_file_and_command_line(suffix, tmp_path):
    """Names of both spellings, short or TrainingArguments' own; the command line wins."""
    options = {"steps": 7, "learning-rate": 1e-4, "eval_every": 3, "target": ["k"], "bf16": True, "multimask": True}
    options |= {"fsdp_config": {"min_num_params": 5}, "revision": None, "report_to": ["none"], "export": []}
    file = tmp_path / f"run.{suffix}"
    file.write_text(json.dumps(options) if suffix == "json" else yaml.safe_dump(options))
    settings = finetune.parse_args([str(file), "--max-steps", "8", "--target", "v", "--multimask", "false"])
    assert (settings.training.max_steps, settings.training.eval_steps, settings.training.save_steps) == (8, 3, 3)
    assert settings.training.learning_rate == 1e-4 and settings.training.bf16
    assert settings.training.fsdp_config["min_num_params"] == 5
    assert settings.model.target == ["v"] and settings.model.revision is None
    assert not settings.prompts.multimask and settings.output.export == []


@pytest.mark.parametrize(
    ("arguments", "rate", "side"),
    [
        ([], 1e-3, 192),
        (["--method", "full"], 1e-4, 192),
        (["--method", "decoder", "--base", "facebook/sam-vit-base"], 1e-3, None),
        (["--method", "full", "--learning-rate", "0.5", "--image-size", "128"], 0.5, 128),
    ],
    ids=str,
)
def test_defaults_depend_on_what_is_trained(arguments, rate, side):
    settings = finetune.parse_args(arguments)
    assert settings.training.learning_rate == settings.options["learning_rate"] == rate
    assert settings.model.image_size == settings.options.get("image_size") == side


def test_presets_are_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: 8gb\naccumulate: 2")
    training = finetune.parse_args([str(tmp_path / "run.yaml"), "--bf16", "false"]).training
    sizes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    assert sizes == (1, 2) and training.gradient_checkpointing and not training.bf16
    for name in ("8gb", "16gb", "24gb", "cpu"):
        assert finetune.parse_args(["--preset", name]).training.step_size == 4


def test_written_file_repeats_the_run(tmp_path, monkeypatch):
    """From another folder, too."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["--images", "photos", "--masks", "masks", "--target", "q", "lin1", "--fp16", "false", "--steps", "9"]
    arguments += ["--schedule", "linear", "--torch-compile-mode", "default", "--minutes", "0.5", "--tile", "64"]
    settings = finetune.parse_args([*arguments, "--warmup-steps", "3", "--output", "run"])
    write_file(settings.options, tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = finetune.parse_args([str(tmp_path / "run.yaml")])
    assert again.options == settings.options
    assert again.data.images == tmp_path / "photos" and again.folder == tmp_path / "run"
    assert again.model == settings.model and again.prompts == settings.prompts
    assert again.training.warmup_steps == 3 and again.training.torch_compile_mode == "default"
    assert Path(again.model.base) == SAM_TINY


def test_help_names_what_the_recipe_heeds_and_nothing_else(capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--help"])
    options = re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert {"steps", "rank", "report-to", "fp16"} <= {*options}
    assert not {name.replace("_", "-") for name in TrainingSettings.FIXED} & {*options}
    assert options.index("output") < options.index("steps") < options.index("report-to")


def test_help_of_the_evaluation_keeps_the_order_and_names_defaults_once(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(build/evaluate)") == 1
    assert text.index("--held-out") < text.index("--seed")
