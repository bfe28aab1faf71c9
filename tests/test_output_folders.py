"""Outputs are written whole or not at all, and never over anything but an earlier output of the same kind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import ROOT

import convert
from checkpoint_tools.output_folders import MARKER, PARTIAL, mark_archive, require_replaceable, staged, staged_file


def write(destination: Path, text: str = "new", name: str = "weights", force: bool = False, **options) -> Path:
    with staged(destination, "test", force, **options) as folder:
        (folder / name).write_text(text)
    return destination


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_appears_only_when_complete(tmp_path: Path):
    destination = tmp_path / "parent" / "model"
    with staged(destination, "test") as folder:
        (folder / "weights").write_text("new")
        assert not destination.exists()
    assert (destination / "weights").read_text() == "new"
    assert names(destination) == {"weights", MARKER}
    assert names(destination.parent) == {"model"}


@pytest.mark.parametrize("moment", ["while it is written", "while it is moved"])
def test_failure_leaves_what_was_there(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    destination = write(tmp_path / "model", "old")
    rename = Path.rename

    def fail_late(self: Path, target: Path) -> Path:
        if moment == "while it is moved" and self.name == "second" and self.read_text() == "half":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_late)
    with pytest.raises(OSError, match="no space"), staged(destination, "test", force=True) as folder:
        for name in ("first", "second"):
            (folder / name).write_text("half")
        if moment == "while it is written":
            raise OSError("no space")
    assert (destination / "weights").read_text() == "old"
    assert names(destination) == {"weights", MARKER}
    assert names(tmp_path) == {"model"}


def test_replaces_only_by_force(tmp_path: Path):
    destination = write(tmp_path / "model", "old")
    with pytest.raises(FileExistsError, match="--force"):
        write(destination)
    write(destination, name="other", force=True)
    assert names(destination) == {"other", MARKER}
    write(destination, force=True)
    assert names(destination) == {"weights", MARKER}


def test_a_folder_that_exists_stays_the_same_folder(tmp_path: Path):
    """As mount points must."""
    destination = tmp_path / "mounted"
    (destination / "lost+found").mkdir(parents=True)
    inode = destination.stat().st_ino
    write(destination)
    write(destination, "newer", force=True)
    assert destination.stat().st_ino == inode
    assert names(destination) == {"weights", MARKER, "lost+found"}
    assert (destination / "weights").read_text() == "newer"


@pytest.mark.skipif(sys.platform != "linux", reason="mounts")
def test_mount_points_in_unwritable_parents(tmp_path: Path):
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no user namespaces")
    mounts = """
        mount -t tmpfs none "$1" && mkdir "$1/volume" && mount -t tmpfs none "$1/volume" && mount -o remount,ro "$1" &&
        "$2" -c "$3" "$1/volume" && ls -A "$1/volume" && "$2" -c "$3" "$1/new"
    """
    code = """
        import sys
        from pathlib import Path
        from checkpoint_tools.output_folders import staged
        with staged(Path(sys.argv[1]), "test") as folder:
            (folder / "weights").touch()
    """
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounts, "sh", tmp_path, sys.executable, dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split() == [MARKER, "weights"], process.stderr
    assert process.stderr.splitlines()[-1] == f"OSError: [Errno 30] Read-only file system: '{tmp_path}'"


# --- what --force does not replace


@pytest.fixture
def stock_source(base_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base_dir, tmp_path / "home" / "source")


def convert_error(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        convert.main()
    return str(caught.value.code)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("source", "same or lie in one another"),
        (".", "same or lie in one another"),
        ("link to the source", "same or lie in one another"),
        ("source/child", "same or lie in one another"),
        ("what a link in the source leads to", "same or lie in one another"),
        ("pictures", "not marked as an earlier output"),
        ("other kind", "not marked as an earlier output"),
        ("with notes", "also holds deep/notes.txt"),
        ("working folder", "working folder or home"),
    ],
)
def test_force_replaces_nothing_else(
    output: str, problem: str, stock_source: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = stock_source.parent
    monkeypatch.chdir(home)
    (home / "link to the source").symlink_to(stock_source)
    (home / "pictures").mkdir()
    (home / "pictures" / "cat.png").touch()
    for folder, kind in (
        (stock_source / "child", "split model"),
        (home / "what a link in the source leads to", "split model"),
        (home / "other kind", "adapter"),
        (home / "with notes", "split model"),
        (home / "working folder", "split model"),
    ):
        with staged(folder, kind) as staged_folder:
            (staged_folder / "weights").touch()
    (home / "with notes" / "deep").mkdir()
    (home / "with notes" / "deep" / "notes.txt").touch()
    (stock_source / "linked").symlink_to(home / "what a link in the source leads to" / "weights")
    if output == "working folder":
        monkeypatch.chdir(home / output)
        output = "."
    before = contents(home)
    source = base_dir if output == "." and problem.startswith("working") else stock_source
    message = convert_error(monkeypatch, "to-split", source, output, "--force")
    assert problem in message
    assert contents(home) == before


def test_home_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = write(tmp_path / "home")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(FileExistsError, match="working folder or home"):
        write(home, force=True)


@pytest.mark.slow
def test_convert_replaces_its_earlier_output(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A folder, and a file: they are marked."""
    for command, output in (("to-split", "split"), ("to-meta", "sam.pth")):
        arguments = [command, base_dir, tmp_path / output]
        for options in ([], ["--force"]):
            monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments), *options])
            convert.main()
        assert "replace an earlier output with --force" in convert_error(monkeypatch, *arguments)
    torch.save({"precious": torch.zeros(1)}, tmp_path / "mine.pth")
    assert "not marked" in convert_error(monkeypatch, "to-meta", base_dir, tmp_path / "mine.pth", "--force")
    assert torch.load(tmp_path / "mine.pth", weights_only=True).keys() == {"precious"}
    assert names(tmp_path) == {"split", "sam.pth", "mine.pth"}


