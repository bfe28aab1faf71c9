"""Where a base comes from: the card and the licence of the checkpoint, or of an equal one on the Hub."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .card_parsing import ParsedCard, read_card
from .config_files import read_json
from .conversions import TOLERANCE, load_checked
from .fetching import fetch, is_hub_id
from .licences import Licence, combined, stated_licence
from .loading import model_type
from .messages import listing
from .output_comparison import OutputsDifferError, compare, example_outputs
from .verification import split_weights


SPLIT, STOCK = ("sam_split", "sam_split_vision_model"), ("sam", "sam_vision_model")  # model types


@dataclass(frozen=True)
class Base:
    """The checkpoint that a model repo is made of.

    Args:
        name: Its folder or Hub id.
        folder: Its folder. A folder of the Hub's cache is named by the commit.
        card: Its own card.
        licence: The licence of its weights.
        made_from: Hub ids of the models that it was made from; None for those that its card names.
    """

    name: str
    folder: Path
    card: ParsedCard
    licence: Licence
    made_from: list[str] | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is not on the Hub."""
        return Path(self.name).is_dir()

    @property
    def commit(self) -> str | None:
        """Its commit on the Hub; None for a folder."""
        return None if self.is_folder else self.folder.name

    @property
    def title(self) -> str:
        """Its Hub id, or the name of its folder without the path."""
        return self.folder.name if self.is_folder else self.name

    @property
    def hub_ids(self) -> str | list[str] | None:
        """What `base_model` of a model made of it may be: its own Hub id, or those that its card names."""
        return self.made_from or hub_ids(self.card.metadata.get("base_model")) if self.is_folder else self.name


def read_base(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    licence: Licence | None = None,
    made_from: list[str] | None = None,
) -> Base:
    """Returns a SAM v1 checkpoint with its card and its licence.

    Args:
        name: Its folder or Hub id.
        revision: Its branch, tag or commit.
        token: A token of the Hub.
        licence: The licence of the weights, as far as the card does not state it.
        made_from: Hub ids of the models that a checkpoint in a folder was made from.

    Raises:
        ValueError: If there is none under this name, or what is given contradicts its card.
    """
    folder = fetch(name, revision, token)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} has no config.json: expected a SAM v1 checkpoint written by save_pretrained. An adapter "
            "must be merged first: merge_and_unload(), then save_pretrained()."
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("sam", "sam_split"):
        raise ValueError(
            f"{name}: expected SAM v1 (model_type 'sam' or 'sam_split'), got {config.get('model_type')!r:.40}."
        )
    if "quantization_config" in config or (folder / "adapter_config.json").is_file():
        raise ValueError(f"{name} is quantized or holds an adapter: save the whole, merged model in full precision.")
    return described(name, folder, licence, made_from)


def described(name: str, folder: Path, licence: Licence | None = None, made_from: list[str] | None = None) -> Base:
    """Returns what the files in `folder` say of the checkpoint `name`; the arguments are those of `read_base`.

    Raises:
        ValueError: If what is given contradicts its card.
    """
    is_folder = Path(name).is_dir()
    if made_from and not is_folder:
        raise ValueError(f"--base-model: expected a base in a folder. {name} is on the Hub, and the card names it.")
    card = read_card(folder / "README.md")
    url = None if is_folder else f"https://huggingface.co/{name}/blob/{folder.name}"
    stated = stated_licence(card.metadata, folder, url)
    return Base(name, folder, card, combined(stated, licence or Licence(), folder), made_from)


def hub_ids(base_model: str | list[str] | None) -> str | list[str] | None:
    """Returns `base_model` without what is not a Hub id, such as a path on the disk of its author."""
    if isinstance(base_model, list):
        return [name for name in base_model if is_hub_id(name)] or None
    return base_model if base_model and is_hub_id(base_model) else None


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
