"""The settings of images and objects: where they come from, how they are read, and how they are divided."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from checkpoint_tools.option_checks import LEAST_TILE_SIDE, SettingsError, default_of, require_at_least, require_share

from .labels import LabelReading
from .patterns import Pattern
from .pillow_images import MAX_PIXELS, DataError, ImageReading


@dataclass
class SourceSettings:
    """Files, folders or a data set, and which of their images are for training, validation and test.

    Raises:
        DataError: If two settings contradict each other, or one lacks another.
    """

    _argument_group_name: ClassVar[str] = "data"

    images: Path | None = HfArg(
        default=None,
        help="folder of PNG, JPEG, TIFF, BMP or WebP images, with its subfolders (a photo of coins)",
    )
    masks: Path | None = HfArg(default=None, help="folder of PNG, TIFF, BMP or WebP masks, named like the images")
    coco: Path | None = HfArg(
        default=None, help="COCO annotations of the images, instead of masks: a file, or a folder with train*.json ..."
    )
    image_pattern: str | None = HfArg(default=None, help="which files are images, as in {stem}_img.png (all)")
    mask_pattern: str | None = HfArg(
        default=None, help="how masks are named, as in {stem}_mask.png; {stem}/*.png if each file is one object"
    )
    color_masks: bool = HfArg(default=False, help="each colour in the masks but black is an object")
    categories: list[str] = HfArg(default_factory=list, help="names of the COCO categories to use (all)")
    group_pattern: str | None = HfArg(
        default=None, help="names of images that must not be divided, as in {group}_* or {group}/*"
    )
    validation_images: Path | None = HfArg(
        default=None, help="folder of images to validate on, instead of a share of --images"
    )
    validation_masks: Path | None = HfArg(default=None, help="masks of --validation-images")
    validation_coco: Path | None = HfArg(default=None, help="COCO annotations of --validation-images, or --images")
    test_images: Path | None = HfArg(default=None, help="folder of images to test on, once, after training")
    test_masks: Path | None = HfArg(default=None, help="masks of --test-images")
    test_coco: Path | None = HfArg(default=None, help="COCO annotations of --test-images, or --images")

    dataset: str | None = HfArg(
        default=None, help="Hub id, folder or Parquet file of the datasets library, instead of images and masks"
    )
    dataset_config: str | None = HfArg(default=None, help="configuration of the data set, if it has several")
    dataset_revision: str | None = HfArg(default=None, help="branch, tag or commit of the data set, on the Hub")
    image_column: str = HfArg(default="image", help="column of the data set with the images")
    mask_column: str | None = HfArg(
        default=None,
        help="column with label images, lists of masks, or objects as in COCO (the one with a usual name)",
    )
    group_column: str | None = HfArg(
        default=None, help="column of the data set that says which images must not be divided, such as the patient"
    )
    split: str | None = HfArg(default=None, help="split to train on (train, or the only one)")
    validation_split: str | None = HfArg(default=None, help="split to validate on (validation, if there is one)")
    test_split: str | None = HfArg(default=None, help="split to test on (test, if there is one)")

    def __post_init__(self) -> None:
        if self.coco and self.masks:
            raise DataError(["--masks and --coco are both given: expected one of them."])
        self._check_dataset()
        if bool(self.images) != bool(self.coco or self.masks):
            raise DataError(["expected --images together with --masks or --coco, or none of them for the coins."])
        for name in ("image_pattern", "mask_pattern", "color_masks"):
            if getattr(self, name) and not self.masks:
                raise DataError([f"--{name.replace('_', '-')}: expected --masks, too."])
        if self.categories and not (self.coco or self.dataset):
            raise DataError(["--categories: expected --coco or --dataset, too."])
        for option, field in (("image-pattern", "stem"), ("mask-pattern", "stem"), ("group-pattern", "group")):
            if (text := getattr(self, option.replace("-", "_"))) is not None:
                Pattern(text, field, f"--{option}")
        if self.color_masks and self.has_file_per_object:
            raise DataError(
                ["--color-masks: expected a --mask-pattern without *, which stands for files of one object each."]
            )
        for part in ("validation", "test"):
            self._check_part(part)

    @property
    def has_file_per_object(self) -> bool:
        """Whether each mask file is one object."""
        return self.mask_pattern is not None and Pattern(self.mask_pattern).is_of_several

    @property
    def paths(self) -> list[Path]:
        """All files and folders that are read."""
        return [value for name in SourceSettings.__annotations__ if isinstance(value := getattr(self, name), Path)]

    def _check_dataset(self) -> None:
        """Raises an error if there are files beside a data set, or splits without one."""
        if self.dataset:
            if self.images or self.masks or self.coco:
                raise DataError(["--dataset: expected no --images, --masks or --coco."])
            if self.group_pattern:
                raise DataError(["--group-pattern is for names of files: expected --group-column with --dataset."])
            return
        columns = ("mask_column", "group_column")
        splits = ("split", "validation_split", "test_split")
        for name in ("dataset_config", "dataset_revision", *columns, *splits):
            if getattr(self, name):
                raise DataError([f"--{name.replace('_', '-')}: expected --dataset, too."])
        if self.image_column != default_of(self, "image_column"):
            raise DataError(["--image-column: expected --dataset, too."])
        if self.group_pattern and not self.images:
            raise DataError(["--group-pattern: expected --images, too."])

    def _check_part(self, part: str) -> None:
        """Raises an error if the files of a part are incomplete."""
        images, masks, coco = (getattr(self, f"{part}_{name}") for name in ("images", "masks", "coco"))
        if not (images or masks or coco):
            return
        if not self.images:
            raise DataError([f"--{part}-...: expected --images with --masks or --coco to train on, too."])
        if masks and coco:
            raise DataError([f"--{part}-masks and --{part}-coco are both given: expected one of them."])
        if not (coco or (images and masks)):
            raise DataError([f"expected --{part}-images together with --{part}-masks or --{part}-coco."])


@dataclass
class DataSettings(SourceSettings):
    """Images, the objects in them, how both are read, and how they are divided.

    Raises:
        SettingsError: If a setting is out of range, or two contradict each other.
    """

    _argument_group_name: ClassVar[str] = "data"

    validation: float | None = HfArg(
        default=None, help="share held out for validation (0.2 of the images, or 0.5 of a single image)"
    )
    tile: int | None = HfArg(default=None, help="cut larger images into tiles of this side, in pixels")
    overlap: float = HfArg(default=0.25, help="overlap of neighbouring tiles, as a share of the tile side")
    min_area: int = HfArg(default=4, help="leave out objects of fewer pixels in the predicted masks")
    augment: list[str] = HfArg(
        default_factory=lambda: ["turn"],
        help="a part of the image, mirrored (crop), and turned as well (turn); other brightness, contrast and gamma "
        "(intensity); out of focus (blur); or none",
        metadata={"choices": ("none", "crop", "turn", "intensity", "blur")},
    )
    channels: list[int] = HfArg(
        default_factory=list, help="numbers of the bands that are red, green and blue, from 1; one number for grey"
    )
    pages: str | None = HfArg(
        default=None, help="each, if every page of a file is an image; or the number of a page, from 1"
    )
    intensity: list[str] = HfArg(
        default_factory=lambda: ["percentile", "1", "99.8"],
        help="what becomes 0 and 255 of pixels that are not 8-bit: percentile LOW HIGH, min-max, or dtype",
    )
    max_pixels: int = HfArg(default=MAX_PIXELS, help="pixels of the largest image to decode")
    background: list[int] = HfArg(default_factory=list, help="numbers of the background in masks (0)")
    void: list[str] = HfArg(
        default_factory=list, help="numbers in masks of pixels without a label, which do not count; or none"
    )
    instances: Literal["labels", "components"] | None = HfArg(
        default=None, help="an object is each number in a mask (labels), or each connected part of one (components)"
    )
    threshold: int | None = HfArg(default=None, help="lowest number of an object, in masks with soft edges")
    turn_masks: bool = HfArg(default=False, help="turn masks with their images, as the images' EXIF orientation says")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.image_reading, self.label_reading  # raise errors
        if "none" in self.augment and len(self.augment) > 1:
            raise SettingsError(f"--augment {' '.join(self.augment)}: expected none alone, or others.")
        if self.pages == "each" and (self.coco or self.dataset):
            raise DataError(
                [
                    "--pages each: expected --masks, with a page for each page of the images. For --coco and "
                    "--dataset, save each page as a file of its own."
                ]
            )
        self._refuse_idle_labels()
        require_share(self, "validation", above_0=True)
        for part in ("images", "coco", "split"):
            if self.validation and getattr(self, f"validation_{part}"):
                raise SettingsError(f"--validation and --validation-{part} are both given: expected one of them.")
        if not 0 <= self.overlap <= 0.9:
            raise SettingsError(f"--overlap {self.overlap}: expected a share from 0 to 0.9.")
        require_at_least(LEAST_TILE_SIDE, self, "tile")
        require_at_least(0, self, "min_area")

    def _refuse_idle_labels(self) -> None:
        """Raises an error for a setting of masks that would change nothing."""
        given = self.label_reading.given
        has_masks = self.masks or self.validation_masks or self.test_masks
        if (given or self.turn_masks) and not (has_masks or self.dataset):
            why = "COCO annotations have no numbers." if self.coco else "those of the coins are known."
            raise DataError([f"--{[*given, 'turn-masks'][0]}: expected --masks; {why}"])
        numbers = [name for name in given if name != "threshold"]
        if numbers and self.has_file_per_object:
            raise DataError(
                [f"--{numbers[0]}: expected a --mask-pattern without *, which stands for files of one object each."]
            )
        if "threshold" in given and self.color_masks:
            raise DataError(["--threshold: colours have no order; expected masks of numbers, without --color-masks."])

    @property
    def image_reading(self) -> ImageReading:
        """How image files become RGB."""
        return ImageReading(tuple(self.channels) or None, self.pages, " ".join(self.intensity), self.max_pixels)

    @property
    def label_reading(self) -> LabelReading:
        """What the numbers in masks mean, as far as it is given.

        Raises:
            SettingsError: If `--void` is neither numbers nor `none`.
        """
        try:
            void = () if self.void == ["none"] else tuple(map(int, self.void)) or None
        except ValueError:
            raise SettingsError(f"--void {' '.join(self.void)}: expected numbers, or none.") from None
        return LabelReading(tuple(self.background) or None, void, self.instances, self.threshold, self.turn_masks)
