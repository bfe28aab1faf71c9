"""Shared by all commands: this checkout, its model classes, and messages of one line."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
SAM_TINY = ROOT / "checkpoints" / "sam-tiny"


def split_class(name: str = "SamSplitModel") -> type[PreTrainedModel]:
    """Returns a model class of this checkout, as users of a model repo get it."""
    # The configuration first, as AutoModel does: transformers 5.0 would later import it a second time.
    get_class_from_dynamic_module("configuration_sam_split.SamSplitConfig", str(ROOT))
    return get_class_from_dynamic_module(f"modeling_sam_split.{name}", str(ROOT))


def one_line(message: object) -> str:
    """Returns a message, such as an error's, without its line breaks."""
    return " ".join(str(message).split())


def listing(keys: Iterable[object], limit: int = 5) -> str:
    """Returns the first of `keys`, and how many more there are."""
    names = sorted(map(name_of, keys))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def name_of(key: object) -> str:
    """Returns the name of a dtype without its module, and anything else as it is."""
    return str(key).removeprefix("torch.") if isinstance(key, torch.dtype) else str(key)
