"""Reads checkpoints in Meta's layout as training scripts save them: wrapped, prefixed, and beside other things."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import inert_pickles
from .messages import listing, name_of


# Where trainers put the state dict; the last two are DeepSpeed's and plain loops'.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "module", "net")
# Modules around SAM: (Distributed)DataParallel, Lightning, micro-sam, MedSAM's derivatives, torch.compile.
PREFIX = re.compile(r"(?:(?:module|model|sam|net|sam_model|_orig_mod)\.)+")
NORMALIZATION = ("pixel_mean", "pixel_std")  # buffers of Meta's Sam, which Meta's own code does not save


@dataclasses.dataclass
class MetaCheckpoint:
    """Weights in Meta's layout, and what the file says besides.

    Args:
        weights: Tensors by Meta's names, of one floating-point dtype.
        notes: What was stripped, left out or cast, in a sentence each.
        normalization: `pixel_mean` and `pixel_std`, of 3 numbers each, where the file has both.
    """

    weights: dict[str, torch.Tensor]
    notes: list[str]
    normalization: tuple[list[float], list[float]] | None = None


def read(file: Path) -> MetaCheckpoint:
    """Reads a `.safetensors` file, or a file of `torch.save` without running code of it.

    Raises:
        ValueError: If the file is damaged, holds no state dict or more than one, or weights that are not finite
            floating-point numbers.
    """
    content, foreign = unpacked(file)
    if inert_pickles.is_inert(content):
        raise ValueError(
            f"{file} holds an object of {listing(foreign)}, which is code: save the model's state_dict() instead."
        )
    state_dict, wrapper, beside = unwrapped(content, file)
    notes = [f"The weights are those under {wrapper!r}."] if wrapper else []
    if beside:
        notes.append(f"Left out, because it is no weight of SAM: {', '.join(map(str, beside))}.")
    if foreign := [name for name in foreign if not name.startswith("numpy.")]:  # metrics, which hide the others
        notes.append(f"Not read, because that could run code: objects of {listing(foreign)}.")
    weights, prefixes = without_prefixes(state_dict, file)
    if prefixes:
        notes.append(f"Prefixes were removed from the names: {listing(map(repr, prefixes))}.")
    normalization = [weights.pop(name).double().flatten().tolist() for name in NORMALIZATION if name in weights]
    check_finite(weights, file)
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) > 1:
        widest = torch.float32
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        notes.append(f"The weights have several dtypes ({listing(dtypes)}): all are written in {name_of(widest)}.")
        weights = {name: tensor.to(widest) for name, tensor in weights.items()}
    if [len(values) for values in normalization] != [3, 3]:
        return MetaCheckpoint(weights, notes)
    for name, values, least in zip(NORMALIZATION, normalization, (0.0, 1e-6), strict=True):
        if not all(least <= value < math.inf for value in values):
            raise ValueError(f"{file}: {name} is {values}: expected numbers {'above' if least else 'from'} 0.")
    return MetaCheckpoint(weights, notes, normalization=(normalization[0], normalization[1]))


def unpacked(file: Path) -> tuple[Any, list[str]]:
    """Returns what `file` holds, and the names of the classes and functions in it that were not run.

    Raises:
        ValueError: If it is damaged, or cannot be read without running code of it.
    """
    if file.is_fifo():  # which would never end
        raise ValueError(f"{file} is a pipe: expected a file.")
    with file.open("rb"):  # a file that cannot be opened is an OSError
        pass
    if file.suffix != ".safetensors":
        return inert_pickles.load(file)
    try:
        return load_file(file), []
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}.") from error


def unwrapped(content: Any, file: Path) -> tuple[Mapping[str, torch.Tensor], str, list[Any]]:
    """Returns the state dict in `content`, the name that it is under, and the other names beside it.

    Raises:
        ValueError: If there is none, or more than one.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{file} holds a {type(content).__name__}: expected a state dict of a segment_anything model."
        )
    wrapped = [name for name in WRAPPERS if isinstance(content.get(name), Mapping) and has_tensors(content[name])]
    if len(wrapped) > 1:
        raise ValueError(f"{file} holds weights under {' and '.join(map(repr, wrapped))}: save those you want alone.")
    if wrapped:
        state_dict, inner, beside = unwrapped(content[wrapped[0]], file)
        name = f"{wrapped[0]}.{inner}" if inner else wrapped[0]
        return state_dict, name, [key for key in content if key != wrapped[0]] + beside
    foreign = {key: value for key, value in content.items() if not isinstance(key, str) or not torch.is_tensor(value)}
    if foreign or not content:
        objects = any(map(inert_pickles.is_inert, foreign.values()))
        advice = " Objects are code, and are not read: save the model's state_dict() instead." if objects else ""
        raise ValueError(
            f"{file} does not contain a state dict of a segment_anything model: expected tensors by name, directly or "
            f"under one of {', '.join(WRAPPERS)}, got {listing(map(repr, foreign)) or 'nothing'}.{advice}"
        )
    return content, "", []


def has_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether `content` is a state dict, or holds one."""
    return any(
        torch.is_tensor(value) or (name in WRAPPERS and isinstance(value, Mapping) and has_tensors(value))
        for name, value in content.items()
    )


def without_prefixes(state_dict: Mapping[str, torch.Tensor], file: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Returns the tensors by the names that they have in SAM, and the prefixes that the names had.

    Raises:
        ValueError: If two names become the same.
    """
    weights: dict[str, torch.Tensor] = {}
    prefixes = set()
    for name, tensor in state_dict.items():
        if match := PREFIX.match(name):
            prefixes.add(match[0])
        short = name[match.end() :] if match else name
        if short in weights:
            raise ValueError(f"{file} holds {short} twice, with different prefixes: save one of the two models alone.")
        weights[short] = tensor
    return weights, prefixes


def check_finite(
    weights: Mapping[str, torch.Tensor], source: object, advice: str = "diverged training leaves such weights"
) -> None:
    """Passes weights that are finite floating-point numbers.

    Raises:
        ValueError: If some are not: integers of a quantized model, or what diverging training left.
    """
    if integers := [name for name, tensor in weights.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{source}: expected floating-point weights, got other dtypes in {listing(integers)}.")
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source} holds NaN or infinity in {listing(broken)}: {advice}.")
