"""The licence of weights: as their authors state it, with its file and its link, and never invented."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


UNKNOWN = "unknown"  # the Hub's own name for it
OTHER = "other"  # the Hub's name for licences that it does not know
CODE_LICENCE = "LICENSE-code"  # of the `*_sam_split.py` files
FILE = re.compile(r"(licen[cs]e|copying|notice)([._-][\w.-]*)?(?<!\.py)(?<!\.json)", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """A licence in the names of the Hub.

    Args:
        id: The Hub's names of it, such as "apache-2.0"; None if it is unknown.
        name: Name of a licence that the Hub does not know.
        link: A URL, or the name of a file in the repo.
        files: Names of its files in the folder of the weights.
    """

    id: str | list[str] | None = None
    name: str | None = None
    link: str | None = None
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        ids = self.id or UNKNOWN
        return self.name or (ids if isinstance(ids, str) else ", ".join(ids))

    @property
    def problem(self) -> str | None:
        """What is missing before a model may be pushed, None if it is nothing."""
        if self.id is None:
            return (
                "its licence is unknown, because its card names none: give the one that its authors have given it, "
                "with --license"
            )
        if OTHER in ([self.id] if isinstance(self.id, str) else self.id) and not (self.name and self.link):
            return f"its licence is '{OTHER}': give --license-name and --license-link, which the Hub wants for that"
        return None


def stated_licence(metadata: dict[str, Any], folder: Path, url: str | None = None) -> Licence:
    """Returns the licence that the card of the weights states.

    Args:
        metadata: The metadata of the card.
        folder: The folder of the weights.
        url: Address of the files of `folder`, if it is on the Hub; for links to files that are not copied.
    """
    stated, link = metadata.get("license"), metadata.get("license_link")
    files = {path.name for path in folder.iterdir() if path.is_file() and FILE.fullmatch(path.name)} - {CODE_LICENCE}
    if link and not link.startswith(("https://", "http://")):
        if is_plain_file(folder, link):
            files.add(link)
        else:
            link = f"{url}/{link}" if url and not link.startswith("/") else None
    return Licence(None if stated == UNKNOWN else stated, metadata.get("license_name"), link, tuple(sorted(files)))


def is_plain_file(folder: Path, name: str) -> bool:
    """Whether `name` is a file in `folder` itself, and of a kind that nothing runs or loads."""
    path = Path(name)
    return path.name == name and path.suffix in ("", ".md", ".txt", ".pdf", ".rst") and (folder / name).is_file()


def combined(stated: Licence, given: Licence, folder: Path) -> Licence:
    """Returns the licence that the card of the weights in `folder` states, completed by what is given.

    Raises:
        ValueError: If they contradict each other, or the link leads nowhere.
    """
    for option, ours, theirs in (
        ("--license", given.id, stated.id),
        ("--license-name", given.name, stated.name),
        ("--license-link", given.link, stated.link),
    ):
        if ours and theirs and ours != theirs:
            raise ValueError(f"{option} {ours}: the base's card says {theirs}, and a licence is not changed here.")
    files = set(stated.files)
    if given.link and not given.link.startswith(("https://", "http://")):
        if not is_plain_file(folder, given.link):
            raise ValueError(f"--license-link {given.link}: expected a URL, or a text file beside the base.")
        files.add(given.link)
    return Licence(stated.id or given.id, stated.name or given.name, stated.link or given.link, tuple(sorted(files)))
