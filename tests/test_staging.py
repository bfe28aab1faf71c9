"""Folders are written whole or not at all."""

from pathlib import Path

import pytest

from checkpoint_tools.staging import staged


def test_appears_only_when_complete(tmp_path: Path):
    destination = tmp_path / "parent" / "model"
    with staged(destination) as folder:
        (folder / "weights").write_text("new")
        assert not destination.exists()
    assert (destination / "weights").read_text() == "new"
    assert [path.name for path in destination.parent.iterdir()] == ["model"]


def test_failure_leaves_what_was_there(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(OSError, match="no space"), staged(tmp_path / "model", force=True) as folder:
        (folder / "weights").write_text("half")
        raise OSError("no space")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replaces_only_by_force(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(FileExistsError, match="--force"), staged(tmp_path / "model"):
        raise AssertionError("not reached")
    with staged(tmp_path / "model", force=True) as folder:
        (folder / "other").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["other"]


def test_refuses_a_file(tmp_path: Path):
    (tmp_path / "model").write_text("old")
    with pytest.raises(FileExistsError, match="is a file"), staged(tmp_path / "model", force=True):
        raise AssertionError("not reached")
