"""What the user or the machine is the cause of ends a command with one line: the file, what is wrong, what to do."""

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError

import convert
import demo
import finetune
import segment
import verify
from checkpoint_tools.checkout import SAM_TINY
from checkpoint_tools.errors import explained, one_line_errors


PHOTO = str(ROOT / "docs" / "images" / "coins.png")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out"),
            "out: No space left on the disk: choose another",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on the disk: choose"),
        (SafetensorError('I/O error: Permission denied (os error 13) at path "x"'), "Permission denied: change its"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "No space left on"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied: change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "out: Read-only file system: choose another output."),
        (
            SafetensorError("I/O error: File too large (os error 27)"),
            "File too large: choose an output on another file",
        ),
        (OSError(errno.EBUSY, "Device or resource busy", "out"), "out: Device or resource busy: close what uses it"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "in"), "in: No such file or directory."),
        (OSError("many\nlines"), "many lines"),
        (pickle.UnpicklingError("... set weights_only to False"), "The file of weights is damaged, or holds objects"),
        (ImportError("cannot import name", name="peft.utils"), "This needs another version of peft (cannot import"),
        (ModuleNotFoundError("No module", name="onnx"), "This needs onnx, which is not installed: pip install onnx"),
    ],
)
def test_one_line_says_what_to_do(error: Exception, line: str) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors(prefix="command: "):
        raise error
    assert str(caught.value.code).startswith("command: " + line)
    assert "\n" not in str(caught.value.code)


@pytest.mark.parametrize(
    ("allocate", "line"),
    [
        (lambda: torch.empty(2**50), "Out of memory for 4503599627370496 bytes more. Ask for less: smaller"),
        (lambda: np.empty(2**50), "Out of memory for 8.00 PiB more. Ask for less: smaller batches"),
        (lambda: bytearray(2**60), "Out of memory. Ask for less: smaller batches"),
    ],
    ids=["torch", "NumPy", "Python"],
)
def test_memory_that_runs_out_is_said_in_one_line(allocate: Callable, line: str) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        allocate()
    assert str(caught.value.code).startswith(line)


def test_memory_of_a_gpu_that_runs_out_is_said_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"Out of memory for 2\.00 GiB more\. Ask for less"), one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


def test_mistakes_of_our_own_are_not_hidden() -> None:
    for error in (RuntimeError("a bug"), KeyError("a bug"), ValueError("a bug")):
        with pytest.raises(type(error)), one_line_errors():
            raise error


def test_causes_are_looked_into() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("cannot save") from error
    except RuntimeError as error:
        assert explained(error).startswith("No space left on the disk")


