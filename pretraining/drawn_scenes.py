"""Procedurally drawn scenes with instance masks: the training and evaluation data of `sam-tiny`.

A scene is a textured background with several textured, partly overlapping shapes, seen under uneven light, with blur
and sensor noise. Nothing is read from disk, so a seed is all that is needed to draw the same data again.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset


SUPERSAMPLING = 2  # masks are drawn this much larger and reduced, for smooth outlines
MIN_VISIBLE_SHARE = 0.4  # objects hidden more than this are not used as targets


class DrawnScenes(Dataset):
    """Scene `i` of an endless, seeded series.

    Args:
        length: Number of scenes.
        seed: Scenes of different seeds are unrelated; equal seeds give equal scenes.
        image_size: Side of the square image in pixels.
        num_prompts: Objects asked for per scene; drawn with replacement when a scene shows fewer.
        difficulty: From 0, few objects in plain colours, to 1: up to a dozen objects, whose texture may be close to
            the background, under uneven light, with little contrast and much noise. Shapes, sizes and occlusion
            are of all kinds at any difficulty.
        ramp: Number of first scenes over which the difficulty grows from 0 to `difficulty`.
    """

    def __init__(
        self, length: int, seed: int, image_size: int, num_prompts: int, difficulty: float = 1.0, ramp: int = 0
    ):
        self.length = length
        self.seed = seed
        self.image_size = image_size
        self.num_prompts = num_prompts
        self.difficulty = difficulty
        self.ramp = ramp

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns `image` (3, H, W) uint8, `valid` (2,) the height and width that are not padding, and per prompt
        `masks` (P, H, W) bool, `points` (P, 2) and `boxes` (P, 4) in pixels, x before y."""
        rng = np.random.default_rng([self.seed, index])
        difficulty = self.difficulty * (min(1.0, index / self.ramp) if self.ramp else 1.0)
        while True:
            image, labels = draw_scene(rng, self.image_size, difficulty)
            height, width = self._crop(rng)
            image[height:], image[:, width:], labels[height:], labels[:, width:] = 0, 0, 0, 0
            counts = np.bincount(labels.ravel())
            objects = [label for label in range(1, len(counts)) if counts[label] >= (self.image_size // 14) ** 2]
            if objects:
                break
        chosen = rng.permutation(objects)[: self.num_prompts]
        chosen = np.concatenate([chosen, rng.choice(objects, self.num_prompts - len(chosen))])
        masks = labels[None] == chosen[:, None, None]
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1),
            "valid": torch.tensor([height, width]),
            "masks": torch.from_numpy(masks),
            "points": torch.from_numpy(np.stack([random_point(rng, mask) for mask in masks])),
            "boxes": torch.from_numpy(np.stack([bounding_box(mask) for mask in masks])),
        }

    def _crop(self, rng: np.random.Generator) -> tuple[int, int]:
        """Photographs are seldom square: the processor then pads the bottom or the right."""
        size = [self.image_size, self.image_size]
        if rng.random() < 0.4:
            size[rng.integers(2)] = int(self.image_size * rng.uniform(0.6, 1.0))
        return size[0], size[1]


