"""Compares time and memory with stock SAM. Each measurement runs in a process of its own.

python -m benchmarks.bench --rounds 3
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from checkpoint_tools.checkout import ROOT

from .gpu import paths
from .measure import PEER, SIZES


# Gradient checkpointing is compared with stock's step without it: the time that the saved memory costs.
COMPARISONS = {
    "encoder": [("stock-eager", "encoder"), (PEER, "encoder"), ("split", "encoder"), ("products", "encoder")],
    "lora": [("stock-eager", "lora"), (PEER, "lora"), ("split", "lora"), ("products", "lora")],
    "lora-checkpointing": [(PEER, "lora"), ("split", "lora-checkpointing")],
}
TITLES = {
    "encoder": "encoder, no grad",
    "lora": "LoRA step",
    "lora-checkpointing": "LoRA step, gradient checkpointing",
}
GROWTH_SIDES = (512, 768, 1024, 1536, 2048)
PARTS = ("table", "growth", "sizes")
# On a CPU; with --device cuda, benchmarks/gpu.py measures all paths with sizes of batches and dtypes of its own.
CPU_DEFAULTS: dict[str, Any] = {
    "parts": PARTS,
    "batch": 1,
    "rounds": 3,
    "tasks": tuple(COMPARISONS),
    "dtype": "float32",
}


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        title = ", ".join(f"{key} {value}" for key, value in machine(args.device).items())
        models = [args.model] if args.model else list(SIZES)
        report = f"{title}\n\n{paths(models, args.side, args.output / 'gpu.jsonl')}"
        print(report)
        (args.output / "gpu.md").write_text(report + "\n")
        return
    vars(args).update({name: getattr(args, name) or default for name, default in CPU_DEFAULTS.items()})
    args.model = args.model or "base"
    file = args.output / "results.json"
    results: dict = json.loads(file.read_text()) if file.exists() else {}
    if results.get("machine") != machine(args.device):  # parts of one report come from one machine
        results = {"machine": machine(args.device)}
    for part in args.parts:
        results[part] = {"table": table, "growth": growth, "sizes": sizes}[part](args)
        file.write_text(json.dumps(results, indent=2) + "\n")
    if "growth" in results:
        draw(results["growth"], args.output / "growth.png")
    report = markdown(results)
    print(report)
    (args.output / "results.md").write_text(report + "\n")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=SIZES, help="(base; with --device cuda, all of them)")
    parser.add_argument("--side", type=int, default=1024, help="image side in pixels (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder for the results")
    group = parser.add_argument_group(
        "on a CPU",
        "With --device cuda, all paths of attention are measured instead, with both dtypes and batches.",
    )
    group.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure; other parts keep their results")
    group.add_argument("--batch", type=int, help="images per step (1)")
    group.add_argument("--rounds", type=int, help="rounds to report the medians of (3)")
    group.add_argument("--tasks", nargs="+", choices=COMPARISONS, help="(all)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="(float32)")
    args = parser.parse_args(arguments)
    for name in CPU_DEFAULTS:
        if getattr(args, name) is not None and args.device == "cuda":
            parser.error(f"--{name}: expected --device cpu; cuda measures all paths, as benchmarks/gpu.py says.")
    for name in ("side", "batch", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: expected 1 or more.")
    return args


def machine(device: str) -> dict[str, str]:
    """Returns what the numbers are measured on: device, threads, C library, allocator settings and versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    if device == "cuda":
        name = torch.cuda.get_device_name()
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    libc = " ".join(platform.libc_ver())
    return {"device": name, "threads": str(torch.get_num_threads()), "libc": libc, **allocator, **versions}


