"""Images and objects in the rows of a data set of the `datasets` library: a Hub id, a folder, or a Parquet file."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .coco import Annotation, identity, reason_to_skip, with_objects
from .coco_masks import shortened
from .images import read_mask, read_pixels, rgb_of, turn_with_image
from .labels import LabelReading
from .mask_interpretation import interpret_masks
from .overlaps import layers_of
from .pillow_images import DataError, ImageReading, Pixels, number_of
from .sources import LabelledImage, Source, SourceList


INSTALL = 'the package datasets is missing: install it with pip install ".[datasets]"'
MASK_COLUMNS = (
    "mask",
    "masks",
    "label",
    "labels",
    "annotation",
    "annotations",
    "instances",
    "objects",
    "segmentation",
)
READERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}  # by suffix
SPLITS = {"validation": ("validation", "valid", "val"), "test": ("test",)}

Read = TypeVar("Read")


@dataclass(frozen=True)
class DatasetSettings:
    """Which data set, splits and columns to read.

    Args:
        path: Hub id, folder or Parquet file.
        config: Name of the configuration, where the data set has several.
        revision: Branch, tag or commit on the Hub.
        image_column: Column of the images.
        mask_column: Column of the objects; None for the only one that has a usual name.
        group_column: Column whose values name the groups of rows that are not divided.
        split: Split to train on; None for `train`, or the only one.
        validation_split: Split to validate on; None for that of the usual name, if `split` is None too.
        test_split: Split to test on; likewise.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    image_column: str = "image"
    mask_column: str | None = None
    group_column: str | None = None
    split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None


def dataset_parts(
    settings: DatasetSettings, reading: ImageReading, labels: LabelReading, categories: list[str]
) -> dict[str, SourceList]:
    """Returns the sources of the parts that the data set has: `train`, and perhaps `validation` and `test`.

    Raises:
        DataError: If the data set cannot be loaded, or lacks what the settings name.
    """
    whole = loaded(settings)
    parts = {}
    for part, split in splits_of(settings, whole).items():
        try:
            rows = whole[split] if split in whole else loaded(settings, split)
        except DataError as error:
            raise DataError([f"{error} It has the splits {', '.join(whole)}."]) from error
        parts[part] = sources_of(settings, rows, split, reading, labels, categories)
    if settings.split is None and len(parts) > 1:
        counts = ", ".join(f"{name} ({number_of(len(part.sources), 'image')})" for name, part in parts.items())
        parts["train"].notes.append(f"the splits divide the images: {counts}")
    return parts


