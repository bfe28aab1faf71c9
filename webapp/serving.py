"""Serves the page."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


# Before gradio is imported: nothing leaves the machine, and what users upload is gone when the process ends.
_files = tempfile.TemporaryDirectory(prefix="sam-split-app-")
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=_files.name)

from checkpoint_tools.staging import ROOT  # noqa: E402
from finetuning.images import IMAGE_SUFFIXES  # noqa: E402

from .model import ModelSource, SharedModel, load_shared  # noqa: E402
from .page import LAUNCH_OPTIONS, Page  # noqa: E402


COINS = ROOT / "docs" / "images" / "coins.png"


class AppError(ValueError):
    """The page cannot be served."""


def serve(source: ModelSource, images: Path | None = None, port: int | None = None) -> None:
    """Serves the page on this machine alone, until the process is interrupted.

    Args:
        source: The model.
        images: Folder of images to choose from; None for the coins.
        port: None for a free one from 7860.

    Raises:
        AppError: If the model or the images cannot be read, or the port is taken.
    """
    try:
        page = page_of(load_shared(source), images_in(images), source)
    except ValueError as error:
        raise AppError(str(error)) from error
    try:
        page.blocks.launch(server_name="127.0.0.1", server_port=port, **LAUNCH_OPTIONS)
    except OSError as error:
        raise AppError(f"--port {port}: {error}") from error


def images_in(folder: Path | None) -> Mapping[str, Path]:
    """Returns the images in a folder and those below, by name; the coins without a folder.

    Raises:
        AppError: If there is none.
    """
    if folder is None:
        return {COINS.name: COINS}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise AppError(f"--images {folder}: expected a folder of images ({', '.join(IMAGE_SUFFIXES)}).")
    return {str(path.relative_to(folder)): path for path in paths}


def page_of(model: SharedModel, images: Mapping[str, Path], source: ModelSource) -> Page:
    """Returns the page of a model."""
    return Page(model, images, f"# Segment Anything\n{source}")
