"""Runs functions on the GPU that a Space on ZeroGPU lends (https://huggingface.co/docs/hub/spaces-zerogpu)."""

from collections.abc import Callable
from typing import Any


try:
    import spaces
except ImportError:  # not in such a Space
    spaces = None


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with a GPU for each of its calls, where there is the package `spaces`; else as it is.

    It then runs in a process of its own: arguments and results must be on the CPU.
    """
    return function if spaces is None else spaces.GPU(function)
