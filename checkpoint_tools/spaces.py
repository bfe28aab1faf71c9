"""Stages the page of `app.py` as a Space of the Hub, starts it from the staged folder, and pushes it."""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from huggingface_hub.repocard_data import CardData
from jinja2 import Template

from .card_parsing import ParsedCard, read_card
from .checkout import ROOT
from .config_files import read_json
from .fetching import is_hub_id
from .licences import UNKNOWN, Licence, stated_licence
from .output_folders import staged
from .push_to_hub import Destination, check_destination, explain, print_files, push, read_token
from .space_verification import verify_space


TEMPLATE = Path(__file__).with_name("space_card_template.md")
EXAMPLE = Path("docs", "images", "coins.png")
# All files of a Space. A push replaces or deletes files of an earlier push that match.
FILES = ("README.md", "LICENSE", "app.py", "requirements.txt", "*_sam_split.py", str(EXAMPLE))
PACKAGES = ("checkpoint_tools", "image_data", "segmentation", "webapp")
NEEDED_BY_NAME = {"torch", "gradio", "transformers", "peft"}  # whatever imports them
RESULTS = re.compile(r"\b(iou|dice|accuracy|precision|recall|score|map|ap|msa|before|after)\b", re.IGNORECASE)


@dataclass(frozen=True)
class PinnedModel:
    """A model on the Hub, at one commit of each of its parts.

    Args:
        base: Hub id of the base.
        base_commit: Its commit.
        adapter: Hub id of an adapter; None for the base alone.
        adapter_commit: Its commit.
        needs_token: Whether it is private or gated.
    """

    base: str
    base_commit: str
    adapter: str | None = None
    adapter_commit: str | None = None
    needs_token: bool = False

    @property
    def described(self) -> tuple[str, str]:
        """Hub id and commit of what the card of the Space is about."""
        if self.adapter and self.adapter_commit:
            return self.adapter, self.adapter_commit
        return self.base, self.base_commit


