"""Which images the recipe trains, validates and tests on, by folders, files and settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from labelled_images import MASK_SIDE, blocks
from PIL import Image

import finetune
from image_data.layouts import PartSources, read_data, read_parts
from image_data.pillow_images import DataError


def save(folder: Path, *names: str) -> None:
    """Saves an image under each of the names; masks are in folders of that name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = blocks().astype(np.uint16)
        Image.fromarray(labels if "mask" in name else (labels % 251).astype(np.uint8)).save(path)


def save_coco(file: Path, *names: str) -> None:
    outline = [[20, 10, 30, 10, 30, 20, 20, 20]]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": n, "segmentation": outline} for n in range(len(names))],
    }
    file.write_text(json.dumps(content))


def parts(folder: Path, *arguments: str) -> PartSources:
    """Reads what the options say; those that name files are relative to the folder."""
    whole = [str(folder / each) if "/" in each or (folder / each).exists() else each for each in arguments]
    return read_parts(finetune.parse_args(whole).data)


def named(sources: PartSources, folder: Path) -> dict[str, list[str]]:
    return {
        name: [str(Path(source.name).relative_to(folder)) for source in part.sources]
        for name, part in sources.given.items()
    }


@pytest.mark.parametrize(
    ("images", "masks", "patterns"),
    [
        ("i/{}/a.png", "m/{}/a.png", []),
        ("i/{}/a.png", "i/{}/a_mask.png", ["--mask-pattern", "{stem}_mask.png"]),
        (
            "i/{}/images/a.png",
            "i/{}/masks/a.png",
            ["--image-pattern", "images/{stem}.*", "--mask-pattern", "masks/{stem}.*"],
        ),
    ],
    ids=["beside", "together", "within"],
)
@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Training", "val2017", "testing")])
def test_folders_divide_the_images(images, masks, patterns, names, tmp_path):
    for name in names:
        save(tmp_path, images.format(name), masks.format(name))
    arguments = ["--images", str(tmp_path / "i"), "--masks", str(tmp_path / masks[0]), *patterns]
    sources = read_parts(finetune.parse_args(arguments).data)
    assert named(sources, tmp_path) == {
        part: [images.format(name)] for part, name in zip(("train", "validation", "test"), names, strict=True)
    }
    assert sources.train.notes[-1] == (
        "the folders divide the images: train (1 image), validation (1 image), test (1 image)"
    )


@pytest.mark.parametrize("folders", [("train", "extra"), ("valid", "test"), ("train",), ("train", "")])
def test_other_folders_do_not(folders, tmp_path):
    for folder in folders:
        save(tmp_path, f"i/{folder}/a.png", f"masks/{folder}/a.png")
    sources = parts(tmp_path, "--images", "i", "--masks", "masks")
    assert list(sources.given) == ["train"] and len(sources.train.sources) == len(folders)


def test_coco_files_side_by_side(tmp_path):
    """With the same names of files in the folders of the parts."""
    for folder, stem in (("train2017", "train"), ("val2017", "val"), ("test2017", "test")):
        save(tmp_path, f"i/{folder}/a.png", f"i/{folder}/{stem}.png")
        save_coco(tmp_path / "annotations" / f"instances_{folder}.json", "a.png", f"{stem}.png")
    sources = parts(tmp_path, "--images", "i", "--coco", "annotations")
    assert named(sources, tmp_path) == {
        "train": ["i/train2017/a.png", "i/train2017/train.png"],
        "validation": ["i/val2017/a.png", "i/val2017/val.png"],
        "test": ["i/test2017/a.png", "i/test2017/test.png"],
    }


def test_coco_files_beside_their_images(tmp_path):
    """As Roboflow exports them."""
    for folder in ("train", "valid"):
        save(tmp_path, f"i/{folder}/a.png", f"i/{folder}/b.png")
        save_coco(tmp_path / "i" / folder / "_annotations.coco.json", "a.png", "b.png")
    sources = parts(tmp_path, "--images", "i", "--coco", "i")
    assert named(sources, tmp_path) == {
        "train": ["i/train/a.png", "i/train/b.png"],
        "validation": ["i/valid/a.png", "i/valid/b.png"],
    }


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["one.json"], "expected train, val or test in the name"),
        (["train.json", "captions_train.json"], "are both for train"),
        (["val.json"], r"expected a file train\*\.json"),
        ([], r"expected a file train\*\.json"),
        (["train_and_val.json"], "expected train, val or test in the name"),
    ],
)
def test_coco_files_whose_part_is_not_certain_are_refused(files, problem, tmp_path):
    save(tmp_path, "i/a.png")
    (tmp_path / "coco").mkdir()
    for file in files:
        save_coco(tmp_path / "coco" / file, "a.png")
    with pytest.raises(DataError, match=problem):
        parts(tmp_path, "--images", "i", "--coco", "coco")


