"""Starts a staged Space in a process of its own, and clicks on an image."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from gradio_client import Client, handle_file


SECONDS = 1800  # for the download of the model, and its first answer
CLICK = [190, 260, 1]  # in a coin


def verify_space(folder: Path, example: Path, endpoint: str, token: str | None) -> int:
    """Runs `app.py` of a staged Space with empty caches, and returns the size of the mask at a click, in pixels.

    Args:
        folder: The staged Space. Nothing is written into it.
        example: Path of an image in it.
        endpoint: URL of the Hub.
        token: Token with which the Space would load its model; None for none.

    Raises:
        ValueError: If it does not start, or gives no mask.
    """
    with tempfile.TemporaryDirectory(prefix="sam-split-space-") as home, open(f"{home}/log", "w+") as log:
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {
            "HF_HOME": home,
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": token or "",
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_it_answers(url, process)
            image = handle_file(folder / example)
            client = Client(url, verbose=False, download_files=False)
            content = client.predict(image, [CLICK], None, api_name="/segment")
            return int(content["annotations"][0]["area"])
        except Exception as error:  # of whatever the page raises
            log.seek(0)
            reason = next((line.strip() for line in reversed(log.readlines()) if line.strip()), str(error))
            raise ValueError(f"The staged Space does not work: {reason}") from error
        finally:
            process.terminate()
            process.wait()


def wait_until_it_answers(url: str, process: subprocess.Popen) -> None:
    """Waits for the page.

    Raises:
        TimeoutError: If it does not come in time.
        ChildProcessError: If the process ends.
    """
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ChildProcessError(f"it ended with exit status {process.returncode}.")
        try:
            httpx.get(url, timeout=10)
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(f"it has not answered in {SECONDS} seconds.")


def free_port() -> int:
    """Returns the number of a port of this machine that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
