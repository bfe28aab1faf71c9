"""A headless Chromium that uses the page of `app.py` as people do, and takes pictures of it.

python finetune.py --image-size 192 --max-steps 150  # and then, with this adapter, it remakes those of docs/app.md:
python tests/browser.py build/finetune/adapter
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright


ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--disable-sync", "--no-first-run", "--disable-quic"]
COINS = (384, 303)  # width and height
WIDTH = 1100  # of the page, at which its text can be read where GitHub shows it smaller
MILLISECONDS = 40_000  # to wait for an answer


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def app(*arguments: str, script: Path = ROOT / "app.py", **environment: str) -> Iterator[str]:
    """Runs `app.py` in a process of its own and yields its URL."""
    port = free_port()
    command = [sys.executable, str(script), *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                urlopen(url)
                break
            except URLError:
                time.sleep(0.2)
        else:
            raise AssertionError(process.stdout.read())
        yield url
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def browser(url: str, dark: bool = False, height: int = 900, scale: float = 1) -> Iterator[Page]:
    """Opens the page and waits until it shows the coins. Fails at any request to elsewhere."""
    elsewhere: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = chromium.new_page(
            viewport={"width": WIDTH, "height": height},
            device_scale_factor=scale,
            color_scheme="dark" if dark else "light",
        )
        page.set_default_timeout(MILLISECONDS)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(url)
        page.locator("#picture img").wait_for()
        page.get_by_text("Click on an object", exact=True).wait_for()
        page.wait_for_function("document.querySelector('#picture img').complete")
        yield page
        chromium.close()
    assert not [request for request in elsewhere if not request.startswith((url, "data:", "blob:"))]


def click(page: Page, x: float, y: float, wait: bool = True) -> None:
    """Clicks on a place of the coins, in pixels of the image, and waits for the answer."""
    before = page.locator("#picture img").get_attribute("src")
    page.mouse.click(*on_screen(page, x, y))
    if wait:
        wait_for_change(page, before)


def drag(page: Page, start: tuple[float, float], stop: tuple[float, float], wait: bool = True) -> None:
    """Drags from one place of the coins to another, and waits for the answer."""
    before = page.locator("#picture img").get_attribute("src")
    page.mouse.move(*on_screen(page, *start))
    page.mouse.down()
    page.mouse.move(*on_screen(page, *stop), steps=3)
    assert page.locator("#drag-outline").is_visible()
    page.mouse.up()
    if wait:
        wait_for_change(page, before)
        page.get_by_text("Click on the opposite corner of the box.", exact=True).wait_for(state="hidden")


def on_screen(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the coins is shown."""
    image = page.locator("#picture img")
    image.element_handle().wait_for_element_state("stable")  # a picture of another shape moves what is around it
    box = image.bounding_box()
    return box["x"] + x / COINS[0] * box["width"], box["y"] + y / COINS[1] * box["height"]


def wait_for_change(page: Page, before: str) -> None:
    """Waits for another picture."""
    page.wait_for_function("before => document.querySelector('#picture img').src != before", arg=before)
    page.wait_for_function("document.querySelector('#picture img').complete")


def press(page: Page, name: str) -> None:
    """Presses a button, and waits for the picture to change."""
    before = page.locator("#picture img").get_attribute("src")
    page.get_by_role("button", name=name, exact=True).click()
    wait_for_change(page, before)


def download(page: Page, ending: str, folder: Path) -> Path:
    """Makes the files, and downloads the one whose name ends so."""
    page.get_by_role("button", name="Make files").click()
    link = page.locator(f"a[download$='{ending}']")
    link.wait_for()
    with page.expect_download() as waiting:
        link.click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def save_picture(page: Page, path: Path) -> None:
    """Saves a picture of the page that is small enough for the docs."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # animations
    page.screenshot(path=path, type="jpeg", quality=80)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main(adapter: str) -> None:
    """Takes the pictures."""
    folder = ROOT / "docs" / "images"
    with app("--adapter", adapter) as url:
        with browser(url, height=900, scale=1.25) as page:
            click(page, 335, 43)
            press(page, "Next object")
            click(page, 46, 125)
            press(page, "Next object")
            page.get_by_text("Box", exact=True).click()
            drag(page, (146, 235), (207, 294))
            save_picture(page, folder / "app.jpg")
            page.get_by_role("tab", name="Before and after").click()
            page.get_by_text("Objects: 3 before").wait_for()
            save_picture(page, folder / "app-before-after.jpg")
        with browser(url, dark=True, height=900, scale=1.25) as page:
            page.get_by_role("tab", name="All objects").click()
            press(page, "Find all objects")
            save_picture(page, folder / "app-all-objects.jpg")


if __name__ == "__main__":
    main(sys.argv[1])
