"""The checkpoint that a model repo is made of, with its card and its licence."""

from dataclasses import dataclass
from pathlib import Path

from .base_cards import BaseCard, hub_ids, read_card
from .fetching import fetch
from .licences import Licence, combined, stated_licence
from .plain_settings import read_json


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
    card: BaseCard
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
        raise ValueError(f"--base-model is for a base in a folder, but {name} is on the Hub, and is named itself.")
    card = read_card(folder / "README.md")
    url = None if is_folder else f"https://huggingface.co/{name}/blob/{folder.name}"
    stated = stated_licence(card.metadata, folder, url)
    return Base(name, folder, card, combined(stated, licence or Licence(), folder), made_from)
