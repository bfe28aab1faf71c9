"""The model card says what the base is, under which licence, and names nothing that is not in the model repo."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import CODE_FILES, FIGURES
from huggingface_hub import ModelCard

from checkpoint_tools.cards import model_card
from checkpoint_tools.verification import check_card


@pytest.fixture
def folder(base_dir: Path, tmp_path: Path) -> Path:
    """A base with a card of its own."""
    path = shutil.copytree(base_dir, tmp_path / "0123456789abcdef")
    (path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nbase_model: facebook/sam-vit-base\n---\n# Mine\n"
    )
    return path


def test_base_on_the_hub(folder: Path) -> None:
    text = model_card("user/sam", "someone/sam", folder, FIGURES)
    (folder / "README.md").write_text(text)
    check_card(folder)
    card = ModelCard(text)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "mine", "someone/sam")
    assert data["library_name"] == "transformers"
    assert "[someone/sam](https://huggingface.co/someone/sam) at commit `0123456789abcdef`" in card.text
    words = " ".join(card.text.split())
    assert "1,234 parameters, of which 1,000 are in the vision encoder" in words
    assert "by 1e-07 of the largest" in words
    assert "Licence: other for the weights" in words
    assert 'from_pretrained("user/sam", revision="<commit>", trust_remote_code=True)' in words
    assert 'repo = "user/sam"' in words


def test_fine_tuned_folder_keeps_its_base(folder: Path) -> None:
    text = model_card("user/sam", str(folder), folder, FIGURES)
    assert ModelCard(text).data.base_model == "facebook/sam-vit-base"
    assert "The weights of `0123456789abcdef`" in text
    assert str(folder) not in text


def test_base_without_a_card(base_dir: Path) -> None:
    data = ModelCard(model_card("user/sam", str(base_dir), base_dir, FIGURES)).data
    assert data.license == "apache-2.0"
    assert data.base_model is None


def test_it_names_nothing_that_stays_here(folder: Path) -> None:
    text = model_card("user/sam", "someone/sam", folder, FIGURES)
    assert "<user>" not in text
    assert "](#" not in text
    there = {"config.json", "processor_config.json", *CODE_FILES}
    for name in re.findall(r"`([\w/]+(?:\.(?:py|md|json|txt)|/))`|(make \w+)", text):
        assert name[0] in there, f"add a pattern for {name} to STAYS_HERE, or leave its section out"


def test_unreadable_card_of_the_base(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"base's README\.md cannot be read"):
        model_card("user/sam", str(folder), folder, FIGURES)