def test_links_are_followed_and_what_systems_write_is_ignored(tmp_path):
    for kind in ("i", "masks"):
        save(tmp_path, *(f"{kind}/{name}.png" for name in "abc"), *(f"elsewhere/{kind}/{name}.png" for name in "de"))
        (tmp_path / kind / "linked").symlink_to(tmp_path / "elsewhere" / kind, target_is_directory=True)
        (tmp_path / kind / "loop").symlink_to(tmp_path / kind, target_is_directory=True)
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png"):
            (tmp_path / kind / name).touch()
    arguments = ["--images", "i", "--masks", "masks"]
    names = ["i/a.png", "i/b.png", "i/c.png", "i/linked/d.png", "i/linked/e.png"]
    assert named(parts(tmp_path, *arguments), tmp_path) == {"train": names}
    for kind in ("i", "masks"):
        (tmp_path / kind / "gone.png").symlink_to(tmp_path / "gone.png")
    whole = [str(tmp_path / each) if each in ("i", "masks") else each for each in arguments]
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: .*No such file"):
        read_data(finetune.parse_args(whole).data, MASK_SIDE, 0)


def test_hidden_coco_files_are_ignored(tmp_path):
    save(tmp_path, "i/a.png", "i/b.png", "i/.cache/a.png")
    save_coco(tmp_path / "coco" / "train.json", "of/another/machine/a.png", "b.png")
    (tmp_path / "coco" / "._train.json").write_bytes(b"\0\5\x16\7")
    assert named(parts(tmp_path, "--images", "i", "--coco", "coco"), tmp_path) == {"train": ["i/a.png", "i/b.png"]}


def test_validation_and_test_images_of_ones_own(tmp_path):
    """In any layout, whatever that of the training images is."""
    save(
        tmp_path, "i/a.png", "masks/a.png", "i/b.png", "masks/b.png", "v/c.png", "v_masks/c.png", "t/d.png", "t/e.png"
    )
    save_coco(tmp_path / "test.json", "d.png", "e.png")
    arguments = ["--images", "i", "--masks", "masks", "--validation-images", "v", "--validation-masks", "v_masks"]
    arguments += ["--test-images", "t", "--test-coco", "test.json"]
    sources = parts(tmp_path, *arguments)
    assert named(sources, tmp_path) == {
        "train": ["i/a.png", "i/b.png"],
        "validation": ["v/c.png"],
        "test": ["t/d.png", "t/e.png"],
    }
    whole = [str(tmp_path / each) if (tmp_path / each).exists() else each for each in arguments]
    samples, about = read_data(finetune.parse_args(whole).data, MASK_SIDE, seed=0)
    assert [len(part) for part in (samples.train, samples.validation, samples.test)] == [2, 1, 2]
    assert about == "5 images from i"


def test_a_single_training_image_is_used_whole_if_there_are_others_to_validate_on(tmp_path):
    save(tmp_path, "i/a.png", "masks/a.png", "v/c.png", "v_masks/c.png")
    settings = finetune.parse_args(
        [
            *("--images", str(tmp_path / "i"), "--masks", str(tmp_path / "masks")),
            *("--validation-images", str(tmp_path / "v"), "--validation-masks", str(tmp_path / "v_masks")),
        ]
    )
    samples, _ = read_data(settings.data, MASK_SIDE, seed=0)
    assert [len(part[0].ids) for part in (samples.train, samples.validation)] == [6, 6]


def test_coco_annotations_of_one_folder_of_images(tmp_path):
    save(tmp_path, "i/a.png", "i/b.png", "i/c.png")
    save_coco(tmp_path / "train.json", "a.png", "b.png")
    save_coco(tmp_path / "held_out.json", "c.png")
    sources = parts(tmp_path, "--images", "i", "--coco", "train.json", "--validation-coco", "held_out.json")
    assert named(sources, tmp_path) == {"train": ["i/a.png", "i/b.png"], "validation": ["i/c.png"]}


def test_no_image_is_in_two_parts(tmp_path):
    save(tmp_path, "i/a.png", "i/b.png", "v/c.png")
    save_coco(tmp_path / "train.json", "a.png", "b.png")
    save_coco(tmp_path / "val.json", "b.png")
    with pytest.raises(DataError, match=r"b\.png is in train and in validation"):
        parts(tmp_path, "--images", "i", "--coco", "train.json", "--validation-coco", "val.json")
    (tmp_path / "v" / "b.png").symlink_to(tmp_path / "i" / "b.png")
    with pytest.raises(DataError, match=r"b\.png is in train and in validation"):
        arguments = ["--validation-images", "v", "--validation-coco", "val.json"]
        parts(tmp_path, "--images", "i", "--coco", "train.json", *arguments)


@pytest.mark.parametrize("pattern", ["{group}_*", "{group}/*"])
@pytest.mark.parametrize("seed", range(3))
def test_images_of_one_group_stay_together(pattern, seed, tmp_path):
    names = [
        pattern.replace("{group}", f"p{patient}").replace("*", f"{n}.png") for patient in range(4) for n in range(3)
    ]
    save(tmp_path, *(f"i/{name}" for name in names), *(f"masks/{name}" for name in names))
    arguments = ["--images", str(tmp_path / "i"), "--masks", str(tmp_path / "masks"), "--group-pattern", pattern]
    samples, _ = read_data(finetune.parse_args(arguments).data, MASK_SIDE, seed)
    groups = [{sample.source.group for sample in part} for part in (samples.train, samples.validation)]
    assert [len(part) for part in groups] == [3, 1] and not groups[0] & groups[1]