def loaded(settings: DatasetSettings, split: str | None = None) -> Any:
    """Returns the data set with all its splits, or one.

    Raises:
        DataError: If it cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError([f"--dataset: {INSTALL}."]) from error
    path = Path(settings.path)
    if settings.revision and path.exists():
        raise DataError([f"--dataset-revision {settings.revision}: expected a Hub id; {path} is on this machine."])
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # of save_to_disk
            saved = datasets.load_from_disk(str(path))
            return saved if isinstance(saved, Mapping) else {"train": saved}
        if path.is_file():
            if path.suffix not in READERS:
                raise ValueError(f"expected a Hub id, a folder, or a file {', '.join(READERS)}.")
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split=split)
        return datasets.load_dataset(settings.path, settings.config, split=split, revision=settings.revision)
    except Exception as error:  # of the Hub, of pyarrow, of the library's own kinds
        reason = " ".join(str(error).split())
        advice = " Choose one with --dataset-config." if "config name" in reason.lower() else ""
        raise DataError([f"--dataset {settings.path}: cannot be loaded: {reason}{advice}"]) from error


def splits_of(settings: DatasetSettings, whole: Mapping[str, Any]) -> dict[str, str]:
    """Returns the split of each part.

    Raises:
        DataError: If nothing says which split to train on.
    """
    train = settings.split or ("train" if "train" in whole else next(iter(whole)) if len(whole) == 1 else None)
    if train is None:
        raise DataError([f"--dataset {settings.path}: expected --split, one of {', '.join(whole)}."])
    given = {"validation": settings.validation_split, "test": settings.test_split}
    if settings.split is None:
        for part, names in SPLITS.items():
            given[part] = given[part] or next((name for name in names if name in whole and name != train), None)
    return {"train": train, **{part: split for part, split in given.items() if split}}


def sources_of(
    settings: DatasetSettings,
    rows: Any,
    split: str,
    reading: ImageReading,
    labels: LabelReading,
    categories: list[str],
) -> SourceList:
    """Returns a source for each row.

    Raises:
        DataError: If a column is missing or of another kind, or the masks leave questions open.
    """
    import datasets

    image_column, mask_column = columns_of(settings, rows.features, datasets)
    feature = rows.features[mask_column]
    for name in (image_column, mask_column):
        rows = rows.cast_column(name, undecoded(rows.features[name], datasets))
    name = f"{settings.path}, {split}"
    groups = groups_of(settings.group_column, rows, name, datasets)
    rows = rows.select_columns([image_column, mask_column])
    notes: list[str] = []
    turn_masks = labels.turn_masks
    read_objects: Callable[..., LabelledImage]
    are_label_images = isinstance(feature, datasets.Image) or is_array(feature, datasets)
    if labels.given and not are_label_images:
        raise DataError([f"--{labels.given[0]}: expected label images; {mask_column} in {name} has objects."])
    if categories and not fields_of(feature):
        raise DataError([f"--categories: expected objects with a category; {mask_column} in {name} has masks."])
    if are_label_images:
        column = rows[mask_column]

        def mask_of(index: int) -> tuple[str, Callable[[], np.ndarray]]:
            row = f"{name}, row {index}"
            return row, lambda: label_image(column[index], row)

        labels, notes = interpret_masks([mask_of(index) for index in range(len(rows))], labels)
        read_objects = partial(with_labels, labels=labels)
    elif is_list_of(feature, datasets.Image):
        read_objects = with_masks
    else:
        read_objects = partial(with_annotations, names=class_names(feature), chosen=categories)
    sources: list[Source] = [
        Row(f"{name}, row {index}", rows, index, image_column, mask_column, reading, read_objects, group, turn_masks)
        for index, group in enumerate(groups)
    ]
    if not sources:
        raise DataError([f"{name}: has no rows."])
    return SourceList(sources, notes=notes)


def groups_of(column: str | None, rows: Any, name: str, datasets: Any) -> list[str | None]:
    """Returns the group of each row, None without a column.

    Raises:
        DataError: If there is no such column, or it has no value for a row.
    """
    if column is None:
        return [None] * len(rows)
    known = [each for each, kind in rows.features.items() if isinstance(kind, datasets.Value | datasets.ClassLabel)]
    if column not in known:
        raise DataError([f"--group-column {column}: expected a column of text or numbers, one of {', '.join(known)}."])
    values = list(rows[column])
    if problems := [f"{name}, row {row}: has no {column}." for row, value in enumerate(values) if value is None]:
        raise DataError(problems)
    return [str(value) for value in values]


def columns_of(settings: DatasetSettings, features: Mapping[str, Any], datasets: Any) -> tuple[str, str]:
    """Returns the columns of images and objects.

    Raises:
        DataError: If there are none of such a kind.
    """
    known = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    image, mask = settings.image_column, settings.mask_column
    if not isinstance(features.get(image), datasets.Image):
        raise DataError([f"--image-column {image}: expected a column of images, one of {known}."])
    if mask is None:
        usual = [name for name in MASK_COLUMNS if name in features and holds_objects(features[name], datasets)]
        if len(usual) != 1:
            raise DataError([f"--dataset {settings.path}: expected --mask-column, one of {known}."])
        mask = usual[0]
    if mask not in features or not holds_objects(features[mask], datasets):
        expected = "label images, lists of masks, or objects with segmentation"
        raise DataError([f"--mask-column {mask}: expected {expected}; got {known}."])
    return image, mask


def holds_objects(feature: Any, datasets: Any) -> bool:
    """Whether a column may say where objects are."""
    fields = fields_of(feature)
    is_image = isinstance(feature, datasets.Image) or is_list_of(feature, datasets.Image)
    return is_image or is_array(feature, datasets) or "segmentation" in fields


def inner(feature: Any) -> Any:
    """The feature of a list's elements; None if it is no list."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def is_list_of(feature: Any, kind: type) -> bool:
    """Whether a feature is a list of one kind."""
    return isinstance(inner(feature), kind)


def is_array(feature: Any, datasets: Any) -> bool:
    """Whether a feature is a two-dimensional array of numbers."""
    element = inner(inner(feature))
    return isinstance(feature, datasets.Array2D) or (isinstance(element, datasets.Value) and "int" in element.dtype)


def fields_of(feature: Any) -> Mapping[str, Any]:
    """The fields of objects: of a list of structures, or a structure of lists."""
    element = inner(feature) if inner(feature) is not None else feature
    return element if isinstance(element, Mapping) else {}


