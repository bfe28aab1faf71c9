"""Makes the model card of a split checkpoint from this repo's README.md."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard
from yaml import YAMLError

from .staging import ROOT


SECTIONS = ("Quick start", "LoRA", "Back to stock", "What differs from `SamModel`", "Supported versions", "Limits")
STAYS_HERE = (r" \(see \[below\]\([^)]*\)\)", r"\n\nThe full pins are in `requirements/`\.")
PLACEHOLDER = "<user>/sam-vit-base-split"

CHECKPOINT = """\
## This checkpoint

The weights of {base}, split: {num_parameters:,} parameters, of which
{num_vision_parameters:,} are in the vision encoder. On a fixed image and point its outputs differ from stock
`SamModel`'s by {max_difference:.1g} of the largest at most.

Loading it runs the `*_sam_split.py` files of this repo on your machine. Read them, and pin the commit that you read,
which "Files and versions" names:

```python
model = AutoModel.from_pretrained("{repo_id}", revision="<commit>", trust_remote_code=True)
```

Licence: {licence} for the weights, as those they come from; Apache-2.0 for the code.

"""


def model_card(repo_id: str, base: str, folder: Path, figures: dict[str, Any]) -> str:
    """Returns the card of what was made from `base`, which lies in `folder`.

    Args:
        repo_id: What the snippets load.
        base: A Hub id, or a folder, of which the card has only the name.
        folder: Where the base's own card is looked for; a folder of the Hub's cache is named by the commit.
        figures: What `verify.py` measured.
    """
    card = ModelCard((ROOT / "README.md").read_text(encoding="utf-8"))
    base_data = card_data(folder)
    if Path(base).is_dir():
        name = f"`{folder.name}`"
        card.data["base_model"] = base_data.get("base_model")
    else:
        name = f"[{base}](https://huggingface.co/{base}) at commit `{folder.name}`"
        card.data["base_model"] = base
    licence = base_data.get("license") or "apache-2.0"
    card.data["license"] = licence
    for field in ("license_name", "license_link"):
        card.data[field] = base_data.get(field)

    introduction, *sections = re.split(r"^(?=## )", card.text, flags=re.MULTILINE)
    by_heading = {section.partition("\n")[0].removeprefix("## "): section for section in sections}
    checkpoint = CHECKPOINT.format(repo_id=repo_id, base=name, licence=licence, **figures)
    text = "".join([introduction, checkpoint, *(by_heading[heading] for heading in SECTIONS)])
    for pattern in STAYS_HERE:
        text = re.sub(pattern, "", text)
    card.text = text.replace(PLACEHOLDER, repo_id).rstrip() + "\n"
    return str(card)


def card_data(folder: Path) -> CardData:
    """Returns the metadata of the card in `folder`, empty if there is none.

    Raises:
        ValueError: If they cannot be read, and so neither the licence.
    """
    path = folder / "README.md"
    try:
        return ModelCard.load(path).data if path.is_file() else CardData()
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The metadata of the base's README.md cannot be read: {error}") from error
