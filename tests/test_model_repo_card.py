"""The model card says what the base is and under which licence, and its code blocks run."""

import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import FIGURES, run_python
from huggingface_hub import ModelCard

from checkpoint_tools import base_provenance
from checkpoint_tools.base_provenance import read_base
from checkpoint_tools.card_parsing import read_card
from checkpoint_tools.licences import Licence
from checkpoint_tools.model_repo_card import card_facts, model_card
from checkpoint_tools.verification import check_card


RESULTS = """
model-index:
- name: mine
  results:
  - task: {type: mask-generation}
    dataset: {name: Coins, type: me/coins}
    metrics:
    - {type: mean_iou, value: 0.846, name: mean IoU}
"""


@pytest.fixture
def folder(base_dir: Path, tmp_path: Path) -> Path:
    """A base with a card of its own, in a folder named as those of the Hub's cache."""
    path = shutil.copytree(base_dir, tmp_path / "0123456789abcdef")
    write_card(path, license="other", license_name="mine", license_link="LICENSE", base_model="facebook/sam-vit-base")
    return path


def write_card(folder: Path, more: str = "", **metadata: str) -> None:
    lines = [f"{name}: {value}" for name, value in metadata.items()]
    (folder / "README.md").write_text("\n".join(["---", *lines, more.strip(), "---", "# Mine\n\nOf coins.\n"]))


def card_of_folder(folder: Path, **figures) -> ModelCard:
    return ModelCard(model_card(card_facts("user/sam", read_base(str(folder)), {**FIGURES, **figures}, "0.0.1")))


