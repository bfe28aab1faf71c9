"""The model card says what the base is and under which licence, and its code blocks run."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import run_python
from huggingface_hub import ModelCard

from checkpoint_tools.cards import card_facts, model_card
from checkpoint_tools.verification import check_card


FIGURES = {"num_parameters": 1234, "num_vision_parameters": 1000, "max_difference": 1.2e-7}


@pytest.fixture
def folder(base_dir: Path, tmp_path: Path) -> Path:
    """A base with a card of its own, in a folder named as those of the Hub's cache."""
    path = shutil.copytree(base_dir, tmp_path / "0123456789abcdef")
    write_card(path, license="other", license_name="mine", license_link="LICENSE", base_model="facebook/sam-vit-base")
    return path


def write_card(folder: Path, **metadata: str) -> None:
    lines = [f"{name}: {value}" for name, value in metadata.items()]
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "# Mine\n"]))


def card_of(base: str, folder: Path, **figures) -> ModelCard:
    return ModelCard(model_card(card_facts("user/sam", base, folder, {**FIGURES, **figures}, code_version="0.0.1")))


def test_base_on_the_hub(folder: Path) -> None:
    card = card_of("someone/sam", folder)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "mine", "someone/sam")
    assert data["license_link"] == "https://huggingface.co/someone/sam/blob/0123456789abcdef/LICENSE"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "mask-generation")
    words = " ".join(card.text.split())
    assert "[someone/sam](https://huggingface.co/someone/sam) at commit `0123456789abcdef`" in words
    assert "| 1,234, of which 1,000 in the vision encoder |" in words
    assert "sam-split 0.0.1" in words
    assert "by at most 1e-07, relative to the largest output" in words
    assert "licence of their base: mine (https://huggingface.co/someone/sam/blob/" in words
    assert 'repo = "user/sam"' in words


def test_the_hub_reads_it(folder: Path) -> None:
    card_of("someone/sam", folder).save(folder / "README.md")
    check_card(folder)


def test_fine_tuned_folder_keeps_its_base(folder: Path) -> None:
    card = card_of(str(folder), folder)
    assert card.data.base_model == "facebook/sam-vit-base"
    assert card.data.license_link is None, "a file that is not in the split repo"
    assert "The weights of `0123456789abcdef`" in card.text
    assert str(folder) not in str(card)


@pytest.mark.parametrize("base_model", ["/home/me/sam", "./sam", "sam"])
def test_paths_of_the_author_stay_private(base_model: str, folder: Path) -> None:
    write_card(folder, license="mit", base_model=base_model)
    assert card_of(str(folder), folder).data.base_model is None
    write_card(folder, license="mit", base_model=f"[{base_model}, someone/sam]")
    assert card_of(str(folder), folder).data.base_model == ["someone/sam"]


def test_base_without_a_licence(base_dir: Path) -> None:
    card = card_of(str(base_dir), base_dir)
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert "The base names no licence for its weights." in card.text


def test_several_licences(folder: Path) -> None:
    write_card(folder, license="[mit, apache-2.0]")
    card = card_of("someone/sam", folder)
    assert card.data.license == ["mit", "apache-2.0"]
    assert "licence of their base: mit, apache-2.0." in card.text


def test_equal_outputs_are_called_equal(folder: Path) -> None:
    text = card_of("someone/sam", folder, max_difference=0.0).text
    assert "the outputs are equal to those of stock `SamModel`" in text
    assert "relative to the largest output" not in text


def test_it_names_only_what_is_in_the_model_repo(folder: Path) -> None:
    text = card_of("someone/sam", folder).text
    assert "<user>" not in text
    assert "](#" not in text
    assert not re.search(r"make \w+|\{[{%]|[%}]\}", text)
    for name in re.findall(r"`([\w/*]+(?:\.(?:py|md|json|txt)|/))`", text):
        assert name in ("*_sam_split.py", "LICENSE", "config.json", "processor_config.json"), name


@pytest.mark.slow
def test_its_code_runs(folder: Path, split_dir: Path) -> None:
    """In order and in one process."""
    text = card_of("someone/sam", folder).text.replace('repo = "user/sam"', f"repo = {str(split_dir)!r}")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert str(split_dir) in code
    check = "assert masks[0].shape == (1, 1, 480, 640) and type(stock).__name__ == 'SamModel'"
    assert "The mask has " in run_python(f"exec({code + check!r})")


@pytest.mark.parametrize("metadata", ["license: [", "tags: 3", "license: {a: b}", "license_link: [LICENSE]"])
def test_unreadable_card_of_the_base(metadata: str, folder: Path) -> None:
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=r"base's README\.md cannot be read"):
        card_facts("user/sam", str(folder), folder, FIGURES)