def upload_space(
    destination: Destination,
    base: str | None,
    base_revision: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    output: Path | None = None,
    force: bool = False,
    token_file: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Stages a Space for a model on the Hub, starts it from the staged folder, and pushes it.

    Args:
        destination: Where to push to.
        base: Hub id of a SAM v1; None for that of the adapter.
        base_revision: Its branch, tag or commit; the Space will keep the commit that this is now.
        adapter: Hub id of an adapter.
        adapter_revision: Its branch, tag or commit.
        output: The folder to keep what is staged in; None for a temporary one.
        force: Replaces an earlier output in `output`.
        token_file: A file with a token; None for the token that the machine is logged in with.
        dry_run: Stages and starts it, and pushes nothing.

    Raises:
        ValueError: If the model is not on the Hub, the Space does not start, or the Hub refuses.
        FileExistsError: If `output` may not be written.
    """
    token = read_token(token_file)
    api = HfApi(token=token)
    head = None if dry_run else check_destination(api, destination)
    model = pinned(api, base, base_revision, adapter, adapter_revision)
    card, licence = card_of(model, token)
    with tempfile.TemporaryDirectory(prefix="sam-split-space-") as temporary:
        output = output or Path(temporary, "space")
        with staged(output, "Space", force) as folder:
            stage_space(folder, destination.repo_id, model, card, licence)
            print("Starting it in a new process ...", flush=True)
            mask = verify_space(folder, EXAMPLE, api.endpoint, token if model.needs_token else None)
        print(f"It answers: a click on {EXAMPLE.name} gives a mask of {mask:,} pixels.")
        if model.needs_token:
            print("Note: the model is private or gated: add a secret HF_TOKEN in the settings of the Space.")
        print_files(output, f"Would push to {destination.repo_id}:" if dry_run else "Staged:")
        if not dry_run:
            patterns = (*FILES, *(f"{package}/*" for package in PACKAGES))
            commit = push(api, destination, output, head, patterns)
            print(f"{commit.pr_url or commit.repo_url}\nCommit {commit.oid}. The Hub builds it now.")


def pinned(
    api: HfApi, base: str | None, base_revision: str | None, adapter: str | None, adapter_revision: str | None
) -> PinnedModel:
    """Returns the commits that these revisions are now.

    Raises:
        ValueError: If one is not on the Hub.
    """
    token = api.token if isinstance(api.token, str) else None
    adapter_info = model_info(api, adapter, adapter_revision) if adapter else None
    if base is None:
        if adapter is None or adapter_info is None:
            raise ValueError("--space: expected the Hub id of a model with --base, or of an adapter with --adapter.")
        config = read_json(download(adapter, adapter_info.sha, "adapter_config.json", token))
        base, base_revision = config.get("base_model_name_or_path"), base_revision or config.get("revision")
        if not isinstance(base, str) or not is_hub_id(base):
            raise ValueError(f"{adapter}: its base {base!r} is not on the Hub: name one that is with --base.")
    info = model_info(api, base, base_revision)
    infos = [each for each in (info, adapter_info) if each]
    return PinnedModel(
        base,
        str(info.sha),
        adapter,
        str(adapter_info.sha) if adapter_info else None,
        any(each.private or each.gated for each in infos),
    )


def model_info(api: HfApi, name: str, revision: str | None) -> ModelInfo:
    """Returns what the Hub knows of a model.

    Raises:
        ValueError: If there is none.
    """
    if not is_hub_id(name):
        raise ValueError(f"{name}: a Space loads its model from the Hub, where names are USER/NAME. Push it first.")
    try:
        return api.model_info(name, revision=revision)
    except HTTPError as error:
        raise ValueError(explain(error, name)) from error


def download(name: str, commit: str | None, file: str, token: str | None) -> Path:
    """Returns the path of one file of a model.

    Raises:
        ValueError: If it cannot be downloaded.
    """
    try:
        return Path(hf_hub_download(name, file, revision=commit, token=token))
    except (HTTPError, OSError) as error:
        raise ValueError(f"{name}: {file} cannot be downloaded: {error}") from error


def card_of(model: PinnedModel, token: str | None) -> tuple[ParsedCard, Licence]:
    """Returns the card of the model, and the licence that it states."""
    name, commit = model.described
    try:
        path = Path(hf_hub_download(name, "README.md", revision=commit, token=token))
    except EntryNotFoundError:
        return ParsedCard(), Licence()
    card = read_card(path)
    return card, stated_licence(card.metadata, path.parent, f"https://huggingface.co/{name}/blob/{commit}")


def stage_space(folder: Path, repo_id: str, model: PinnedModel, card: ParsedCard, licence: Licence) -> None:
    """Writes the page, the code that it imports, requirements and README into `folder`."""
    files, imported = code_of_page()
    for path in (*files, *map(Path, ("LICENSE", str(EXAMPLE)))):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    (folder / "requirements.txt").write_text(requirements(imported), encoding="utf-8")
    (folder / "README.md").write_text(readme(model, card, licence), encoding="utf-8")
    source = "".join(
        f"        {name}={json.dumps(value)},\n"
        for name, value in (
            ("base", model.base),
            ("revision", model.base_commit),
            ("adapter", model.adapter),
            ("adapter_revision", model.adapter_commit),
        )
        if value
    )
    (folder / "app.py").write_text(
        '"""Segment Anything, to click on. Written by `upload.py --space` of sam-split."""\n\n'
        "from webapp.model import ModelSource\nfrom webapp.serving import serve_space\n\n\n"
        f"serve_space(\n    ModelSource(\n{source}    )\n)\n",
        encoding="utf-8",
    )


def code_of_page() -> tuple[list[Path], set[str]]:
    """Returns the files of this checkout that the page imports, and the packages that these import."""
    finder = ModuleFinder(path=[str(ROOT)])
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write("import webapp.serving\n")
        script.flush()
        finder.run_script(script.name)
    paths = {name: getattr(module, "__file__", None) for name, module in finder.modules.items()}
    ours = [Path(path) for name, path in paths.items() if path and name.split(".")[0] in PACKAGES]
    code = [path.relative_to(ROOT) for path in (*ours, *ROOT.glob("*_sam_split.py"))]
    return sorted(code), {name.split(".")[0] for name in finder.any_missing()}


def requirements(imported: set[str]) -> str:
    """Returns the imported packages in the versions that are installed here, but for gradio, which the Hub adds."""
    distributions = packages_distributions()
    names = {distributions[name][0] for name in imported | NEEDED_BY_NAME if name in distributions}
    lines = [f"{name}=={version(name).partition('+')[0]}" for name in sorted(names - {"gradio"}, key=str.lower)]
    return "\n".join(lines) + "\n"


def readme(model: PinnedModel, card: ParsedCard, licence: Licence) -> str:
    """Returns the README of the Space: its metadata, and what its page says of the model."""
    name, commit = model.described
    title = f"Segment Anything: {name.rpartition('/')[2]}"
    metadata: dict[str, Any] = {
        "title": title,
        "emoji": "✂️",
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",  # for which the requirements exist
        "app_file": "app.py",
        "short_description": "Click on an object to see its mask",  # the Hub takes at most 60 characters
        "models": [each for each in (model.adapter, model.base) if each],
        "license": licence.id or UNKNOWN,
        "license_name": licence.name,
        "license_link": licence.link if (licence.link or "").startswith("https://") else None,
        "pinned": False,
    }
    link = f"[{name}](https://huggingface.co/{name}/tree/{commit})"
    if model.adapter:
        link += f" on [{model.base}](https://huggingface.co/{model.base}/tree/{model.base_commit})"
    return Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        metadata=CardData(**{key: value for key, value in metadata.items() if value is not None}).to_yaml(),
        title=title,
        model=link,
        adapter=model.adapter,
        licence=str(licence),
        results=results_of(card),
        code=loading_code(model),
    )


def results_of(card: ParsedCard) -> str:
    """Returns the results that a card states: those of its metadata, or else the tables of its text with a metric."""
    if card.results:
        rows = [
            f"| {each.dataset_name} | {each.metric_name or each.metric_type} | {each.metric_value:.4g} |"
            for each in card.results
        ]
        return "\n".join(["From the model's card:\n", "| data | metric | value |", "|---|---|---|", *rows])
    blocks = re.split(r"\n\s*\n", card.text)
    tables = [
        "\n\n".join(part for part in blocks[max(0, index - 1) : index + 1] if not part.startswith("#"))
        for index, block in enumerate(blocks)
        if block.startswith("|") and RESULTS.search(block)
    ]
    if not tables:
        return "The model's card states no results."
    return "\n\n".join(["From the model's card:", *tables])


def loading_code(model: PinnedModel) -> str:
    """Returns Python code that loads the model as the page does, in a copy of the Space or a checkout of sam-split."""
    function = "load_adapted" if model.adapter else "load_base"
    arguments = [model.adapter, model.base, model.base_commit] if model.adapter else [model.base, model.base_commit]
    values = [f'"{argument}"' for argument in arguments]
    if model.adapter:
        values.append(f'adapter_revision="{model.adapter_commit}"')
    lines = "".join(f"    {value},\n" for value in values)
    return f"from segmentation.adapted_model import {function}\n\nmodel, processor = {function}(\n{lines})"
