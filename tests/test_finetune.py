"""The fine-tuning recipe as it is run: that it learns, can be interrupted and divided, and what it leaves behind."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import finetune
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from adapted_model import UnusableModel, load_base, make_trainable, trained
from conftest import assert_same_outputs
from huggingface_hub import HfApi
from losses import MaskLoss, MaskMetrics, dice, focal, object_scores
from peft import PeftModel
from prompts import Collator, Encoder, Prompts, ValidationSet
from safetensors.torch import load_file
from test_finetune_data import blocks, save_pair
from training import build_training_args
from transformers import AutoModel, SamModel

from staging import ROOT


pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # the name that 5.0 knows
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),  # checkpoints within a second
]

BASE = ROOT / "checkpoints" / "sam-tiny"  # random weights would turn rounding errors into other masks
MASK_SIDE = 64
SMALL_RUN = ["--steps", "4", "--eval-every", "2", "--batch-size", "2", "--objects", "3", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six images with masks; the arguments that name them."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        labels = np.roll(blocks(), number, axis=1)
        if number % 2:  # processes validate on different numbers of objects
            labels[labels == 300] = 0
        save_pair(folder, f"photo{number}", labels)
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--validation", "0.5"]


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


def mean_iou(model: torch.nn.Module, items: ValidationSet) -> float:
    metrics = MaskMetrics()
    with torch.no_grad():
        for index in range(len(items)):
            batch = Collator(False)([items[index]])
            outputs = model(**{name: batch[name] for name in batch if name != "labels"})
            scores = object_scores((outputs.iou_scores, outputs.pred_masks), batch["labels"])
            result = metrics(SimpleNamespace(predictions=scores), compute_result=index == len(items) - 1)
    return result["iou"]


def test_leaves_everything_behind(whole_run):
    output, metrics, _ = whole_run
    assert {path.name for path in output.iterdir()} == {
        *("adapter", "merged", "sam", "checkpoints"),
        *("settings.json", "metrics.json", "curves.png", "masks.png"),
    }
    assert {path.name for path in (output / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
    }
    assert all((output / name).stat().st_size > 5000 for name in ("curves.png", "masks.png"))
    assert metrics["steps"] == 4
    assert sum(metrics["objects"].values()) == 6 * 6 - 3 and metrics["objects"]["validation"] % 3


def test_adapter_says_where_it_comes_from(whole_run):
    output, metrics, _ = whole_run
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE)
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert sorted(config["target_modules"]) == ["q", "v"]
    card = (output / "adapter" / "README.md").read_text()
    assert f"| iou | {metrics['before']['iou']:.3f} | {metrics['after']['iou']:.3f} |" in card
    assert str(ROOT) not in card


def test_adapter_reloads_to_the_same_metrics(whole_run):
    output, metrics, arguments = whole_run
    model, processor = load_base(str(BASE))
    found, _ = finetune.read_data(finetune.parse_args(arguments), MASK_SIDE)
    items = ValidationSet(found.validation, Encoder(processor, MASK_SIDE, Prompts()))
    assert metrics["before"]["iou"] == pytest.approx(mean_iou(model, items), abs=1e-6)
    assert abs(metrics["before"]["iou"] - metrics["after"]["iou"]) > 1e-3
    for reloaded in (
        PeftModel.from_pretrained(model, output / "adapter"),
        AutoModel.from_pretrained(output / "merged", trust_remote_code=True),
        SamModel.from_pretrained(output / "sam"),
    ):
        assert mean_iou(reloaded.eval(), items) == pytest.approx(metrics["after"]["iou"], abs=1e-6)


def test_exported_stock_sam_gives_the_same_masks(whole_run):
    output = whole_run[0]
    inputs = {"pixel_values": torch.randn(2, 3, 128, 128), "input_points": 128 * torch.rand(2, 2, 1, 2)}
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load_base(str(BASE))[0], output / "adapter").eval()(**inputs)
        assert_same_outputs(SamModel.from_pretrained(output / "sam")(**inputs), adapted)
        assert_same_outputs(AutoModel.from_pretrained(output / "merged", trust_remote_code=True)(**inputs), adapted)


def test_resumed_equals_uninterrupted(whole_run, tmp_path):
    output, expected, arguments = whole_run
    shutil.copytree(output, tmp_path / "again")
    (tmp_path / "again" / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()  # as if interrupted
    metrics = run(tmp_path / "again", *arguments, "--resume")
    assert metrics["after"] == expected["after"]
    assert losses(metrics) == losses(expected)
    actual, weights = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "again", output)
    )
    assert all(torch.equal(actual[name], weights[name]) for name in weights)


def test_resume_refuses_a_lost_best_checkpoint(whole_run, tmp_path):
    output, _, arguments = whole_run
    shutil.copytree(output, tmp_path / "moved")
    for file in tmp_path.glob("moved/checkpoints/*/trainer_state.json"):
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "best_model_checkpoint": "elsewhere/checkpoint-2"})
        )
    with pytest.raises(SystemExit, match="the best checkpoint so far was elsewhere/checkpoint-2, which is not there"):
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
    (tmp_path / "precious.txt").touch()
    with pytest.raises(SystemExit, match="not the output of an earlier run"):
        run(tmp_path, *arguments, "--force")
    assert (tmp_path / "precious.txt").exists()


def test_best_checkpoint_is_restored(photos, tmp_path):
    """With steps so large that the first are the best."""
    arguments = [*photos, *SMALL_RUN, "--learning-rate", "0.3", "--eval-every", "1"]
    metrics = run(tmp_path / "wild", *arguments, "--patience", "2", "--steps", "30")
    validations = {entry["step"]: entry["eval_iou"] for entry in metrics["history"][1:] if "eval_iou" in entry}
    best = max(validations, key=lambda step: validations[step])
    assert metrics["best_step"] == best
    assert metrics["steps"] == best + 2 < 30, "stopped early"
    assert metrics["after"]["iou"] == pytest.approx(validations[best], abs=1e-9)
    checkpoint = tmp_path / "wild" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"
    actual, weights = (load_file(path) for path in (tmp_path / "wild/adapter/adapter_model.safetensors", checkpoint))
    assert all(torch.equal(actual[name], weights[name]) for name in weights)


def test_two_processes_and_accumulation_equal_one_with_twice_the_batch(photos, tmp_path):
    """Launched from another folder, on a part of the images without divisors in common."""
    arguments = [*photos, *SMALL_RUN, "--dropout", "0", "--prompt", "mixed"]
    arguments += ["--eval-every", "1", "--steps", "3"]
    one = run(tmp_path / "one", *arguments, "--batch-size", "2")
    accumulated = run(tmp_path / "accumulated", *arguments, "--batch-size", "1", "--accumulate", "2")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "examples" / "finetune.py"), *arguments, "--batch-size", "1", "--output", "two"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("trainable params") == 1, "only one process reports"
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["before"]["objects"] == one["before"]["objects"] == 2 * one["objects"]["validation"]
    for metrics in (accumulated, two):
        assert losses(metrics) == pytest.approx(losses(one), abs=1e-5)
        assert metrics["before"]["iou"] == pytest.approx(one["before"]["iou"], abs=1e-6)
        assert metrics["after"]["iou"] == pytest.approx(one["after"]["iou"], abs=1e-3)


def test_a_launch_that_starts_one_process_of_two_is_refused(photos, tmp_path, monkeypatch):
    """As `accelerate launch --num_processes 2 --cpu` does."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SystemExit, match="accelerate launch --multi_gpu"):
        run(tmp_path / "run", *photos, *SMALL_RUN)


