"""From settings to samples: which files or rows are meant, and which part each image belongs to."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coco import coco_images
from .data_settings import DataSettings
from .folders import paired_files
from .hub_datasets import DatasetSettings, dataset_parts
from .patterns import Pattern, files_in
from .pillow_images import DataError, number_of
from .samples import TrainValidationParts, train_validation_parts
from .sources import Coins, Source, SourceList


TRAIN, VALIDATION, TEST = "train", "validation", "test"
PART_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}


@dataclass
class PartSources:
    """Sources to train on; those to validate and to test on, if they are given; and a few words on what they are."""

    train: SourceList
    validation: SourceList | None = None
    test: SourceList | None = None
    about: str = ""

    @property
    def given(self) -> dict[str, SourceList]:
        """The parts that there are, by name."""
        parts = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}
        return {name: part for name, part in parts.items() if part is not None}


def read_data(settings: DataSettings, mask_side: int, seed: int) -> tuple[TrainValidationParts, str]:
    """Returns the samples, and a few words on what they are."""
    sources = read_parts(settings)
    validation = settings.validation or (0.5 if len(sources.train.sources) == 1 else 0.2)
    parts = train_validation_parts(
        sources.train.sources,
        mask_side,
        validation,
        settings.tile,
        settings.overlap,
        settings.min_area,
        seed,
        own_validation=sources.validation.sources if sources.validation else (),
        test=sources.test.sources if sources.test else (),
    )
    for part in sources.given.values():
        parts.left_out += part.left_out
    parts.notes[:0] = [note for part in sources.given.values() for note in part.notes]
    return parts, sources.about or "A photograph of coins"


def read_sources(settings: DataSettings) -> SourceList:
    """Returns the images that the settings name, without those of `validation_...` and `test_...`.

    Raises:
        DataError: If files are missing, or do not belong together.
    """
    if settings.dataset:
        return parts_of_dataset(settings)[TRAIN]
    if settings.images and settings.coco:
        if settings.coco.is_dir():
            raise DataError(
                [f"--coco {settings.coco}: expected one file, as train, validation and test are one here."]
            )
        return coco_images(settings.images, settings.coco, settings.categories, settings.image_reading)
    if settings.images and settings.masks:
        return paired_files(
            settings.images,
            settings.masks,
            settings.image_pattern,
            settings.mask_pattern,
            settings.color_masks,
            settings.image_reading,
            settings.label_reading,
        )
    return SourceList([Coins()])


def read_parts(settings: DataSettings) -> PartSources:
    """Returns the images to train, to validate and to test on, as far as settings or folders say.

    Raises:
        DataError: If files are missing or do not belong together, or one image is in two parts.
    """
    if settings.dataset:
        splits = parts_of_dataset(settings)
        parts = PartSources(splits[TRAIN], splits.get(VALIDATION), splits.get(TEST))
    elif settings.coco and settings.coco.is_dir():
        parts = parts_of_coco_folder(settings, settings.coco)
    else:
        parts = by_folder(read_sources(settings), settings.images)
    for name in (VALIDATION, TEST):
        if others := settings_of_part(settings, name):
            if getattr(parts, name):
                raise DataError([f"--{name}-... is given, and {settings.images} has a folder {name}: expected one."])
            setattr(parts, name, read_sources(others))
    if settings.group_pattern:
        set_groups(parts, Pattern(settings.group_pattern, "group"))
    refuse_shared(parts)
    number = sum(len(part.sources) for part in parts.given.values())
    parts.about = f"{number_of(number, 'image')} from {name_of(settings)}" if name_of(settings) else ""
    return parts


def name_of(settings: DataSettings) -> str:
    """What a model card may say of where the images come from; empty for the coins."""
    if settings.dataset and not Path(settings.dataset).exists():
        return settings.dataset
    place = settings.dataset or settings.images
    return Path(place).resolve().name if place else ""


def parts_of_dataset(settings: DataSettings) -> dict[str, SourceList]:
    """Returns the parts that the splits of a data set are."""
    names = [
        field.name for field in dataclasses.fields(DatasetSettings) if field.name not in ("path", "config", "revision")
    ]
    which = DatasetSettings(
        str(settings.dataset),
        settings.dataset_config,
        settings.dataset_revision,
        **{name: getattr(settings, name) for name in names},
    )
    return dataset_parts(which, settings.image_reading, settings.label_reading, settings.categories)


def settings_of_part(settings: DataSettings, part: str) -> DataSettings | None:
    """Returns the settings of the images that are given for a part alone, if any."""
    images, masks, coco = (getattr(settings, f"{part}_{name}") for name in ("images", "masks", "coco"))
    if not (images or coco):
        return None
    given: dict[str, Any] = {
        f"{each}_{name}": None for each in (VALIDATION, TEST) for name in ("images", "masks", "coco")
    }
    return dataclasses.replace(
        settings,
        images=images or settings.images,
        masks=masks,
        coco=coco,
        image_pattern=settings.image_pattern if masks else None,
        mask_pattern=settings.mask_pattern if masks else None,
        color_masks=settings.color_masks and bool(masks),
        categories=settings.categories if coco else [],
        **given,
    )


def part_named_in(text: str) -> str | None:
    """Returns the part that a name such as `instances_val2017` or `valid` stands for."""
    named = {PART_NAMES[word] for word in re.split("[^a-z]+", text.lower()) if word in PART_NAMES}
    return named.pop() if len(named) == 1 else None


def by_folder(whole: SourceList, folder: Path | None) -> PartSources:
    """Divides sources by the folders that they are in, if those are train, valid and test, and no others."""
    files = files_of(whole.sources)
    if folder is None or len(files) < len(whole.sources):
        return PartSources(whole)
    names = [part_named_in(file.relative_to(folder).parts[0]) if file.parent != folder else None for file in files]
    if TRAIN not in names or None in names or len(set(names)) == 1:
        return PartSources(whole)
    parts = {name: SourceList([]) for name in set(names)}
    for source, name in zip(whole.sources, names, strict=True):
        parts[name].sources.append(source)
    counts = ", ".join(
        f"{name} ({number_of(len(parts[name].sources), 'image')})"
        for name in (TRAIN, VALIDATION, TEST)
        if name in parts
    )
    train = SourceList(
        parts[TRAIN].sources, whole.left_out, [*whole.notes, f"the folders divide the images: {counts}"]
    )
    return PartSources(train, parts.get(VALIDATION), parts.get(TEST))


def parts_of_coco_folder(settings: DataSettings, folder: Path) -> PartSources:
    """Reads the COCO files of a folder and those below it, one for each part.

    Raises:
        DataError: If a file's part cannot be told, or there are two for one.
    """
    files: dict[str, Path] = {}
    for file in [path for path in files_in(folder) if path.suffix == ".json"]:
        part = part_named_in(file.relative_to(folder).with_suffix("").as_posix())
        if part is None:
            raise DataError([f"{file}: expected train, val or test in the name of a COCO file in --coco {folder}."])
        if part in files:
            raise DataError([f"{files[part]} and {file} are both for {part}: expected one of them, as --coco FILE."])
        files[part] = file
    if TRAIN not in files:
        raise DataError([f"--coco {folder}: expected a file train*.json, or train/*.json."])
    parts = {
        part: read_sources(dataclasses.replace(settings, coco=file, images=images_of_part(settings.images, part)))
        for part, file in files.items()
    }
    return PartSources(parts[TRAIN], parts.get(VALIDATION), parts.get(TEST))


def images_of_part(images: Path | None, part: str) -> Path | None:
    """Returns the folder of a part's images: the one that is named so, or the folder of all."""
    folders = [path for path in sorted(images.iterdir()) if path.is_dir()] if images and images.is_dir() else []
    named = [path for path in folders if part_named_in(path.name) == part]
    return named[0] if len(named) == 1 else images


def set_groups(parts: PartSources, pattern: Pattern) -> None:
    """Sets the group of each source from its file's path.

    Raises:
        DataError: If a path has no group.
    """
    problems = []
    for source in [source for part in parts.given.values() for source in part.sources]:
        file = getattr(source, "image", None)
        source.group = pattern.value(file.as_posix()) if file else None
        if source.group is None:
            problems.append(f"{source.name}: does not fit --group-pattern {pattern.text}.")
    if problems:
        raise DataError(problems)


def refuse_shared(parts: PartSources) -> None:
    """Raises an error if a file or a group is in two parts."""
    seen: dict[Path | str, str] = {}
    problems = []
    for name, part in parts.given.items():
        for file in files_of(part.sources):
            if (other := seen.setdefault(file.resolve(), name)) != name:
                problems.append(f"{file} is in {other} and in {name}.")
        for source in part.sources:
            if source.group is not None and (other := seen.setdefault(source.group, name)) != name:
                problems.append(f"{source.name}: its group {source.group} is in {other} and in {name}.")
    if problems:
        raise DataError(dict.fromkeys(problems))


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The image files of sources that have any."""
    return [file for source in sources if (file := getattr(source, "image", None))]
