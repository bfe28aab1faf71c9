"""The model card of a model repo that `upload.py` stages: facts about it, and the card's text made of them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .base_provenance import Base
from .licences import UNKNOWN, Licence


TEMPLATE = Path(__file__).with_name("model_repo_card_template.md")
TAGS = ("segment-anything", "sam", "peft", "lora", "custom_code")
CARRIED_OVER = ("datasets", "language", "metrics")  # the weights are the base's, and so is what was done with them


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
        licence: Licence of the weights.
        base_model: Hub ids for the metadata: the base, or the models that a base in a folder was made from.
        base_model_relation: How a base in a folder was made from them, as the Hub names it.
        carried_over: Metadata of the base's card that are true of its weights in any layout.
        results: Evaluation results of the base.
        description: The base's own card, if it is not on the Hub.
        code_version: `sam_split_version` of the configuration.
        source_url: Where the code is developed.
    """

    repo_id: str
    base: str
    base_commit: str | None
    num_parameters: int
    num_vision_parameters: int
    max_difference: float
    licence: Licence
    base_model: str | list[str] | None = None
    base_model_relation: str | None = None
    carried_over: dict[str, Any] | None = None
    results: tuple[EvalResult, ...] = ()
    description: str = ""
    code_version: str | None = None
    source_url: str | None = None


def model_card(facts: CardFacts) -> str:
    """Returns the text of the card, with its metadata."""
    name = facts.repo_id.rpartition("/")[2]
    carried_over = dict(facts.carried_over or {})
    tags = carried_over.pop("tags", [])
    data = ModelCardData(
        license=facts.licence.id or UNKNOWN,  # type: ignore[arg-type]  # the Hub takes lists as well
        license_name=facts.licence.name,
        license_link=facts.licence.link,
        library_name="transformers",
        pipeline_tag="mask-generation",
        base_model=facts.base_model,
        base_model_relation=facts.base_model_relation,
        tags=[*TAGS, *([tags] if isinstance(tags, str) else tags)],
        model_name=name,
        eval_results=list(facts.results) or None,
        **carried_over,
    )
    base = f"`{facts.base}`"
    if facts.base_commit:
        base = f"[{facts.base}](https://huggingface.co/{facts.base}) at commit `{facts.base_commit}`"
    facts_in_words = {**vars(facts), "base": base, "base_id": facts.base, "name": name}
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **facts_in_words)
    return str(card).rstrip() + "\n"


def card_facts(repo_id: str, base: Base, figures: dict[str, Any], code_version: str | None = None) -> CardFacts:
    """Collects the facts about a split model from its base and from what was measured.

    Args:
        repo_id: Hub id of the split model.
        base: The checkpoint that it was made from.
        figures: `num_parameters`, `num_vision_parameters` and `max_difference`, as `verify.py` returns them.
        code_version: `sam_split_version` of the split model's configuration.
    """
    card = base.card
    return CardFacts(
        repo_id=repo_id,
        base=base.title,
        base_commit=base.commit,
        licence=base.licence,
        base_model=base.hub_ids,
        # To split the weights of a model is none of the Hub's relations.
        base_model_relation=card.metadata.get("base_model_relation") if base.is_folder and base.hub_ids else None,
        carried_over={name: card.metadata[name] for name in (*CARRIED_OVER, "tags") if name in card.metadata},
        results=card.results,
        description=lower_headings(card.text) if base.is_folder else "",
        code_version=code_version,
        **figures,
    )


def lower_headings(text: str) -> str:
    """Returns Markdown with its headings two levels lower, to stand in a section."""
    in_code, lines = False, []
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith(("```", "~~~"))
        lines.append(line if in_code else re.sub(r"^#{1,4} ", lambda match: "##" + match[0], line))
    return "\n".join(lines)