@pytest.mark.parametrize("name", ["fsdp", "two_machines"])
def test_worked_configurations_are_accelerates_own(name, load):
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes >= 2
    if name == "fsdp":
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in load()._no_split_modules


VISION_LORA = r"vision_encoder\.layers\.\d\.attn\.[qv]\.lora_[AB]\.default\.weight"
DECODER_LORA = r"mask_decoder\.transformer\.[\w.]+\.[qv]_proj\.lora_[AB]\.default\.weight"


@pytest.mark.parametrize(
    ("arguments", "adapters", "whole"),
    [
        ([], VISION_LORA, None),
        (["--target", "q", "v", "--rslora"], VISION_LORA, None),
        (
            ["--target", "k", "lin1"],
            r"vision_encoder\.layers\.\d\.(attn\.k|mlp\.lin1)\.lora_[AB]\.default\.weight",
            None,
        ),
        (["--dora"], VISION_LORA.replace(r"lora_[AB]\.default", r"lora_\w+\.default"), None),
        (["--train-decoder", "lora"], f"{VISION_LORA}|{DECODER_LORA}", None),
        (["--train-decoder", "full"], VISION_LORA, "mask_decoder"),
        (["--method", "full"], None, "vision_encoder"),
        (["--method", "full", "--train-decoder", "full"], None, "vision_encoder|mask_decoder"),
        (["--method", "decoder"], None, "mask_decoder"),
    ],
    ids=str,
)
def test_trains_what_is_asked_for(arguments, adapters, whole, load):
    model = make_trainable(load(), finetune.parse_args(arguments))
    names = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    found = {name for name in names if "lora_" in name}
    assert bool(found) == bool(adapters)
    assert all(re.fullmatch(adapters, name) for name in found)
    own = {name for name, _ in load().named_parameters()}
    assert names - found == {name for name in own if whole and re.match(whole, name)}
    for alternative in (adapters or "").split("|mask"):  # each part of it is there
        assert not alternative or any(re.search(alternative.removeprefix("mask"), name) for name in found)


