"""Counts the kernels that a GPU would launch, without a GPU, on torch's meta device.

python -m benchmarks.kernels
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .measure import SIZES, build_step


COLUMNS: dict[str, tuple[str, int | None]] = {"stock sdpa": ("stock-sdpa", None), "folded": ("folded", None)} | {
    f"tiles of {megabytes} MB": ("tiled", megabytes * 2**20) for megabytes in (256, 8)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["base"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    print("| encoder / LoRA step | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    for model in args.models:
        for batch in args.batches:
            cells = [
                " / ".join(f"{count(*column, task=task, model=model, batch=batch):,}" for task in ("encoder", "lora"))
                for column in COLUMNS.values()
            ]
            print(f"| ViT-{model[0].upper()}, batch {batch} | {' | '.join(cells)} |", flush=True)


def count(implementation: str, tile_bytes: int | None, task: str, model: str = "base", batch: int = 1) -> int:
    """Returns the number of kernels of the encoder, or of a LoRA step, in bf16 on images of 1024 x 1024 pixels.

    Fused attention counts as one kernel forward and three backward. Views and allocations do not count.
    """
    step, built = build_step(
        argparse.Namespace(
            implementation=implementation,
            task=task,
            model=model,
            batch=batch,
            side=1024,
            device="meta",
            dtype="bfloat16",
        )
    )
    if tile_bytes is not None:
        built.config.attention_tile_bytes = tile_bytes
    with Kernels() as kernels, fused_attention(kernels):
        step()
    return kernels.number


class Kernels(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returned = func.overloadpacket.__name__, func._schema.returns
        alias = returned[0].alias_info if returned else None
        is_view = (alias is not None and not alias.is_write) or name in ("detach", "_unsafe_view")
        self.number += not is_view and "empty" not in name
        return func(*args, **(kwargs or {}))


@contextmanager
def fused_attention(kernels: Kernels) -> Iterator[None]:
    """Counts `scaled_dot_product_attention`, which the meta device spells out, as the fused kernels of a GPU."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*inputs)
            kernels.number += 1
            query, _, value = inputs[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])

        @staticmethod
        def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            kernels.number += 3
            return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> torch.Tensor:
        return Attention.apply(query, key, value, *([] if attn_mask is None else [attn_mask]))

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


if __name__ == "__main__":
    main()