@pytest.fixture
def card_on_hub(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The card of a model made of someone/sam, whose files are in `folder`."""
    monkeypatch.setattr(base_provenance, "fetch", lambda *args: folder)

    def make(licence: Licence | None = None, **figures) -> ModelCard:
        base = read_base("someone/sam", licence=licence)
        return ModelCard(model_card(card_facts("user/sam", base, {**FIGURES, **figures}, "0.0.1")))

    return make


def test_base_on_the_hub(card_on_hub) -> None:
    card = card_on_hub()
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
    assert "(https://huggingface.co/someone/sam/blob/0123456789abcdef/README.md)" in words
    assert "Of coins." not in words
    assert 'repo = "user/sam"' in words


def test_what_is_true_of_the_weights_is_carried_over(folder: Path) -> None:
    write_card(
        folder,
        RESULTS,
        license="mit",
        base_model="facebook/sam-vit-base",
        base_model_relation="finetune",
        datasets="[me/coins]",
        language="en",
        tags="[coins, sam]",
    )
    card = card_of_folder(folder)
    data = card.data.to_dict()
    assert data["base_model_relation"] == "finetune"
    assert (data["datasets"], data["language"]) == (["me/coins"], "en")
    assert {"coins", "sam", "custom_code"} <= set(data["tags"]) and len(set(data["tags"])) == len(data["tags"])
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("Coins", "mean_iou", 0.846)
    assert card.text.rstrip().endswith("## The base's own card\n\n### Mine\n\nOf coins.")


def test_the_hub_reads_it(card_on_hub, folder: Path) -> None:
    card_on_hub().save(folder / "README.md")
    check_card(folder)


def test_fine_tuned_folder_keeps_its_base(folder: Path) -> None:
    card = card_of_folder(folder)
    assert card.data.base_model == "facebook/sam-vit-base"
    assert card.data.license_link is None, "a file that is not in the split repo"
    assert "The weights of `0123456789abcdef`" in card.text
    assert str(folder) not in str(card)


@pytest.mark.parametrize("path", ["/home/me/sam", "./sam", "sam"])
def test_paths_of_the_author_stay_private(path: str, folder: Path) -> None:
    write_card(folder, license="mit", base_model=path, license_link=path, datasets=path if path != "sam" else "/sam")
    card = card_of_folder(folder)
    assert card.data.base_model is card.data.license_link is card.data.datasets is None
    assert path == "sam" or path not in str(card)
    write_card(folder, license="mit", base_model=f"[{path}, someone/sam]")
    assert card_of_folder(folder).data.base_model == ["someone/sam"]


def test_base_without_a_licence(base_dir: Path) -> None:
    card = card_of_folder(base_dir)
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    words = " ".join(card.text.split())
    assert "| licence | unknown for the weights, Apache-2.0 for the code |" in words
    assert "The licence of the weights is unknown: their base names none." in words


def test_several_licences(card_on_hub, folder: Path) -> None:
    write_card(folder, license="[mit, apache-2.0]")
    card = card_on_hub()
    assert card.data.license == ["mit", "apache-2.0"]
    assert "licence of their base: mit, apache-2.0." in card.text
    assert "[" not in re.findall(r"\| licence \|.*", card.text)[0]


def test_licence_files_keep_their_names(card_on_hub, folder: Path) -> None:
    (folder / "LICENSE").write_text("mine")
    card = card_on_hub()
    assert card.data.license_link == "LICENSE"
    assert "Its text is in `LICENSE`. The code is under Apache-2.0 (`LICENSE-code`)." in card.text


def test_given_licence_contradicts_none(card_on_hub, folder: Path) -> None:
    with pytest.raises(ValueError, match="--license mit: the base's card says other"):
        card_on_hub(Licence("mit"))
    write_card(folder, base_model="facebook/sam-vit-base")
    assert card_on_hub(Licence("mit")).data.license == "mit"
    with pytest.raises(ValueError, match=r"--license-link terms\.txt: expected a URL, or a text file"):
        card_on_hub(Licence("other", "mine", "terms.txt"))


def test_equal_outputs_are_called_equal(card_on_hub) -> None:
    text = card_on_hub(max_difference=0.0).text
    assert "the outputs are equal to those of stock `SamModel`" in text
    assert "relative to the largest output" not in text


def test_it_names_only_what_is_in_the_model_repo(card_on_hub) -> None:
    text = card_on_hub().text
    assert "<user>" not in text
    assert "](#" not in text
    assert not re.search(r"make \w+|\{[{%]|[%}]\}", text)
    for name in re.findall(r"`([\w/*]+(?:\.(?:py|md|json|txt)|/))`", text):
        assert name in ("*_sam_split.py", "LICENSE", "config.json", "processor_config.json"), name


@pytest.mark.slow
def test_its_code_runs(card_on_hub, split_dir: Path) -> None:
    """In order and in one process."""
    text = card_on_hub().text.replace('repo = "user/sam"', f"repo = {str(split_dir)!r}")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert str(split_dir) in code
    check = "assert masks[0].shape == (1, 1, 480, 640) and type(stock).__name__ == 'SamModel'"
    assert "The mask has " in run_python(f"exec({code + check!r})")


BOMB = "\n".join(
    ["a: &a [x]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]
)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("license: [", "cannot be read"),
        (f"{BOMB}\nlicense: *i", "aliases are not read"),
        ("license: " + 1500 * "[", "cannot be read"),
        ("- license", "no fields with values"),
        ("tags: 3", "its tags is not what the Hub expects"),
        ("license: {a: b}", "its license is not"),
        ("license: [[mit]]", "its license is not"),
        ("license_link: [LICENSE]", "its license_link is not"),
        ("base_model: [1, 2]", "its base_model is not"),
        ("base_model_relation: adapter", "its base_model_relation is not"),
        ("model-index: 3", "its model-index is not"),
        ("model-index: [{name: mine, results: [{task: 1, dataset: 2, metrics: 3}]}]", "its model-index is not"),
        (RESULTS.replace("0.846", "[0.846]"), "its model-index is not"),
        (RESULTS.replace("0.846", ".nan"), "its model-index is not"),
    ],
)
def test_unreadable_card_of_the_base(metadata: str, problem: str, folder: Path) -> None:
    """It is left out, and said to be, without delay; the licence is then unknown."""
    (folder / "README.md").write_text(f"---\n{metadata}\n---\nOf coins.\n")
    started = time.monotonic()
    card = read_card(folder / "README.md")
    assert len(card.problems) == 1 and problem in card.problems[0]
    assert "\n" not in card.problems[0] and len(card.problems[0]) < 200
    assert card_of_folder(folder).data.license == "unknown"
    assert time.monotonic() - started < 20
    assert card.text == "Of coins."
