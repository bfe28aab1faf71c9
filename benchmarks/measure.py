"""Measures time and peak memory of one implementation at one task, and prints them as JSON.

python -m benchmarks.measure --implementation split --task lora
"""

import argparse
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SamConfig, SamModel, set_seed

from checkpoint_tools.checkout import split_class


# folded, tiled: the split model on this path of attention
IMPLEMENTATIONS = ("stock-eager", "stock-sdpa", "split", "folded", "tiled", "products")
PEER = "stock-sdpa"  # what the others are compared with
TASKS = ("encoder", "lora", "lora-checkpointing")
SIZES = {
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_dim": 4096}
    | {"global_attn_indexes": [5, 11, 17, 23]},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
    | {"global_attn_indexes": [7, 15, 23, 31]},
}


def main() -> None:
    args = parse_args()
    set_seed(0)
    limit_memory(args.device)
    step, _ = build_step(args)
    if args.implementation == "products":
        products = MatrixProducts()
        with products:
            step()
        step = products.replay(args.device)
    print(json.dumps(measure(step, args.device, args.repeats) or {"error": "out of memory"}))


def measure(step: Callable[[], None], device: str, repeats: int) -> dict[str, float]:
    """Returns the seconds of the fastest repetition, and the gigabytes of the peak; nothing if memory is too small."""
    memory = PeakMemory(device)
    seconds = []
    try:
        for _ in range(1 + repeats):  # the first is the warm-up, which counts for memory only
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        return {}
    return {"seconds": min(seconds[1:] or seconds), "gigabytes": memory.peak() / 1e9}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--side", type=int, default=1024, help="image side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per step (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=1, help="timed steps; the fastest counts (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def build_step(args: argparse.Namespace) -> tuple[Callable[[], None], Any]:
    """Returns the step to measure and its model: the encoder without gradients, or forward and backward with LoRA."""
    model = build_model(args)
    if args.task == "encoder":
        return encoder_step(model, args), model
    if args.task == "lora-checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return lora_step(adapt(model), args), model


def build_model(args: argparse.Namespace) -> Any:
    """Returns a model of random weights."""
    parts = {"image_size": args.side, "patch_size": 16}
    config = SamConfig(
        vision_config=SIZES[args.model] | parts,
        prompt_encoder_config=parts,
        attn_implementation="eager" if args.implementation == "stock-eager" else "sdpa",
    )
    model_class = SamModel if args.implementation.startswith("stock") else split_class()
    with torch.device(args.device):
        model = randomize(model_class(config)).eval().to(getattr(torch, args.dtype))
    if args.implementation in ("folded", "tiled"):
        take_path(model, args.implementation)
    return model


def adapt(model: Any) -> Any:
    """Returns a `PeftModel` with LoRA on queries and values; on all three where they are fused."""
    targets = ["qkv"] if type(model) is SamModel else ["q", "v"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.1, task_type="FEATURE_EXTRACTION")
    return get_peft_model(model, lora).train()


def encoder_step(model: Any, args: argparse.Namespace) -> Callable[[], None]:
    """Returns the encoder without gradients, on a batch of random images."""
    pixel_values = random_images(args)
    return lambda: model.get_image_embeddings(pixel_values)


def lora_step(model: Any, args: argparse.Namespace) -> Callable[[], None]:
    """Returns forward and backward of the whole model, on a batch of random images with a point each."""
    pixel_values = random_images(args)
    input_points = pixel_values.new_full((args.batch, 1, 1, 2), args.side / 2)

    def step() -> None:
        model(pixel_values=pixel_values, input_points=input_points).pred_masks.square().mean().backward()
        model.zero_grad()

    return step


def random_images(args: argparse.Namespace) -> torch.Tensor:
    """Returns pixel values (batch, 3, side, side) as a processor would give them."""
    return torch.randn(args.batch, 3, args.side, args.side, device=args.device).to(getattr(torch, args.dtype))


def take_path(model: Any, path: str) -> None:
    """Makes attention take `path` in this process, on any device."""
    attention = sys.modules[type(model).__module__.replace("modeling_", "attention_")]
    attention.attention_path = lambda query: path  # type: ignore[attr-defined]


def randomize(model: Any) -> Any:
    """Gives the vision encoder weights as large as trained ones; initial ones are about 1e-10, and `rel_pos` is 0."""
    with torch.no_grad():
        for name, parameter in model.vision_encoder.named_parameters():
            if parameter.dim() > 1 or "rel_pos" in name:
                parameter.normal_(std=0.02)
    return model


class MatrixProducts(TorchDispatchMode):
    """Records the shapes of all matrix products of a step. To run these alone is a lower bound for its time."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.shapes.append((args[0].shape, args[1].shape))
        elif name in ("addmm", "baddbmm", "baddbmm_"):
            self.shapes.append((args[1].shape, args[2].shape))
        elif name.startswith("_scaled_dot_product") and "backward" not in name:
            query, key, value = (tensor.flatten(0, 1) for tensor in args[:3])
            self.shapes.append((query.shape, key.mT.shape))
            self.shapes.append(((*query.shape[:2], key.shape[1]), value.shape))
        elif name == "convolution":  # forward only, as an image-to-column product
            _, channels, *kernel = args[1].shape
            batch, out_channels, height, width = output.shape
            inner = channels * kernel[0] * kernel[1]
            self.shapes.append(((batch * height * width, inner), (inner, out_channels)))
        return output

    def replay(self, device: str) -> Callable[[], None]:
        """Returns a function that runs all recorded products, with one pair of operands for each shape."""
        operands = {}
        for shapes in set(self.shapes):
            first, second = (torch.randn(shape, device=device) for shape in shapes)
            operands[shapes] = first, second, first @ second

        def run() -> None:
            for shapes in self.shapes:
                first, second, output = operands[shapes]
                torch.matmul(first, second, out=output)

        return run


class PeakMemory:
    """Peak memory above what was in use at the start: resident memory, or memory allocated by torch on CUDA."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = self._resident("VmRSS")

    def peak(self) -> int:
        """Returns the peak so far, in bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def limit_memory(device: str) -> None:
    """Makes a step that does not fit raise an error, so that Linux does not kill a process."""
    if device == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        resource.setrlimit(resource.RLIMIT_DATA, (available, available))


if __name__ == "__main__":
    main()