@pytest.mark.parametrize("arguments", [[], ["--train-decoder", "lora"], ["--gradient-checkpointing"]], ids=str)
def test_last_layers_cost_no_backward_below(arguments, load, inputs):
    args = finetune.parse_args(["--last-layers", "1", *arguments])
    model = make_trainable(load(), args).train()
    if args.gradient_checkpointing:
        settings = build_training_args(args).gradient_checkpointing_kwargs
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    needs_grad = []
    for layer in model.base_model.model.vision_encoder.layers:
        layer.register_forward_hook(lambda *hooked: needs_grad.append(hooked[2].requires_grad))
    model(**inputs).pred_masks.mean().backward()
    assert needs_grad[:3] == [False, False, True]
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    adapted = [name for name, p in model.named_parameters() if p.requires_grad and "vision_encoder" in name]
    assert len(adapted) == 4 and all(".layers.2.attn." in name for name in adapted)


def test_impossible_adapters_are_refused(load):
    for arguments, problem in ((["--last-layers", "4"], "has 3 layers"), (["--target", "qkv"], "--target qkv")):
        with pytest.raises(UnusableModel, match=problem):
            make_trainable(load(), finetune.parse_args(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "full", "--train-decoder", "full", "--prompt", "box"],
        ["--train-decoder", "full", "--gradient-checkpointing", "--multimask", "--loss", "focal", "--export", "stock"],
        ["--load-in-4bit", "--bf16", "--dora", "--last-layers", "2", "--tile", "32", "--minutes", "0"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_ways_to_train(arguments, photos, tmp_path, capsys):
    metrics = run(tmp_path / "run", *photos, *SMALL_RUN, *arguments)
    assert metrics["steps"] == (1 if "--minutes" in arguments else 4)
    assert all(math.isfinite(loss) for loss in losses(metrics))
    folder = tmp_path / "run" / ("model" if "--method" in arguments else "adapter")
    base, _ = load_base(str(BASE))
    before = copy.deepcopy(base.state_dict())
    model = trained(base, folder)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if "stock" in arguments:
        assert "the same masks" in capsys.readouterr().out


def test_uploads_the_adapter_and_nothing_else(photos, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "someone"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, exist_ok: uploads.append(repo_id))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, repo_id, folder_path: uploads.append(sorted(Path(folder_path).iterdir()))
    )
    run(tmp_path / "run", *photos, *SMALL_RUN, "--steps", "1", "--push-to-hub", "some/one")
    assert uploads[0] == "some/one"
    assert [path.name for path in uploads[1]] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


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
    with pytest.raises(SystemExit, match="nothing: not a SAM v1 checkpoint"):
        run(tmp_path / "run", "--base", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--images", "a"], "--images together with --masks or --coco"),
        (["--images", "a", "--masks", "b", "--coco", "c"], "expected one of them"),
        (["--validation", "1"], "between 0 and 1"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--method", "full", "--load-in-4bit"], "nor 4 bits"),
        (["--method", "decoder", "--train-decoder", "lora"], "adds no adapters"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit) as raised:
        finetune.main(arguments)
    assert raised.value.code == 2
    assert problem in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as raised:
        finetune.main(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert "accelerate launch" in text and "--last-layers N" in text


def random_outputs(objects: int = 4) -> tuple[SimpleNamespace, torch.Tensor]:
    outputs = SimpleNamespace(pred_masks=torch.randn(2, objects, 3, 8, 8), iou_scores=torch.rand(2, objects, 3))
    labels = (torch.rand(2, objects, 8, 8) > 0.6).to(torch.int8)
    labels[..., 6:] = -1
    return outputs, labels


def test_focal_loss():
    """At gamma 0 it is weighted cross-entropy; elsewhere as the paper's formula says, in its own symbols."""
    logits, targets = torch.randn(5, 7, dtype=torch.float64), (torch.rand(5, 7) > 0.5).double()
    p = torch.where(targets > 0, logits.sigmoid(), 1 - logits.sigmoid())
    alpha = torch.where(targets > 0, 0.25, 0.75)
    torch.testing.assert_close(focal(logits, targets), -alpha * (1 - p) ** 2 * p.log())
    torch.testing.assert_close(focal(logits, targets, gamma=0.0), -alpha * p.log())


def test_dice_loss():
    targets, counts = torch.tensor([1.0, 1, 0, 0, 1]), torch.tensor([1.0, 1, 1, 1, 0])
    assert dice(200 * targets - 100, targets, counts) == 0
    assert dice(100 - 200 * targets, targets, counts) == pytest.approx(1 - 1 / 5)
    assert dice(torch.tensor([100.0, -100, -100, -100, 100]), targets, counts) == pytest.approx(1 - 3 / 4)


@pytest.mark.parametrize("kind", ["focal", "cross-entropy"])
def test_loss_counts_the_best_mask_and_every_rating(kind):
    outputs, labels = random_outputs()
    loss = MaskLoss(kind)
    perfect = SimpleNamespace(
        pred_masks=outputs.pred_masks.clone(), iou_scores=torch.tensor([0.0, 1.0, 0.0]).expand(2, 4, 3)
    )
    perfect.pred_masks[:, :, 1] = 200.0 * (labels > 0) - 100
    perfect.pred_masks[:, :, 0] = perfect.pred_masks[:, :, 2] = -200.0 * (labels > 0) + 100
    assert loss(perfect, labels) == pytest.approx(0, abs=1e-6)
    perfect.iou_scores = torch.tensor([0.0, 1.0, 0.6]).expand(2, 4, 3)
    assert loss(perfect, labels) == pytest.approx(0.36 / 3, abs=1e-6)


def test_loss_ignores_what_is_beyond_the_image():
    outputs, labels = random_outputs()
    before = MaskLoss()(outputs, labels)
    outputs.pred_masks[..., 6:] = 50
    assert MaskLoss()(outputs, labels) == before


def test_loss_of_parts_adds_up_to_that_of_the_step():
    outputs, labels = random_outputs()
    whole = MaskLoss()(outputs, labels)
    parts = [
        MaskLoss()(
            SimpleNamespace(pred_masks=outputs.pred_masks[i, None], iou_scores=outputs.iou_scores[i, None]),
            labels[i, None],
            labels.ne(-100).sum(),
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_metrics():
    """Two objects, of which one is half found, and a place that only another process fills."""
    labels = torch.zeros(1, 3, 2, 4, dtype=torch.int8)
    labels[0, 0, :, :2], labels[0, 1], labels[0, 2] = 1, 1, -100
    masks = torch.full((1, 3, 2, 2, 4), -1.0)
    masks[0, 0, 1, :, :2], masks[0, 1, 1, 0] = 1, 1
    ratings = torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.0, 1.0]]])
    metrics = MaskMetrics()
    prediction = SimpleNamespace(predictions=object_scores((ratings, masks), labels))
    for _ in range(2):  # a second validation starts anew
        assert metrics(prediction, compute_result=False) == {}
        result = metrics(prediction, compute_result=True)
        assert result.pop("objects") == 2 * 2
        expected = {"iou": 0.75, "dice": 5 / 6, "share_over_iou_0.5": 0.5, "share_over_iou_0.75": 0.5}
        assert result == pytest.approx({**expected, "iou_head_error": (0.1 + 0.3) / 2})


def test_coins_are_learnt(tmp_path):
    """The bare command, cut short."""
    metrics = run(tmp_path / "coins", "--steps", "12", "--eval-every", "6", "--seed", "0")
    assert metrics["after"]["iou"] > metrics["before"]["iou"] + 0.1
