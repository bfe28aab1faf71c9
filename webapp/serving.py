"""Serves the page."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


# Before gradio is imported: nothing leaves the machine, and what users upload is gone when the process ends.
_files = tempfile.TemporaryDirectory(prefix="sam-split-app-")
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=_files.name)

from checkpoint_tools.checkout import ROOT  # noqa: E402
from image_data.images import IMAGE_SUFFIXES  # noqa: E402

from .model import ModelSource, load_shared  # noqa: E402
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
        ValueError: If the model or the images cannot be read, or the port is taken.
    """
    page = Page(load_shared(source), images_in(images), about(source))
    try:
        _, url, _ = page.blocks.launch(
            server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **LAUNCH_OPTIONS
        )
    except OSError as error:
        taken = f"--port {port} is taken, or not yours to use" if port else "All ports from 7860 to 7959 are taken"
        raise AppError(f"{taken}: choose another with --port.") from error
    print(f"The page is at {url} (Ctrl-C ends it).", flush=True)
    page.blocks.block_thread()


def serve_space(source: ModelSource) -> None:
    """Serves the page of a Space, whose README says what the model is.

    Raises:
        ValueError: If the model cannot be read.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    *_, about = text.split("\n---\n", 1)  # without the metadata
    about, _, details = about.partition("\n## ")
    Page(load_shared(source), images_in(None), about, f"## {details}").blocks.launch(**LAUNCH_OPTIONS)


def images_in(folder: Path | None) -> Mapping[str, Path]:
    """Returns the images in a folder and those below, by name; the coins without a folder.

    Raises:
        AppError: If there is none.
    """
    if folder is None:
        return {COINS.name: COINS}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    images = {path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(".")}
    if not images:
        raise AppError(f"--images {folder}: expected a folder of images ({', '.join(IMAGE_SUFFIXES)}).")
    return images


def about(source: ModelSource) -> str:
    """Returns what the page says of the model, Markdown."""
    base = f"`{source.base or 'sam-tiny'}`"
    model = f"`{source.adapter}`{f' on {base}' if source.base else ''}" if source.adapter else base
    return f"# Segment Anything\nModel: {model}"
