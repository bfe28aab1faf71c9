"""The model card of a split checkpoint: facts about it, and the card's text made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError


TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ("segment-anything", "sam", "peft", "lora", "custom_code")
UNKNOWN_LICENSE = "unknown"  # the Hub's own name for it


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Args:
        repo_id: Hub id of the split model, which the card's code blocks load.
        base: Hub id of the checkpoint that it was made from, or the name of its folder.
        base_commit: Commit of the base on the Hub; None if the base was a folder.
        num_parameters: Parameters of the model.
        num_vision_parameters: Those in the vision encoder.
        max_difference: Largest difference from the outputs of stock SAM, relative to the largest output.
        base_model: Hub ids for the metadata: the base, or the models that a base in a folder was made from.
        license: Hub names of the licence of the weights; None if the base names none.
        license_name: Name of a licence that the Hub does not know.
        license_link: URL of its text.
        code_version: `sam_split_version` of the configuration.
        source_url: Where the code is developed.
    """

    repo_id: str
    base: str
    base_commit: str | None
    num_parameters: int
    num_vision_parameters: int
    max_difference: float
    base_model: str | list[str] | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    code_version: str | None = None
    source_url: str | None = None


def model_card(facts: CardFacts) -> str:
    """Returns the text of the card, with its metadata."""
    data = ModelCardData(
        license=facts.license or UNKNOWN_LICENSE,  # type: ignore[arg-type]  # the Hub takes lists as well
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag="mask-generation",
        base_model=facts.base_model,
        tags=list(TAGS),
    )
    licences = [facts.license] if isinstance(facts.license, str) else facts.license or [UNKNOWN_LICENSE]
    base = f"`{facts.base}`"
    if facts.base_commit:
        base = f"[{facts.base}](https://huggingface.co/{facts.base}) at commit `{facts.base_commit}`"
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **{**vars(facts), "base": base},
        name=facts.repo_id.rpartition("/")[2],
        licence_name=facts.license_name or ", ".join(licences),
    )
    return str(card).rstrip() + "\n"


def card_facts(
    repo_id: str, base: str, folder: Path, figures: dict[str, Any], code_version: str | None = None
) -> CardFacts:
    """Collects the facts about a split model from its base and from what was measured.

    Args:
        repo_id: Hub id of the split model.
        base: Hub id or folder of the checkpoint that it was made from.
        folder: Folder of that checkpoint, with its own card. A folder of the Hub's cache is named by the commit.
        figures: `num_parameters`, `num_vision_parameters` and `max_difference`, as `verify.py` returns them.
        code_version: `sam_split_version` of the split model's configuration.

    Raises:
        ValueError: If the metadata of the base's card cannot be read.
    """
    data = card_metadata(folder)
    is_folder = Path(base).is_dir()
    link = data.get("license_link")
    if link and not link.startswith(("https://", "http://")):  # a file of the base, which is not in the split repo
        link = None if is_folder else f"https://huggingface.co/{base}/blob/{folder.name}/{link}"
    return CardFacts(
        repo_id=repo_id,
        base=folder.name if is_folder else base,
        base_commit=None if is_folder else folder.name,
        base_model=hub_ids(data.get("base_model")) if is_folder else base,
        license=data.get("license"),
        license_name=data.get("license_name"),
        license_link=link,
        code_version=code_version,
        **figures,
    )


def card_metadata(folder: Path) -> dict[str, Any]:
    """Returns base model and licence as the card in `folder` names them; empty if there is no card.

    Raises:
        ValueError: If they cannot be read, or are not text.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path).data
    except (ValueError, TypeError, YAMLError) as error:
        raise ValueError(f"The metadata of the base's README.md cannot be read: {error}") from error
    names = ("base_model", "license", "license_name", "license_link")
    metadata = {name: data.get(name) for name in names if data.get(name)}
    for name, value in metadata.items():
        takes_list = name in ("base_model", "license") and isinstance(value, list)
        if not all(isinstance(item, str) for item in (value if takes_list else [value])):
            raise ValueError(f"The metadata of the base's README.md cannot be read: {name} is not text.")
    return metadata


def hub_ids(base_model: str | list[str] | None) -> str | list[str] | None:
    """Returns `base_model` without what is not a Hub id, such as a path on the disk of its author."""

    def is_hub_id(name: str) -> bool:
        try:
            validate_repo_id(name)
        except HFValidationError:
            return False
        return name.count("/") == 1

    if isinstance(base_model, list):
        return [name for name in base_model if is_hub_id(name)] or None
    return base_model if base_model and is_hub_id(base_model) else None