def test_groups_that_cannot_be_kept_together_are_refused(tmp_path):
    save(tmp_path, "i/p1_a.png", "masks/p1_a.png", "i/p1_b.png", "masks/p1_b.png", "v/p1_c.png", "v_masks/p1_c.png")
    arguments = ["--images", "i", "--masks", "masks", "--group-pattern"]
    whole = [str(tmp_path / each) if (tmp_path / each).exists() else each for each in arguments]
    with pytest.raises(DataError, match="All images are of one group, p1"):
        read_data(finetune.parse_args([*whole, "{group}_*"]).data, MASK_SIDE, 0)
    with pytest.raises(DataError, match=r"p1_a\.png: does not fit --group-pattern \{group\}-\*"):
        parts(tmp_path, *arguments, "{group}-*")
    with pytest.raises(DataError, match=r"p1_c\.png: its group p1 is in train and in validation"):
        parts(tmp_path, *arguments, "{group}_*", "--validation-images", "v", "--validation-masks", "v_masks")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--mask-pattern {stem}_m.png", "--mask-pattern: expected --masks, too"),
        ("--images i --coco c --void 255", "--void: expected --masks; COCO annotations have no numbers"),
        ("--images i --coco c --turn-masks", "--turn-masks: expected --masks; COCO annotations have no"),
        (
            "--images i --masks m --mask-pattern {stem}/*.png --instances labels",
            "--instances: expected a --mask-pattern without *",
        ),
        ("--images i --masks m --color-masks --threshold 9", "--threshold: colours have no order"),
        ("--images i --coco c --color-masks", "--color-masks: expected --masks, too"),
        ("--images i --masks m --color-masks --mask-pattern {stem}/*.png", "files of one object each"),
        ("--images i --masks m --mask-pattern a.png", "--mask-pattern a.png: expected {stem} in it, once"),
        ("--images i --coco c.json --pages each", "--pages each: expected --masks, with a page for each page"),
        ("--dataset d --pages each", "--pages each: expected --masks, with a page for each page"),
        ("--images i --masks m --group-pattern *", "--group-pattern *: expected {group} in it, once"),
        ("--images i --masks m --categories cat", "--categories: expected --coco or --dataset, too"),
        (
            "--images i --masks m --validation-images v",
            "expected --validation-images together with --validation-masks",
        ),
        ("--images i --masks m --test-masks t", "expected --test-images together with --test-masks or --test-coco"),
        ("--images i --masks m --test-images i --test-masks t --test-coco c", "--test-masks and --test-coco are both"),
        ("--validation-images v --validation-masks m", "expected --images with --masks or --coco to train on, too"),
        (
            "--images i --masks m --validation 0.3 --validation-images v --validation-masks w",
            "--validation and --validation-images are both given",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit) as raised:
        finetune.main(arguments.split())
    assert raised.value.code == 2 and problem in capsys.readouterr().err


def test_a_folder_and_files_for_one_part_are_refused(tmp_path):
    save(tmp_path, "i/train/a.png", "masks/train/a.png", "i/val/b.png", "masks/val/b.png")
    shutil.copytree(tmp_path / "i" / "val", tmp_path / "v")
    shutil.copytree(tmp_path / "masks" / "val", tmp_path / "v_masks")
    with pytest.raises(DataError, match=r"--validation-\.\.\. is given, and .* has a folder validation"):
        parts(
            tmp_path,
            *("--images", "i", "--masks", "masks", "--validation-images", "v", "--validation-masks", "v_masks"),
        )


def test_help_names_every_layout(capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    text = capsys.readouterr().out
    for option in ("image-pattern", "mask-pattern", "color-masks", "categories", "group-pattern", "test-coco"):
        assert f"--{option}" in text


@pytest.mark.slow
def test_test_images_are_measured_once_after_training(tmp_path, capsys):
    """With the metrics that they would have as validation images."""
    save(tmp_path, "i/a.png", "masks/a.png", "v/b.png", "v_masks/b.png", "t/c.png", "t_masks/c.png")
    folders = {"--images": "i", "--masks": "masks", "--validation-images": "v", "--validation-masks": "v_masks"}
    folders |= {"--test-images": "t", "--test-masks": "t_masks"}
    arguments = [each for option, name in folders.items() for each in (option, str(tmp_path / name))]
    arguments += ["--steps", "1", "--eval-every", "1", "--batch-size", "1", "--objects", "2", "--image-size", "128"]
    finetune.main([*arguments, "--output", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["objects"] == {"train": 6, "validation": 6, "test": 6}
    assert metrics["test"] == metrics["after"], "the images show the same"
    assert f"Mean IoU on the 6 test objects: {metrics['test']['iou']:.3f}." in capsys.readouterr().out
