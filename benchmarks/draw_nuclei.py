"""Draws a folder of fluorescence-like images of nuclei, with masks: a stranger's data for finetune.py and evaluate.py.

python -m benchmarks.draw_nuclei build/nuclei
"""

import argparse
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage
from tqdm import tqdm


def main() -> None:
    args = parse_args()
    for part, number in (("train", args.train), ("test", args.test)):
        for folder in ("images", "masks"):
            (args.folder / part / folder).mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(number), desc=part):
            image, labels = draw(np.random.default_rng([part == "test", index]), args.side)
            tifffile.imwrite(args.folder / part / "images" / f"{index:02}.tif", image)
            tifffile.imwrite(args.folder / part / "masks" / f"{index:02}.tif", labels)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.draw_nuclei",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where train/ and test/ are written")
    parser.add_argument("--train", type=int, default=10, help="images to learn from")
    parser.add_argument("--test", type=int, default=4, help="images to evaluate on")
    parser.add_argument("--side", type=int, default=256, help="pixels along a side of an image")
    return parser.parse_args()


def draw(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (side, side) of 12 bits in 16, and its labels: ellipses that touch, of uneven light, with noise."""
    rows, columns = np.mgrid[:side, :side]
    labels, light = np.zeros((side, side), np.uint16), np.full((side, side), 0.08)
    for number in range(1, int(rng.integers(25, 40))):
        row, column = rng.uniform(0, side, 2)
        radii, angle = rng.uniform(9, 18, 2), rng.uniform(0, np.pi)
        down, right = rows - row, columns - column
        along, across = right * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - right * np.sin(angle)
        inside = (along / radii[0]) ** 2 + (across / radii[1]) ** 2 < 1
        if np.count_nonzero(inside & (labels > 0)) > 0.1 * np.count_nonzero(inside):
            continue
        inside &= labels == 0
        labels[inside] = number
        light[inside] = rng.uniform(0.3, 1)
    texture = ndimage.gaussian_filter(rng.standard_normal((side, side)), 3)
    blurred = ndimage.gaussian_filter(light * (1 + 1.5 * texture), 1.2)
    return (rng.poisson(np.clip(blurred, 0, None) * 150) * 12).astype(np.uint16), labels


if __name__ == "__main__":
    main()
