"""What to install, in one line, where a package is missing or too old. This file itself needs none."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def needs(group: str) -> Iterator[None]:
    """Ends the process with one line if a package that the block imports is missing or too old.

    Args:
        group: The group of packages in pyproject.toml that the block needs.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if (Path(__file__).resolve().parents[1] / package).is_dir():  # ours, or unknown
            raise
        sys.exit(f"{Path(sys.argv[0]).name} " + remedy(error, f'".[{group}]"'))


def remedy(error: ImportError, install: str = "") -> str:
    """Returns what is needed of the package that an error names, and how it is installed.

    Args:
        error: One that has a name.
        install: What is to be installed; the package by default.
    """
    package = str(error.name).partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"needs {package}, which is not installed: pip install {install or package}"
    return f"needs another version of {package} ({error}): pip install --upgrade {install or package}"
