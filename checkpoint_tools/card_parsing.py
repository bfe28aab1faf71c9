"""Reads the model card that comes with a checkpoint, as data, and only as far as it is what the Hub expects."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import model_index_to_eval_results

from .fetching import is_id
from .messages import one_line


METADATA_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MAX_CHARACTERS = 200_000  # of a card; the Hub's own are far shorter
RELATIONS = ("finetune", "merge", "quantized")  # of a whole model to its base


@dataclass(frozen=True)
class ParsedCard:
    """A checkpoint's own card.

    Args:
        metadata: Fields with values of the right type, in the names of the Hub.
        results: Evaluation results of its `model-index`.
        text: What is written below the metadata.
        problems: What could not be read, as parts of sentences.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    results: tuple[EvalResult, ...] = ()
    text: str = ""
    problems: tuple[str, ...] = ()


def read_card(path: Path | None) -> ParsedCard:
    """Returns what the card in the file `path` says; nothing if there is none."""
    if path is None or not path.is_file():
        return ParsedCard()
    content = path.read_text(encoding="utf-8", errors="replace")
    if len(content) > MAX_CHARACTERS:
        return ParsedCard(problems=(f"it has {len(content):,} characters",))
    match = METADATA_BLOCK.match(content)
    if match is None:
        return ParsedCard(text=content.strip())
    text = content[match.end() :].strip()
    try:
        data = yaml.load(match[1], Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return ParsedCard(text=text, problems=(f"its metadata cannot be read: {one_line(error):.120}",))
    if not isinstance(data, dict):
        return ParsedCard(text=text, problems=("its metadata are no fields with values",))
    metadata = {name: data[name] for name, is_valid in FIELDS.items() if name in data and is_valid(data[name])}
    malformed = [name for name in FIELDS if data.get(name) and name not in metadata]
    try:
        results = plain_results(data["model-index"]) if data.get("model-index") else ()
    except (KeyError, TypeError, ValueError, AttributeError):
        results = ()
        malformed.append("model-index")
    problems = tuple(f"its {name} is not what the Hub expects" for name in malformed)
    return ParsedCard(metadata, results, text, problems)


class PlainLoader(yaml.SafeLoader):
    """Loads YAML without aliases, which a short text can expand to any size with."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in `SafeLoader`.

        Raises:
            YAMLError: At an alias.
        """
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def plain_results(model_index: Any) -> tuple[EvalResult, ...]:
    """Returns the results in the Hub's `model-index`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If it is something else.
    """
    _, results = model_index_to_eval_results(model_index)
    for result in results:
        texts = [value for name, value in vars(result).items() if name != "metric_value" and value is not None]
        if not all(isinstance(value, str | bool | dict) for value in texts):
            raise ValueError(f"expected text, got {texts!r:.80}")
        if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
            raise ValueError(f"expected a number, got {result.metric_value!r:.80}")
    return tuple(results)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and len(value) < 1000 and value.isprintable()


def _is_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and value != [] and all(map(_is_text, value)))


def _are_ids(value: Any) -> bool:
    return _is_texts(value) and all(is_id(name) for name in ([value] if isinstance(value, str) else value))


FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("license", "base_model", "language", "metrics", "tags"), _is_texts),
    "datasets": _are_ids,
    **dict.fromkeys(("license_name", "license_link"), _is_text),
    "base_model_relation": RELATIONS.__contains__,
}
