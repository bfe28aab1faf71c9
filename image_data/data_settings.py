"""The settings of images and objects: where they come from, how they are read, and how they are divided."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from .decoding import MAX_PIXELS, DataError, ImageReading
from .labels import LabelReading
from .setting_checks import SettingsError, require_at_least, require_share
from .source_settings import SourceSettings


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
        default=None, help="each if every page of a file is an image, or the number of a page, from 1"
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
        default=None, help="each number in a mask is an object, or each connected part of one"
    )
    threshold: int | None = HfArg(default=None, help="lowest value of an object, in masks with soft edges")
    turn_masks: bool = HfArg(default=False, help="turn masks with their images, as the images' EXIF orientation says")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.image_reading, self.label_reading  # raise errors
        if "none" in self.augment and len(self.augment) > 1:
            raise SettingsError(f"--augment {' '.join(self.augment)}: expected none, or others.")
        if self.pages == "each" and (self.coco or self.dataset):
            raise DataError(
                [
                    "--pages each: expected --masks, with a page for each page of the images. For --coco and "
                    "--dataset, save each page as a file of its own."
                ]
            )
        self._refuse_idle_labels()
        require_share(self, "validation", above_0=True)
        if self.validation and (self.validation_images or self.validation_coco or self.validation_split):
            raise SettingsError("--validation is a share of the images, and --validation-... are given: expected one.")
        if not 0 <= self.overlap <= 0.9:
            raise SettingsError(f"--overlap {self.overlap}: expected a share from 0 to 0.9.")
        require_at_least(1, self, "tile")
        require_at_least(0, self, "min_area")

    def _refuse_idle_labels(self) -> None:
        """Raises an error for a setting of masks that would change nothing."""
        given = self.label_reading.given
        has_masks = self.masks or self.validation_masks or self.test_masks
        if (given or self.turn_masks) and self.coco and not has_masks:
            raise DataError([f"--{[*given, 'turn-masks'][0]}: expected --masks, and COCO annotations have none."])
        numbers = [name for name in given if name != "threshold"]
        if numbers and self.has_file_per_object:
            raise DataError([f"--{numbers[0]}: a * in --mask-pattern stands for files of one object each."])
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