def measure(implementation: str, task: str, args: argparse.Namespace, **changes: str | int) -> dict[str, float]:
    """Runs `benchmarks.measure` in a new process. The result is empty if the step does not fit in memory."""
    options = {name: getattr(args, name) for name in ("model", "side", "batch", "device", "dtype")} | changes
    command = [sys.executable, "-m", "benchmarks.measure", "--implementation", implementation, "--task", task]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode in (-6, -9):  # aborted by an allocation in C++, or by the system
        return {}
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr}")
    result = json.loads(process.stdout.splitlines()[-1])
    return {} if "error" in result else result


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Measures medians over the rounds, by task and implementation. The implementations alternate."""
    pairs = sorted({pair for task in args.tasks for pair in COMPARISONS[task]})
    measurements: dict = {pair: [] for pair in pairs}
    for _, (implementation, task) in tqdm([(r, pair) for r in range(args.rounds) for pair in pairs], desc="table"):
        measurements[implementation, task].append(measure(implementation, task, args))
    tasks = {
        task: {
            implementation: {
                key: statistics.median(result[key] for result in measurements[implementation, measured])
                for key in ("seconds", "gigabytes")
            }
            if all(measurements[implementation, measured])
            else {}
            for implementation, measured in COMPARISONS[task]
        }
        for task in args.tasks
    }
    return {
        "model": args.model,
        "side": args.side,
        "batch": args.batch,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "tasks": tasks,
    }


def growth(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measures one LoRA step at each image side."""
    return {
        str(side): {
            implementation: measure(implementation, "lora", args, side=side, repeats=0)
            for implementation in (PEER, "split")
        }
        for side in tqdm(GROWTH_SIDES, desc="growth")
    }


def sizes(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Measures the larger models on images of 512 pixels, where stock's fit in memory, too."""
    return {
        f"ViT-{model[0].upper()}, {TITLES[task]}": {
            implementation: measure(implementation, task, args, model=model, side=512)
            for implementation in (PEER, "split")
        }
        for model, task in tqdm([(m, t) for m in ("large", "huge") for t in ("encoder", "lora")], desc="sizes")
    }


def markdown(results: dict[str, Any]) -> str:
    """Returns the tables of docs/cost.md."""
    lines = [", ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    if "table" in results:
        setting = results["table"]
        lines += [
            f"ViT-{setting['model'][0].upper()}, {setting['side']} x {setting['side']} pixels, "
            f"batch {setting['batch']}, {setting['dtype']}, medians of {setting['rounds']}:",
            "",
            "| | time | / stock sdpa | peak memory | / stock sdpa |",
            "|---|---|---|---|---|",
        ]
        for task, row in setting["tasks"].items():
            for implementation, result in row.items():
                label = {"products": "matrix products alone", "split": "sam-split"}.get(implementation, implementation)
                cells = _cells(result, row[PEER], has_memory=implementation != "products")
                lines.append(f"| {TITLES[task]}: {label} | {cells} |")
    for part, title in (("growth", "LoRA step, image side"), ("sizes", "512 x 512 pixels")):
        if part in results:
            lines += ["", f"| {title} | stock sdpa | sam-split |", "|---|---|---|"]
            for case, row in results[part].items():
                texts = [
                    f"{r['seconds']:.1f} s, {r['gigabytes']:.2f} GB" if r else "out of memory" for r in row.values()
                ]
                lines.append(f"| {case} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cells(result: dict[str, float], peer: dict[str, float], has_memory: bool) -> str:
    if not result:
        return "out of memory | | out of memory | "
    cells = []
    for key, unit, digits in (("seconds", "s", 1), ("gigabytes", "GB", 2)):
        known = has_memory or key == "seconds"
        cells.append(f"{result[key]:.{digits}f} {unit}" if known else "")
        cells.append(f"{result[key] / peer[key]:.2f}" if known and peer else "")
    return " | ".join(cells)


def draw(growth_by_side: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Plots time and memory against the image side. Steps that did not fit in memory are left out."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "gigabytes"), ("time (s)", "peak memory (GB)"), strict=True):
        for implementation, name in ((PEER, "stock sdpa"), ("split", "sam-split")):
            points = [
                (int(side), row[implementation][key]) for side, row in growth_by_side.items() if row[implementation]
            ]
            axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set(xlabel="image side (pixels)", ylabel=label, xticks=GROWTH_SIDES, ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
