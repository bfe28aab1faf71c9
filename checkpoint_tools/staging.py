"""What all commands share: this checkout's classes, checkpoints, and folders written whole or not at all."""

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


def fetch(checkpoint: str, revision: str | None = None, token: str | None = None) -> Path:
    """Returns the folder `checkpoint`, or the one into which the model repo of this name is downloaded.

    Of the repo come the weights (safetensors where it has them), and the files that say what they are.
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