def test_refuses_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path: Path):
    (tmp_path / "model").write_text("old")
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "model", force=True)
    with pytest.raises(FileExistsError, match="is not a file"), staged_file(tmp_path, "test", force=True):
        raise AssertionError("not reached")


def test_pipes_and_devices_are_no_files(tmp_path: Path, split_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be waited for, or read without an end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is not a file" in convert_error(monkeypatch, "to-meta", split_dir, pipe, "--force")
    assert "is not a file" in convert_error(monkeypatch, "to-meta", split_dir, "/dev/null", "--force")
    assert "is a pipe" in convert_error(monkeypatch, "from-meta", pipe, tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_name_of_a_leftover_is_not_touched(kind: str, tmp_path: Path) -> None:
    leftover = tmp_path / f".model{PARTIAL}"
    (tmp_path / "mine").mkdir()
    leftover.write_text("mine") if kind == "file" else leftover.symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is in the way, and no command wrote it"):
        write(tmp_path / "model")
    assert leftover.is_symlink() == (kind == "link")
    assert leftover.exists()


def test_marked_files(tmp_path: Path) -> None:
    """They stay what they are."""
    tensors = {"weights": torch.arange(5000)}
    with staged_file(tmp_path / "sam.pth", "test") as path:
        torch.save(tensors, path)
        mark_archive(path, "test")
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "sam.pth", weights_only=True, mmap=mmap)
        assert torch.equal(loaded["weights"], tensors["weights"])
    for file in tmp_path.iterdir():
        require_replaceable(file, "test", force=True)
        with pytest.raises(FileExistsError, match="not marked"):
            require_replaceable(file, "tes", force=True)


# --- killed runs


@pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
def test_leftovers_of_a_killed_run_are_removed(exists: bool, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    if exists:
        destination.mkdir()
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from checkpoint_tools.output_folders import staged
        with staged(Path({str(destination)!r}), "test") as folder:
            (folder / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", dedent(code)], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert any(PARTIAL in path.name for path in tmp_path.rglob("*"))
    write(destination)
    assert names(tmp_path) == {"model"}
    assert names(destination) == {"weights", MARKER}


def test_two_runs_do_not_disturb_each_other(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with staged(tmp_path / "model", "test") as folder:
        (folder / "weights").write_text("first")
        with pytest.raises(FileExistsError, match="Another run writes to"):
            write(tmp_path / "model", "second")
    assert (tmp_path / "model" / "weights").read_text() == "first"
