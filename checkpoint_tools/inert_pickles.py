"""Reads files of `torch.save` without running code of theirs, whatever objects lie beside the weights.

A pickle names classes and functions, which unpickling would import and call. Here each of them is replaced by a
stand-in that does nothing, and torch's own restricted unpickler (`weights_only=True`) runs nothing else.
https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .messages import listing


class _EqualsDict(type):
    """The type of a class that equals `dict`, because torch sets items of nothing else."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict

    __hash__ = type.__hash__


class Inert(metaclass=_EqualsDict):
    """Stands for an object of any class, and for what any function returns: it takes all, and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def inert_list(*args: object) -> list:
    """Stands for a class of which torch would not let items be appended to an `Inert`."""
    return []


def is_inert(value: object) -> bool:
    """Whether `value` stands for an object, or for a class or function itself."""
    return isinstance(value, Inert) or value is Inert


def load(file: Path) -> tuple[Any, list[str]]:
    """Returns what `file` holds, on the CPU, and the names of the classes and functions in it that were replaced.

    Raises:
        ValueError: If it is damaged, or cannot be read in this way.
    """
    foreign = foreign_names(file)
    stand_ins: list[Any] = [(inert_list if name == "collections.deque" else Inert, name) for name in foreign]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True), foreign
    except Exception as error:  # bytes that are no pickle raise nearly any
        if "TorchScript" in str(error):
            message = "is a TorchScript archive, which is code: save the model's state dict."
        elif foreign := foreign or re.findall(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)", str(error)):
            message = (
                f"holds objects that cannot be told from its weights without running code: {listing(foreign)}. If you "
                "trust the file, load it where it was written, with weights_only=False, and save the weights in it "
                "alone with torch.save."
            )
        else:
            message = "is damaged, or was not written by torch.save with its own pickle_protocol."
        raise ValueError(f"{file} {message}") from error


def foreign_names(file: Path) -> list[str]:
    """Returns the classes and functions in `file` that torch does not know; none for the format before torch 1.6."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the old format, or damage, which raises nearly any
        return []
    return sorted(names)
