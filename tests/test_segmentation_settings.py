"""The settings that travel with trained weights."""

import json
import warnings

import pytest

from segmentation.settings import FILE_NAME, SegmentationSettings, SegmentationSettingsError


SETTINGS = SegmentationSettings(image_size=192, tile=512, multimask="never", min_iou=0.7, min_stability=0.8)
SETTINGS = SETTINGS.but(channels=(2, 1), intensity="min-max")


def test_a_folder_keeps_them(tmp_path):
    assert SETTINGS.save(tmp_path).name == FILE_NAME
    assert SegmentationSettings.load(tmp_path) == SETTINGS


def test_a_hub_repo_keeps_them(hub, tmp_path):
    SETTINGS.save(tmp_path)
    hub.add("someone/adapter", tmp_path)
    assert SegmentationSettings.load("someone/adapter") == SETTINGS


def test_without_a_file_they_are_the_defaults(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    hub.add("someone/plain", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (tmp_path, "someone/plain"):
            assert SegmentationSettings.load(source) == SegmentationSettings()


def test_offline_it_is_said_that_they_are_the_defaults():
    with pytest.warns(UserWarning, match=r"the Hub cannot be reached, and no segmentation\.json is cached"):
        assert SegmentationSettings.load("someone/adapter") == SegmentationSettings()


def test_what_is_given_goes_before_what_is_saved():
    changed = SETTINGS.but(min_iou=0.5, tile=None, grid=None)
    assert (changed.min_iou, changed.tile, changed.grid) == (0.5, 512, 32)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read"),
        ("[1]", "expected settings among .*; got list"),
        (json.dumps({"min_iuo": 0.5}), "expected settings among .*min_iou.*; got min_iuo"),
        (json.dumps({"reading": {"intensity": "bright"}}), "--intensity bright"),
        (json.dumps({"reading": {"gamma": 2}}), "expected settings among channels, .*; got gamma"),
        (json.dumps({"reading": "bright"}), "expected settings among channels, .*; got str"),
        (json.dumps({"min_iou": 7}), r"segmentation\.json: --min-iou 7: expected a number from 0 to 1"),
        (json.dumps({"min_iou": "high"}), "--min-iou 'high': expected a number"),
        (json.dumps({"grid": None}), "grid None: expected a whole number"),
        (json.dumps({"tile": 0}), "tile 0: expected a whole number from 16 to 1,000,000,000"),
        (json.dumps({"overlap": 0.95}), r"overlap 0\.95: expected at most 0\.9"),
        (json.dumps({"multimask": "sometimes"}), "expected one of single-point, always, never"),
    ],
)
def test_damaged_files_are_named(content, problem, tmp_path):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(SegmentationSettingsError, match=problem) as raised:
        SegmentationSettings.load(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(raised.value)
