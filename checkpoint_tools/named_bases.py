"""The model on the Hub that an adapter names, where it was trained on another copy of that model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from .comparison import OutputsDifferError, compare, example_outputs
from .conversions import TOLERANCE, load_checked
from .fetching import fetch
from .loading import model_type
from .messages import listing
from .verification import split_weights


SPLIT, STOCK = ("sam_split", "sam_split_vision_model"), ("sam", "sam_vision_model")


def named_base(name: str, model: PreTrainedModel, model_types: tuple[str, ...] = SPLIT) -> str:
    """Returns the commit of the model `name` on the Hub, once that has been found to be `model`.

    Args:
        name: A Hub id, as given with `--base-model`.
        model: The split model that an adapter was trained on, without the adapter.
        model_types: Of which the adapter needs its base to be.

    Raises:
        ValueError: If it is of another kind, or has other weights or outputs.
    """
    if Path(name).exists():
        raise ValueError(f"--base-model {name} is on this machine: expected the Hub id of a model, USER/NAME.")
    folder = fetch(name)
    kind = model_type(str(folder))
    if kind not in model_types:
        advice = "upload.py makes it" if model_types == SPLIT else "convert.py to-sam makes it"
        raise ValueError(
            f"--base-model {name}: expected a model that the adapter fits (model_type {model_types[0]!r}; {advice}), "
            f"got {kind!r}."
        )
    other, _ = load_checked(str(folder), complete=False)
    expected, actual = (dict(split_weights(each.state_dict())) for each in (model, other))
    differing = [
        key
        for key in expected.keys() | actual.keys()
        if key not in actual or key not in expected or not torch.equal(actual[key], expected[key])
    ]
    if differing:
        raise ValueError(f"--base-model {name} is another model: its weights differ in {listing(differing)}.")
    try:
        compare(example_outputs(other), example_outputs(model), TOLERANCE)
    except OutputsDifferError as error:
        raise ValueError(f"--base-model {name} has other settings: {error}") from error
    return folder.name
