"""What the command-line tools share: this checkout's classes, and folders that are written whole or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent


def split_class(name: str = "SamSplitModel") -> type[PreTrainedModel]:
    """Returns a model class of this checkout, as users of a model repo get it."""
    # The configuration first, as AutoModel does: transformers 5.0 would later import it a second time.
    get_class_from_dynamic_module("configuration_sam_split.SamSplitConfig", str(ROOT))
    return get_class_from_dynamic_module(f"modeling_sam_split.{name}", str(ROOT))


@contextlib.contextmanager
def staged(destination: Path, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of `destination` if the block ends without an error.

    What was there is removed only then, with `force`; a model that is memory-mapped on its files stays as it is.

    Raises:
        FileExistsError: If `destination` is a file, or a folder that is not empty and `force` is not given.
    """
    destination = destination.resolve()
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file, and a folder is to be written: choose another name.")
    if destination.exists() and any(destination.iterdir()) and not force:
        raise FileExistsError(f"{destination} is not empty: choose another folder, or replace it with --force.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as parent:
        folder, replaced = Path(parent, "new"), Path(parent, "replaced")
        folder.mkdir()
        yield folder
        if destination.exists():
            destination.rename(replaced)
        try:
            folder.rename(destination)
        except OSError:
            if replaced.exists():
                replaced.rename(destination)
            raise
