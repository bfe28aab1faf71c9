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
        command = Path(sys.argv[0]).name
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            sys.exit(f'{command} needs {package}, which is not installed: pip install ".[{group}]"')
        sys.exit(f'{command} needs another version of {package} ({error}): pip install --upgrade ".[{group}]"')
