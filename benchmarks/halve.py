"""Cuts an image and its labels into a left half to train on and a right half to evaluate on, as TIFF files.

python -m benchmarks.halve build/stardist/img2d.tif build/stardist/mask2d.tif build/halves
"""

import argparse
from pathlib import Path

import numpy as np
import tifffile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("folder", type=Path, help="where train/ and test/ are written")
    args = parser.parse_args()
    for name, file in (("images", args.image), ("masks", args.labels)):
        for part, half in zip(("train", "test"), np.array_split(tifffile.imread(file), 2, axis=1), strict=True):
            (args.folder / part / name).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(args.folder / part / name / args.image.name, half)


if __name__ == "__main__":
    main()