def random_point(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A pixel (x, y) of `mask` (H, W), uniformly drawn."""
    rows, columns = np.nonzero(mask)
    pick = rng.integers(len(rows))
    return np.array([columns[pick], rows[pick]], dtype=np.float32)


def bounding_box(mask: np.ndarray) -> np.ndarray:
    """The tight box (x1, y1, x2, y2) of `mask` (H, W), both corners inside it."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()], dtype=np.float32)


def draw_scene(rng: np.random.Generator, size: int, difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene.

    Returns:
        The image (size, size, 3) uint8 and its instance labels (size, size) int64, 0 for background.
    """
    image = _texture(rng, size, size, difficulty)
    labels = np.zeros((size, size), dtype=np.int64)
    full_area = [0]
    alike = rng.random() < 0.25  # a scene of one kind of thing, as coins or cells are
    kind, look = rng.integers(len(_OUTLINES)), rng.integers(2**31)
    typical = rng.uniform(0.06, 0.16)
    for _ in range(rng.integers(2, 5 + int(8 * difficulty))):
        radius = size * (typical * rng.uniform(0.8, 1.25) if alike else 0.06 * 5 ** rng.random())
        mask = _outline_mask(rng, size, radius, kind if alike else rng.integers(len(_OUTLINES)))
        bounds = mask.getbbox()
        if bounds is None:
            continue
        mask = mask.crop(bounds)
        window = np.s_[bounds[1] : bounds[3], bounds[0] : bounds[2]]
        texture = _texture(np.random.default_rng(look) if alike else rng, mask.height, mask.width, difficulty)
        if rng.random() < 0.5:  # shaded like a body, or rimmed like a coin
            texture *= _shading(rng, mask, radius)
        alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255
        image[window] += (texture - image[window]) * alpha
        inside = alpha[..., 0] > 0.5
        labels[window][inside] = len(full_area)
        full_area.append(int(inside.sum()))
    visible_area = np.bincount(labels.ravel(), minlength=len(full_area))
    labels[(visible_area < MIN_VISIBLE_SHARE * np.array(full_area))[labels]] = 0  # still drawn, but never a target
    return _photograph(rng, image, difficulty), labels


def _ellipse(rng: np.random.Generator) -> np.ndarray:
    return _polar(np.ones(48)) * [1, rng.uniform(0.5, 1)]


def _circle(rng: np.random.Generator) -> np.ndarray:
    return _polar(np.ones(48))


def _rectangle(rng: np.random.Generator) -> np.ndarray:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, rng.uniform(0.3, 1)]


def _polygon(rng: np.random.Generator) -> np.ndarray:
    return _polar(rng.uniform(0.7, 1, rng.integers(3, 8)))


def _star(rng: np.random.Generator) -> np.ndarray:
    return _polar(np.tile([1, rng.uniform(0.4, 0.7)], rng.integers(4, 8)))


def _blob(rng: np.random.Generator) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    waves = sum(rng.normal() / k * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    return _polar(np.clip(1 + 0.3 * waves, 0.3, 1.6))


_OUTLINES = (_circle, _ellipse, _rectangle, _polygon, _star, _blob)


def _polar(radii: np.ndarray) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _outline_mask(rng: np.random.Generator, size: int, radius: float, kind: int | np.integer) -> Image.Image:
    outline = _OUTLINES[kind](rng) * radius
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outline = (outline @ rotation.T + rng.uniform(0, size, 2)) * SUPERSAMPLING
    mask = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    ImageDraw.Draw(mask).polygon([tuple(vertex) for vertex in outline], fill=255)
    return mask.reduce(SUPERSAMPLING)


def _shading(rng: np.random.Generator, mask: Image.Image, radius: float) -> np.ndarray:
    """A relief from the mask's own blurred outline, lit from a random side: factors (H, W, 1)."""
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(radius * rng.uniform(0.1, 0.4))), dtype=np.float32)
    slope_y, slope_x = np.gradient(np.pad(height, 1, mode="edge"))
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * slope_x + np.sin(angle) * slope_y)[1:-1, 1:-1]
    return np.clip(1 + rng.uniform(0.2, 0.8) * slope / (np.abs(slope).max() + 1e-6), 0, 2)[..., None]


def _texture(rng: np.random.Generator, height: int, width: int, difficulty: float) -> np.ndarray:
    """Two colours mixed by noise, stripes, a gradient or a grid: (H, W, 3) float32 in 0..255."""
    first, second = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    second = first + (second - first) * difficulty * rng.uniform(0, 0.8)
    pattern = rng.integers(5)
    ys, xs = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    angle, frequency = rng.uniform(0, np.pi), 1 / rng.uniform(8, 40)
    along = np.cos(angle) * xs + np.sin(angle) * ys
    mix: np.ndarray
    if pattern == 0:
        mix = np.zeros((height, width), dtype=np.float32)
    elif pattern == 1:
        cells = int(2 ** rng.uniform(2, 6))
        noise = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
        mix = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    elif pattern == 2:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * frequency * along)
    elif pattern == 3:
        mix = (along - along.min()) / max(height, width)
    else:
        across = np.cos(angle) * ys - np.sin(angle) * xs
        mix = ((np.floor(along * frequency) + np.floor(across * frequency)) % 2).astype(np.float32)
    return (first + (second - first) * mix[..., None]).astype(np.float32)


def _photograph(rng: np.random.Generator, image: np.ndarray, difficulty: float) -> np.ndarray:
    """Uneven light, loss of contrast and colour, blur and noise."""
    size = len(image)
    if rng.random() < 0.3:
        image = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    if rng.random() < 0.5:
        light = Image.fromarray((rng.random((3, 3)) * 255).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        image = image * (1 - 0.5 * difficulty * np.asarray(light, dtype=np.float32)[..., None] / 255)
    contrast = 1 - difficulty * rng.uniform(0, 0.5)
    image = image * contrast + rng.uniform(0, 255) * (1 - contrast)
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    noise = rng.normal(0, difficulty * rng.uniform(0, 10), (size, size, 1)).astype(np.float32)
    return np.clip(np.asarray(picture, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
