"""Patterns of file names, such as `{stem}_mask.png`: which files belong together."""

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from .pillow_images import DataError


OF_WINDOWS = ("thumbs.db", "desktop.ini")  # files that its explorer writes and hides


@dataclass(frozen=True)
class Pattern:
    """A pattern of the ends of paths: `{stem}` is what files have in common, `*` is anything within a name.

    What precedes the pattern in a path, the folders, is a part of what files have in common.

    Args:
        text: The pattern, with `/` between folders.
        field: The name in braces.
        option: How errors name the pattern.

    Raises:
        DataError: If the field is missing.
    """

    text: str
    field: str = "stem"
    option: str = "pattern"

    def __post_init__(self) -> None:
        if self.text.count("{") != 1 or f"{{{self.field}}}" not in self.text:
            raise DataError([f"{self.option} {self.text}: expected {{{self.field}}} in it, once."])

    def keys(self, path: str) -> list[str]:
        """Returns what a relative path with `/` has in common with others, likeliest first; empty if it differs.

        There is more than one answer if `*` could take a part of the field: the longest field comes first.
        """
        path = unicodedata.normalize("NFC", path)
        matches = (re.fullmatch(self.expression(quantifier), path, re.IGNORECASE) for quantifier in ("+", "+?"))
        return list(dict.fromkeys(match["folder"] + match["key"] for match in matches if match))

    def value(self, path: str) -> str | None:
        """Returns the field of a path, as short as it can be and without the folders; None if the path differs."""
        match = re.fullmatch(self.expression("+?"), unicodedata.normalize("NFC", path), re.IGNORECASE)
        return match and match["key"]

    def expression(self, quantifier: str) -> str:
        """The pattern as a regular expression; the quantifier tells whether the field is as long as it can be."""
        special = {f"{{{self.field}}}": f"(?P<key>[^/]{quantifier})", "*": "[^/]*"}
        parts = re.split(r"(\{\w+\}|\*)", unicodedata.normalize("NFC", self.text))
        return "(?P<folder>(?:.*/)?)" + "".join(special.get(part, re.escape(part)) for part in parts)

    def filled(self, key: str) -> str:
        """The path of a file that has `key` in common with others."""
        folder, slash, name = key.rpartition("/")
        return folder + slash + self.text.replace(f"{{{self.field}}}", name)

    @property
    def is_of_several(self) -> bool:
        """Whether several files may belong to one key: a `*` stands for more than the suffix."""
        return "*" in self.text.removesuffix(".*")


def checked_folder(given: Path) -> Path:
    """Returns a path if it is a folder.

    Raises:
        DataError: If it is a file, or nothing.
    """
    if given.is_file():
        raise DataError([f"{given} is a file: expected its folder; patterns of names choose files in it."])
    if not given.is_dir():
        raise DataError([f"{given}: there is no such folder."])
    return given


def files_in(folder: Path) -> list[Path]:
    """Returns the files in a folder and those below it, also linked ones, without those that systems hide."""
    files: list[Path] = []
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := Path(place).resolve()) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not (name.startswith(".") or name.lower() in OF_WINDOWS)]
    return sorted(files)
