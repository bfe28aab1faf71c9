"""Measures what the check of many files costs, and what a part of a large image costs in training.

python -m benchmarks.data_reading --files 2000 --side 256

Both are CPU times of one thread. The check runs in processes of its own, for a tenth of the files and for all; memory
that grows from one to the other would be that of files which are kept.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint_tools.checkout import ROOT, SAM_TINY
from finetuning.prompts import ItemEncoder, Prompts, TrainingSet
from image_data.folders import FilePair
from image_data.samples import CACHE, Sample, areas_of
from segmentation.adapted_model import load_base


MASK_SIDE = 256
REPEATS = 5


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| files | CPU time of the check | peak memory |\n|---|---|---|")
        for number in (args.files // 10, args.files):
            data = folder / str(number)
            for index in tqdm(range(number), "Writing", leave=False):
                write_pair(data, index, args.side)
            seconds, gigabytes = check(data, folder / f"output{number}")
            print(f"| {number:,} of {args.side} x {args.side} pixels | {seconds:.1f} s | {gigabytes:.2f} GB |")
        image, mask = write_pair(folder / "large", 0, args.large_side)
        decoding = cpu_seconds(lambda _: np.asarray(Image.open(image).convert("RGB")))
        cropping = cropping_seconds(FilePair(image, mask))
    share = f"{cropping:.2f} s, {cropping / decoding:.2f} of Pillow's {decoding:.2f} s to decode the JPEG"
    print(f"\nA part of {args.large_side} x {args.large_side} pixels: {share}.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_reading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=int, default=2000, help="images to check")
    parser.add_argument("--side", type=int, default=256, help="their pixels along a side")
    parser.add_argument("--large-side", type=int, default=5000, help="pixels along a side of the large image")
    return parser.parse_args()


def write_pair(folder: Path, index: int, side: int) -> tuple[Path, Path]:
    """Writes a JPEG of smooth noise and a PNG mask of 400 squares, and returns their paths."""
    image, mask = folder / "images" / f"{index}.jpg", folder / "masks" / f"{index}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(index).integers(0, 256, (side // 10, side // 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((side, side)).save(image)
    number, place = np.divmod(np.arange(side) * 20 / side, 1)
    shown = (place > 0.2) & (place < 0.8)
    labels = np.where(shown[:, None] & shown, 1 + 20 * number[:, None] + number, 0)
    Image.fromarray(labels.astype(np.uint16)).save(mask)
    return image, mask


def check(data: Path, output: Path) -> tuple[float, float]:
    """Returns the CPU time in seconds and the peak memory in GB of `finetune.py --check`."""
    options = ["--images", data / "images", "--masks", data / "masks", "--min-area", "0", "--output", output]
    process = subprocess.Popen(
        [sys.executable, ROOT / "finetune.py", "--check", *map(str, options)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"finetune.py failed on {data}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def cropping_seconds(source: FilePair) -> float:
    """Returns what `TrainingSet.crop` costs for an image that is in memory."""
    labels = CACHE.read(source).labels
    sample = Sample(source, (slice(0, labels.shape[0]), slice(0, labels.shape[1])), areas_of(labels)[0])
    items = TrainingSet([sample], ItemEncoder(load_base(str(SAM_TINY))[1], MASK_SIDE, Prompts()), 9)
    return cpu_seconds(lambda number: items.crop(sample, np.random.default_rng(number)))


def cpu_seconds(action: Callable[[int], object]) -> float:
    """Returns the mean CPU time of an action that takes a number."""
    started = time.process_time()
    for number in range(REPEATS):
        action(number)
    return (time.process_time() - started) / REPEATS


if __name__ == "__main__":
    main()
