"""Compares all paths of attention on a CUDA device: time and memory of the encoder and of a LoRA step.

python -m benchmarks.bench --device cuda
"""

import argparse
import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .measure import PEER, adapt, build_model, encoder_step, lora_step, measure


PATHS = ("stock-eager", PEER, "tiled", "folded")
TITLES = {"encoder": "encoder", "lora": "LoRA step"}
BATCHES = (1, 8)
DTYPES = ("bfloat16", "float32")
REPEATS = 3


def paths(models: list[str], side: int, file: Path) -> str:
    """Returns a table of all dtypes and batch sizes of `models` on all paths. Writes each result to `file` at once."""
    rows: dict[tuple, dict[str, dict[str, float]]] = {}
    cases = itertools.product(models, DTYPES, PATHS)
    with file.open("w") as lines:
        for model, dtype, path in tqdm([*cases], desc="paths"):
            for task, batch, result in results(model, side, dtype, path):
                rows.setdefault((model, dtype, task, batch), {})[path] = result
                case = {"model": model, "dtype": dtype, "task": task, "batch": batch, "path": path}
                print(json.dumps(case | result), file=lines, flush=True)
    return table(rows)


def results(model_name: str, side: int, dtype: str, path: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yields task, batch size and result of one model, in this process: CUDA's allocator counts its own peak."""
    args = argparse.Namespace(implementation=path, model=model_name, dtype=dtype, side=side, device="cuda")
    model: Any = build_model(args)
    for task, prepare in (("encoder", encoder_step), ("lora", lora_step)):
        model = adapt(model) if task == "lora" else model
        for args.batch in BATCHES:
            yield task, args.batch, measure(prepare(model, args), args.device, REPEATS)
            model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()


def table(rows: dict[tuple, dict[str, dict[str, float]]]) -> str:
    """Returns Markdown: time and peak memory, those of stock sdpa in absolute numbers, the others as its multiples."""
    lines = ["| | " + " | ".join(PATHS) + " |", "|---" * (len(PATHS) + 1) + "|"]
    for (model, dtype, task, batch), row in sorted(rows.items(), key=lambda item: item[0][2]):
        cells = [cell(row[path], row[PEER], path == PEER) for path in PATHS]
        lines.append(f"| {TITLES[task]}, ViT-{model[0].upper()}, {dtype}, batch {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(result: dict[str, float], peer: dict[str, float], is_peer: bool) -> str:
    if not result:
        return "out of memory"
    if is_peer or not peer:
        return f"{1e3 * result['seconds']:.0f} ms, {result['gigabytes']:.1f} GB"
    return f"{result['seconds'] / peer['seconds']:.2f}, {result['gigabytes'] / peer['gigabytes']:.2f}"