def class_names(feature: Any) -> list[str] | None:
    """The names of the objects' categories, where the column has them."""
    fields = fields_of(feature)
    category = next((fields[name] for name in ("category", "category_id", "label") if name in fields), None)
    while inner(category) is not None:
        category = inner(category)
    return getattr(category, "names", None)


def undecoded(feature: Any, datasets: Any) -> Any:
    """The feature with images as files, for our own decoder."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if is_list_of(feature, datasets.Image):
        return (
            [datasets.Image(decode=False)]
            if isinstance(feature, list)
            else type(feature)(datasets.Image(decode=False))
        )
    return feature


@dataclass(eq=False)
class Row(Source):
    """A row of a data set, whose images are not decoded yet."""

    name: str
    rows: Any
    index: int
    image_column: str
    mask_column: str
    reading: ImageReading
    read_objects: Callable[..., LabelledImage]
    group: str | None = None
    turn_masks: bool = False

    def read(self) -> LabelledImage:  # noqa: D102, as in Source
        def read_both(file: Path) -> tuple[Pixels, np.ndarray]:
            pixels = read_pixels(file, self.reading)
            return pixels, rgb_of(pixels, self.reading, file)

        row = self.rows[self.index]
        pixels, image = from_file(row[self.image_column], self.name, read_both)
        whole = self.read_objects(image, row[self.mask_column], self.name)
        labels = Pixels(whole.labels)
        if note := turn_with_image(labels, pixels, self.turn_masks):
            whole.notes[note] = 1
        return replace(whole, labels=labels.values)


def from_file(value: Any, name: str, read: Callable[[Path], Read]) -> Read:
    """Returns what `read` reads from an undecoded image.

    Raises:
        ValueError: If it cannot be read: in one line that begins with `name`.
    """
    if not isinstance(value, Mapping) or not (value.get("bytes") or value.get("path")):
        raise ValueError(f"{name}: has no image.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(value["path"] or "")
        if value.get("bytes"):
            is_tiff = value["bytes"][:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
            file = Path(folder) / ("image.tif" if is_tiff else "image.png")  # others are told by their content
            file.write_bytes(value["bytes"])
        try:
            return read(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {str(error).removeprefix(f'{file}: ')}") from error


def label_image(value: Any, name: str) -> np.ndarray:
    """Returns the numbers (H, W) of a mask: of an image, or of an array.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, Mapping):
        return from_file(value, name, read_mask)
    try:
        mask = np.asarray(value)
    except ValueError:
        mask = np.zeros(0)
    if mask.ndim != 2 or mask.dtype.kind not in "biu":
        raise ValueError(f"{name}: expected a mask (H, W) of integers, got {shortened(value)}.")
    return mask


def with_labels(image: np.ndarray, value: Any, name: str, labels: LabelReading) -> LabelledImage:
    """Returns an image with the objects of a label image."""
    try:
        return LabelledImage(image, labels.objects(label_image(value, name)))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def with_masks(image: np.ndarray, value: Any, name: str) -> LabelledImage:
    """Returns an image with an object for each mask that is not empty."""
    size = image.shape[0], image.shape[1]

    def masks() -> Iterator[tuple[int, np.ndarray]]:
        for number, each in enumerate(value or [], start=1):
            mask = from_file(each, f"{name}, mask {number}", read_mask)
            if mask.shape != size or len(np.unique(mask[mask > 0])) > 1:
                raise ValueError(
                    f"{name}, mask {number}: expected one object in {size[1]} x {size[0]} pixels, got "
                    f"{mask.shape[1]} x {mask.shape[0]} with the values {np.unique(mask)[:5]}."
                )
            yield number, mask > 0

    labels = layers_of(masks(), size, len(value or []))
    empty = len(value or []) - np.count_nonzero(np.unique(labels))
    return LabelledImage(image, labels, left_out=Counter({"masks are left out: they are empty": empty}))


def with_annotations(
    image: np.ndarray, value: Any, name: str, names: list[str] | None, chosen: list[str]
) -> LabelledImage:
    """Returns an image with objects that are given as in COCO: a list of structures, or a structure of lists."""
    if isinstance(value, Mapping):
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    annotations, left_out = [], Counter[str]()
    for number, each in enumerate(value or [], start=1):
        key = identity(next((each[key] for key in ("category", "category_id", "label") if key in each), None))
        category = names[int(key)] if names and key and key.isdigit() and int(key) < len(names) else key
        if reason := reason_to_skip(each, category, chosen):
            left_out[f"annotations are left out: they {reason}"] += 1
        else:
            annotations.append(Annotation(f"object {number}", each["segmentation"], category))
    labelled = with_objects(image, annotations, name)
    labelled.left_out += left_out
    return labelled
