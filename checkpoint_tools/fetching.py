"""Where checkpoints come from: folders and the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

from .messages import one_line


LICENCE_FILES = tuple(f"{name}*" for name in ("LICEN[CS]E", "Licen[cs]e", "licen[cs]e", "COPYING", "NOTICE"))


def fetch(checkpoint: str, revision: str | None = None, token: str | None = None, weights: bool = True) -> Path:
    """Returns `checkpoint` if it is a folder; otherwise downloads the Hub repo and returns its folder.

    JSON, code, card, licence and, unless `weights` is False, weights (preferably safetensors) are downloaded.

    Raises:
        ValueError: If there is none under this name, or it cannot be downloaded.
    """
    require_name(checkpoint, revision)
    if Path(checkpoint).is_dir():
        return Path(checkpoint).resolve()

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(checkpoint, revision=revision, token=token, allow_patterns=list(patterns)))

    try:
        folder = download("*.json", "*.py", "README.md", *LICENCE_FILES, *(["model*.safetensors"] if weights else []))
        return folder if not weights or any(folder.glob("model*.safetensors")) else download("pytorch_model*.bin")
    except GatedRepoError as error:
        raise ValueError(
            f"{checkpoint} is gated: accept its terms on its page on the Hub, and give your token."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{checkpoint} has no revision {revision}: choose another.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{checkpoint} is not a folder, and the Hub has no such model, or a private one for which a token is "
            "needed: check the name, or try checkpoints/sam-tiny."
        ) from error
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"{checkpoint} is not a folder, and could not be downloaded from the Hub: try checkpoints/sam-tiny, which "
            f"is here. ({one_line(error.__cause__ or error)})"
        ) from error


def require_name(checkpoint: str, revision: str | None = None) -> None:
    """Checks that `checkpoint` is a folder, or may be the name of a model on the Hub, which alone has revisions.

    Raises:
        ValueError: If it is neither, or a revision of a folder is asked for, which libraries would ignore.
    """
    if Path(checkpoint).is_dir():
        if revision is not None:
            raise ValueError(
                f"{checkpoint} is a folder, which has no revision {revision}: give a Hub id, or no revision."
            )
        return
    if Path(checkpoint).exists():
        raise ValueError(
            f"{checkpoint} is a file: expected a folder, or the Hub id of a model. (convert.py from-meta reads files.)"
        )
    try:
        validate_repo_id(checkpoint)
    except HFValidationError as error:
        raise ValueError(f"{checkpoint}: there is no such folder, and it is no Hub id, which is USER/NAME.") from error


def require_no_adapter(checkpoint: str, revision: str | None = None) -> None:
    """Checks that `checkpoint` is not an adapter alone, which transformers would load onto the base that it names.

    Raises:
        ValueError: If it is one.
    """
    config, adapter = (
        cached_file(checkpoint, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        for name in ("config.json", "adapter_config.json")
    )
    if adapter and not config:
        raise ValueError(
            f"{checkpoint} is an adapter: expected a whole model. Give the adapter as --adapter, or merge it with "
            "convert.py to-sam --adapter."
        )


def named_in(adapter_config: dict[str, Any]) -> tuple[str | None, str | None]:
    """Returns the base that an adapter names, and its revision, which a folder has none of."""
    base, revision = (adapter_config.get(name) for name in ("base_model_name_or_path", "revision"))
    return base, None if isinstance(base, str) and Path(base).is_dir() else revision


def is_hub_id(name: str) -> bool:
    """Whether this may be the Hub id of a model: USER/NAME."""
    return is_id(name) and name.count("/") == 1


def is_id(name: str) -> bool:
    """Whether this may be the name of something on the Hub, also of an old data set without a user."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
