"""Messages of one line."""

from collections.abc import Iterable

import torch


MOST = 5  # names in a list


def one_line(message: object) -> str:
    """Returns a message, such as an error's, without its line breaks."""
    return " ".join(str(message).split())


def listing(keys: Iterable[object]) -> str:
    """Returns the first of `keys`, and how many more there are."""
    names = sorted(map(name_of, keys))
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def name_of(key: object) -> str:
    """Returns the name of a dtype without its module, and anything else as it is."""
    return str(key).removeprefix("torch.") if isinstance(key, torch.dtype) else str(key)