def run_main(command: Callable, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Runs a command that fails, and returns its only line."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command()
    message = str(caught.value.code)
    assert "\n" not in message
    return message


COMMANDS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "convert": (convert.main, ("to-split", str(SAM_TINY))),
    "demo": (demo.main, ("--steps", "1", "--output")),
    "finetune": (finetune.main, ("--steps", "1", "--output")),
    "segment": (segment.main, (PHOTO, "--point", "50", "150", "--output")),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EBUSY, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", COMMANDS)
def test_disks(name: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mkdir = Path.mkdir

    def refuse(path: Path, *args, **kwargs) -> None:
        if tmp_path in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    command, arguments = COMMANDS[name]
    message = run_main(command, monkeypatch, *arguments, tmp_path / "out")
    reason = "No space left on the disk" if number == errno.ENOSPC else os.strerror(number)
    assert f"{tmp_path}" in message and f": {reason}: " in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts")
@pytest.mark.parametrize(
    ("size", "command"),
    [
        ("1m", ["convert.py", "to-meta", SAM_TINY, "{}/sam.pth"]),
        ("1m", ["convert.py", "to-split", SAM_TINY, "{}/split"]),
        ("16k", ["segment.py", PHOTO, "--point", "50", "150", "--output", "{}/photo"]),
        ("400k", ["finetune.py", "--steps", "2", "--eval-every", "1", "--output", "{}/run"]),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) else value,
)
def test_full_disks(size: str, command: list, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user namespaces")
    script = f'mount -t tmpfs -o size={size} none "$1" && shift && "$@"; code=$?; echo; ls -a {tmp_path}; exit $code'
    arguments = [str(argument).format(tmp_path) for argument in command]
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path, sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip() and "%|" not in line]
    assert "No space left on the disk: choose another" in lines[-1]
    if command[0] != "finetune.py":  # whose run can be resumed
        assert process.stdout.endswith("\n.\n..\n"), "something was left"


# --- what is given


def test_demo_refuses_bases_that_fine_tuning_cannot_use(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((base_dir / name).read_bytes())
    assert "bare has no processor" in run_main(demo.main, monkeypatch, "--base", bare, "--output", tmp_path / "out")
    config = (bare / "config.json").read_text().replace('"sam"', '"sam_vision_model"')
    (bare / "config.json").write_text(config)
    assert "not a SAM v1 checkpoint" in run_main(demo.main, monkeypatch, "--base", bare, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = tmp_path / "a" / "b"
    for command, arguments in (
        (verify.main, (nothing, "--base", SAM_TINY)),
        (verify.main, (SAM_TINY, "--base", nothing)),
        (finetune.main, ("--base", nothing, "--output", tmp_path / "out")),
        (segment.main, (PHOTO, "--point", "9", "9", "--base", nothing, "--output", tmp_path / "out")),
        (demo.main, ("--base", nothing, "--output", tmp_path / "out")),
    ):
        message = run_main(command, monkeypatch, *arguments)
        assert f"{nothing}: there is no such folder, and it is no Hub id" in message


def test_revisions_of_folders(run_upload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Libraries ignore them."""
    for command, arguments in (
        (verify.main, (SAM_TINY, "--base", SAM_TINY, "--base-revision", "v1")),
        (verify.main, (SAM_TINY, "--base", SAM_TINY, "--revision", "v1")),
        (finetune.main, ("--revision", "v1", "--output", tmp_path / "out")),
    ):
        assert "is a folder, which has no revision v1" in run_main(command, monkeypatch, *arguments)
    arguments = ("--base", SAM_TINY, "--base-revision", "v1", "--output", tmp_path / "out")
    assert "is a folder, which has no revision v1" in run_upload(*arguments, fails=True)
    assert not (tmp_path / "out").exists()


def test_files_where_folders_are_expected(run_upload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "sam.pth")
    assert "is a file: expected a folder" in run_upload(
        "--base", tmp_path / "sam.pth", "--output", tmp_path / "out", fails=True
    )
    assert "is a file: expected a folder" in run_main(
        finetune.main, monkeypatch, "--base", tmp_path / "sam.pth", "--output", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-shard-size", "100"], "--max-shard-size 100: expected a number and its unit"),
        (["--max-shard-size", "huge"], "--max-shard-size huge: expected"),
        (["--license", "unknown"], "--license unknown: expected the licence"),
        (["--license", "other", "--license-name", "mine"], "--license other: expected --license-name and"),
        (["--base-model", "/home/me/sam"], "--base-model /home/me/sam: expected USER/NAME"),
        (["--repo-id", "user/a b"], "--repo-id user/a b: expected USER/NAME"),
        (["--private"], "--private: expected --repo-id or --space, too"),
        (["--dry-run"], "--dry-run: expected --repo-id or --space, too"),
        (["--adapter-revision", "v1"], "--adapter-revision: expected --adapter, too"),
        (["--space", "user/page", "--license", "mit"], "--license: a Space has the licence and the base"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    arguments: list[str], problem: str, run_upload, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import upload

    monkeypatch.setattr(sys, "argv", ["upload.py", "--base", str(SAM_TINY), "--output", "out", *arguments])
    with pytest.raises(SystemExit) as caught:
        upload.main()
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err
