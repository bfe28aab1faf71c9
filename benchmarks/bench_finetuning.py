"""Compares cost and result of fine-tuning by what is trained. Runs finetune.py on the coins once per row.

python -m benchmarks.bench_finetuning --parts methods --steps 300
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from checkpoint_tools.checkout import ROOT


RECIPE = ROOT / "finetune.py"
PARTS = {
    "methods": {
        "LoRA, r=16, on q and v, and the whole decoder": [],
        "LoRA alone": ["--train-decoder", "none"],
        "the whole encoder and decoder": ["--method", "full"],
        "the same, learning rate 1e-3": ["--method", "full", "--learning-rate", "0.001"],
        "the whole decoder alone": ["--method", "decoder"],
    },
    "costs": {
        "all layers": [],
        "all layers, gradient checkpointing": ["--gradient-checkpointing"],
        "last 3 of 6 layers": ["--last-layers", "3"],
        "last layer": ["--last-layers", "1"],
    },
    "sides": {f"side {side}": ["--image-size", str(side)] for side in (96, 128, 192, 256)},
}


def main() -> None:
    args = parse_args()
    for part in args.parts:
        rows = {
            title: min((measure(args, options) for _ in range(args.rounds)), key=lambda run: run["cpu_seconds"])
            for title, options in tqdm(PARTS[part].items(), desc=part)
        }
        print(table(rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_finetuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=1, help="rounds; the fastest is reported")
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="more options of finetune.py")
    return parser.parse_args()


def measure(args: argparse.Namespace, options: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [sys.executable, str(RECIPE), "--output", str(output), "--steps", str(args.steps)]
        # one thread's CPU time: other programs hardly affect it
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.run(
            [*command, *options, *args.options], capture_output=True, text=True, check=False, env=environment
        )
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr}")
        return json.loads((output / "metrics.json").read_text())


def table(rows: dict[str, dict]) -> str:
    """Markdown; CPU time and memory as shares of the first row's."""
    first = next(iter(rows.values()))
    lines = [
        "| trained | weights trained | mean IoU before | after | CPU time per step | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for title, run in rows.items():
        time, memory = (run[key] / first[key] for key in ("cpu_seconds", "peak_gigabytes"))
        lines.append(
            f"| {title} | {run['trainable_parameters']:,} | {run['before']['iou']:.3f} | {run['after']['iou']:.3f} "
            f"| {time:.2f} | {memory:.2f} |"
        )
    seconds = first["cpu_seconds"] / first["steps"]
    return "\n".join(
        [*lines, "", f"Times and memory are shares of {seconds:.2f} s and {first['peak_gigabytes']:.2f} GB."]
    )


if __name__ == "__main__":
    main()
