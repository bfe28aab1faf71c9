"""An image that a user has opened: encoded once, it answers any number of prompts."""

from pathlib import Path

import numpy as np

from image_data.images import read_image
from image_data.tiles import Window
from segmentation.automatic import Candidates
from segmentation.predictor import EncodedImage, ObjectPrompts
from segmentation.segmenter import ImageSegmenter, PromptedObject
from segmentation.segments import Segment
from segmentation.settings import SegmentationSettings

from .model import SharedModel
from .screen_scaling import fitted


OPTIONS = " (Options of app.py and segment.py.)"
MAX_ENCODED = 8  # windows of an image; those of ViT-B take 4 MB each


class OpenImage:
    """Pixels, and what the model makes of them.

    Args:
        model: The model of all users.
        pixels: (H, W, 3) uint8.
        name: The file's name.
    """

    def __init__(self, model: SharedModel, pixels: np.ndarray, name: str) -> None:
        self.model, self.pixels, self.name = model, pixels, name
        self.size = pixels.shape[:2]
        self.fitted = fitted(pixels)  # as large as the page shows it
        self.tiles = ImageSegmenter(model.predictor, pixels, model.settings)
        self._encoded: dict[tuple[int | bool, ...], EncodedImage] = {}
        if len(self.tiles.windows) == 1:  # else it depends on the prompt which tile is needed
            self.encoded(self.tiles.windows[0])

    def encoded(self, window: Window, adapted: bool = True) -> EncodedImage:
        """Returns a window of the image as the encoder sees it, with the adapter or without."""
        key = (*(edge for part in window for edge in (part.start, part.stop)), adapted)
        if key not in self._encoded:
            self._encoded[key] = self.model.encode(self.pixels[window], adapted)
            for oldest in list(self._encoded)[:-MAX_ENCODED]:
                del self._encoded[oldest]
        return self._encoded[key]

    def masks(self, prompts: PromptedObject, adapted: bool = True) -> list[Segment]:
        """Returns the three masks of an object, and the single one."""
        window = self.tiles.window_of(prompts)
        top, left = window[0].start, window[1].start
        masks = self.model.decode(self.encoded(window, adapted), in_window(prompts, left, top), adapted)
        return [mask.moved(top, left) for mask in masks]

    def candidates(self, settings: SegmentationSettings, adapted: bool = True) -> list[tuple[Window, Candidates]]:
        """Returns what a grid of points finds in each tile."""
        return [
            (window, self.model.find(self.encoded(window, adapted), settings, adapted))
            for window in self.tiles.windows
        ]


def in_window(prompts: PromptedObject, left: float, top: float) -> ObjectPrompts:
    """Returns the points and the box of an object as the model takes them, in pixels of a window."""
    points = [[(x - left, y - top) for x, y in prompts.points]] if prompts.points else None
    boxes = None if prompts.box is None else [np.subtract(prompts.box, (left, top) * 2).tolist()]
    return ObjectPrompts(points=points, labels=[prompts.labels] if points and prompts.labels else None, boxes=boxes)


def open_file(model: SharedModel, path: Path, name: str | None = None) -> OpenImage:
    """Reads an image file as `segment.py` does, and encodes it.

    Args:
        model: The model of all users.
        path: The file.
        name: What users know it by; None for the name of the file.

    Raises:
        ValueError: If it cannot be read, or is too large.
    """
    name = name or path.name
    try:
        return OpenImage(model, read_image(path, model.settings.reading), name)
    except ValueError as error:
        message = str(error).replace(str(path), name)
        if not message.startswith(name):
            message = f"{name}: {message}"
        raise ValueError(f"{message}{OPTIONS if '--' in message else ''}") from error
