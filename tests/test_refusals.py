"""Options that no run could use, or that would change nothing, end a command with one line that names them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

import app
import evaluate
import finetune
import segment
import upload
from benchmarks import bench


COINS = str(ROOT / "docs" / "images" / "coins.png")
COMMANDS: dict[str, Callable[[], None]] = {
    "app": app.main,
    "bench": bench.main,
    "evaluate": evaluate.main,
    "finetune": finetune.main,
    "segment": segment.main,
    "upload": upload.main,
}
OF_THE_CPU = "expected --device cpu; cuda measures all paths"
HELD_OUT = "expected --held-out, too."


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        # would change nothing
        ("segment photo.png --everything --pipeline stock --tile 64", "--pipeline stock: expected --everything, with"),
        ("segment photo.png --everything --pipeline stock --overlap 0.5", "without --tile, --overlap and --max-"),
        ("segment photo.png --everything --pipeline stock --max-overlap 0", "without --tile, --overlap and --max-"),
        ("segment photo.png --box 1 1 5 5 --grid 3", "--grid: expected --everything, too."),
        ("segment photo.png --masks rough.png --min-stability 0", "--min-stability: expected --everything, too."),
        ("segment photo.png --coco boxes.json --max-overlap 0.5", "--max-overlap: expected --everything, too."),
        ("segment photo.png --everything --multimask never", "--multimask: expected no --everything, which takes"),
        ("segment photo.png --also 1 1", "--also: expected --point or --box before it."),
        ("evaluate --adapter a --model b", "--adapter and --model are both given: expected one of them."),
        ("evaluate --revision v1", "--revision: expected --base or --adapter, too."),
        ("evaluate --modes points boxes --clicks 3", "--clicks: expected --modes clicks, too."),
        ("evaluate --modes clicks --grid 8", "--grid: expected --modes automatic, too."),
        ("evaluate --modes points --max-overlap 0", "--max-overlap: expected --modes automatic, too."),
        ("evaluate --images i --masks m --group-pattern {group}_*", f"--group-pattern: {HELD_OUT}"),
        ("evaluate --images i --coco c --validation-coco d", f"--validation-coco: {HELD_OUT}"),
        ("evaluate --images i --masks m --validation-images v --validation-masks w", HELD_OUT),
        ("evaluate --dataset d --validation-split v", f"--validation-split: {HELD_OUT}"),
        ("finetune --background 3", "--background: expected --masks; those of the coins are known."),
        ("finetune --turn-masks", "--turn-masks: expected --masks; those of the coins are known."),
        ("finetune --image-column photo", "--image-column: expected --dataset, too."),
        ("finetune --group-pattern {group}_*", "--group-pattern: expected --images, too."),
        ("finetune --masks m --coco c --images i", "--masks and --coco are both given: expected one of them."),
        ("finetune --dataset d --validation 0.3 --validation-split v", "--validation and --validation-split are both"),
        ("finetune --images i --masks m --validation 0.3 --validation-images v --validation-masks w", "are both"),
        ("upload --base b", "expected --output to stage a model repo, --repo-id to push one, both, or --space."),
        ("upload --space a/b --repo-id a/c", "--space and --repo-id: expected one of them. Push the model first"),
        ("upload --repo-id a/b --adapter a/c", "--adapter: expected --space, too. To push a model with an adapter"),
        ("bench --device cuda --batch 2", f"--batch: {OF_THE_CPU}"),
        ("bench --device cuda --rounds 1", f"--rounds: {OF_THE_CPU}"),
        ("bench --device cuda --tasks encoder", f"--tasks: {OF_THE_CPU}"),
        ("bench --device cuda --parts table", f"--parts: {OF_THE_CPU}"),
        ("bench --device cuda --dtype float32", f"--dtype: {OF_THE_CPU}"),
        # that no run could use
        ("bench --side 0", "--side 0: expected 1 or more."),
        ("bench --rounds -1", "--rounds -1: expected 1 or more."),
        ("upload --output o --max-shard-size 0MB", "--max-shard-size 0MB: expected a number and its unit"),
        ("evaluate --clicks 1000000", "--clicks 1000000: expected 1,000 or less."),
        ("evaluate --held-out --seed -1", "--seed -1: expected 0 or more."),
        ("evaluate --tile 1", "--tile 1: expected a whole number from 16 to 1,000,000,000."),
        ("evaluate --image-size 7", "--image-size 7: image_size=7 is not a multiple of patch_size=8"),
        ("app --tile 1", "--tile 1: expected a whole number from 16 to 1,000,000,000."),
        ("app --grid 1001", "--grid 1001: expected a whole number from 1 to 1,000."),
        ("app --image-size -8", "--image-size -8: expected a whole number from 1 to 16,384."),
        ("app --min-iou nan", "--min-iou nan: expected a number from 0 to 1."),
        (f"segment {COINS} --everything --tile 15", "--tile 15: expected a whole number from 16 to 1,000,000,000."),
        (f"segment {COINS} --everything --grid 1000000000", "--grid 1000000000: expected a whole number from 1"),
        (f"segment {COINS} --everything --overlap inf", "--overlap inf: expected a number from 0 to 1."),
        (f"segment {COINS} --everything --image-size 0", "--image-size 0: expected a whole number from 1 to 16,384."),
        (f"segment {COINS} --everything --image-size 7", "--image-size 7: image_size=7 is not a multiple of patch"),
        (f"segment {COINS} --point nan 5", "(nan, 5) is outside of the image of 384 x 303 pixels."),
        (f"segment {COINS} --box 1 1 inf 5", "(inf, 5) is outside of the image of 384 x 303 pixels."),
        (f"segment {COINS} --masks {{folder}} --output out", "no label image coins in "),
        ("finetune --tile 1", "--tile 1: expected 16 or more."),
        ("finetune --tile " + "9" * 30, "expected 1,000,000,000 or less."),
        ("finetune --validation 1e-30", "--validation 1e-30: of 384 x 303 pixels, one part would have none."),
        ("finetune --objects 1000000000", "--objects 1000000000: expected 1,000 or less."),
        ("finetune --points 101", "--points 101: expected 100 or less."),
        ("finetune --negative-points -1", "--negative-points -1: expected 0 or more."),
        ("finetune --rounds 101", "--rounds 101: expected 100 or less."),
        ("finetune --grid 1001", "--grid 1001: expected 1,000 or less."),
        ("finetune --rank 10001", "--rank 10001: expected 10,000 or less."),
        ("finetune --alpha inf", "--alpha inf: expected 1,000,000,000 or less."),
        ("finetune --image-size 16392", "--image-size 16392: expected 16,384 or less."),
        ("finetune --image-size 7", "--image-size 7: image_size=7 is not a multiple of patch_size=8"),
        ("finetune --batch-size 10001", "--batch-size 10001: expected 10,000 or less."),
        ("finetune --learning-rate inf", "--learning-rate inf: expected 1,000,000,000 or less."),
        ("finetune --minutes inf", "--minutes inf: expected 1,000,000,000 or less."),
        ("finetune --save-steps inf", "--save-steps inf: expected 1,000,000,000 or less."),
        ("finetune --save-steps 20 --eval-every 15", "--save-steps 20: expected a multiple of --eval-every 15"),
        ("finetune --logging-steps inf", "--logging-steps inf: expected 1,000,000,000 or less."),
        ("finetune --save-total-limit 0", "--save-total-limit 0: expected 1 or more."),
        ("finetune --eval-accumulation-steps 0", "--eval-accumulation-steps 0: expected 1 or more."),
        ("finetune --max-grad-norm nan", "--max-grad-norm nan: expected 0 or more."),
        ("finetune --adam-beta1 1", "--adam-beta1 1.0: expected a share from 0 to less than 1."),
        ("finetune --adam-beta2 nan", "--adam-beta2 nan: expected a share from 0 to less than 1."),
        ("finetune --adam-epsilon 0", "--adam-epsilon 0.0: expected more than 0."),
        ("finetune --workers 1001", "--workers 1001: expected 1,000 or less."),
    ],
)  # fmt: skip
def test_a_refusal_names_the_option_in_one_line(
    command: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *arguments = command.replace("{folder}", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        COMMANDS[name]()
    message = capsys.readouterr().err if end.value.code == 2 else str(end.value.code)
    assert problem in message.splitlines()[-1]
    assert not [*tmp_path.iterdir()]
