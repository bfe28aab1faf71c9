"""Shared by all commands: model classes, checkpoint download, atomically written folders."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
SAM_TINY = ROOT / "checkpoints" / "sam-tiny"


def split_class(name: str = "SamSplitModel") -> type[PreTrainedModel]:
    """Returns a model class of this checkout, as users of a model repo get it."""
    # The configuration first, as AutoModel does: transformers 5.0 would later import it a second time.
    get_class_from_dynamic_module("configuration_sam_split.SamSplitConfig", str(ROOT))
    return get_class_from_dynamic_module(f"modeling_sam_split.{name}", str(ROOT))


@contextlib.contextmanager
def staged(destination: Path, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder and renames it to `destination` if the block succeeds.

    With `force`, an existing folder is replaced at that moment. Models memory-mapped on its files stay valid.

    Raises:
        FileExistsError: If `destination` is a file, or a folder that is not empty and `force` is not given.
    """
    destination = destination.resolve()
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file, expected a folder: choose another name.")
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


def fetch(checkpoint: str, revision: str | None = None, token: str | None = None) -> Path:
    """Returns `checkpoint` if it is a folder; otherwise downloads the Hub repo and returns its folder.

    Weights (preferably safetensors), JSON, code and card are downloaded.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint).resolve()

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(checkpoint, revision=revision, token=token, allow_patterns=list(patterns)))

    folder = download("*.json", "model*.safetensors", "*.py", "README.md")
    return folder if any(folder.glob("model*.safetensors")) else download("pytorch_model*.bin")


def one_line(message: object) -> str:
    """Returns a message, such as an error's, without its line breaks."""
    return " ".join(str(message).split())
