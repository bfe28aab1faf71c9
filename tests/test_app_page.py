"""The page of `app.py` as people and programs use it: in a browser, and with gradio's client."""

import json
import re
from collections.abc import Iterator

import browser
import httpx
import numpy as np
import pytest
import torch
from browser import click, download, drag, press
from gradio_client import Client, handle_file
from peft import LoraConfig, get_peft_model
from PIL import Image

from checkpoint_tools.checkout import ROOT, SAM_TINY, split_class
from image_data.coco_masks import decode
from image_data.sources import Coins
from segmentation.settings import SegmentationSettings


COINS = ROOT / "docs" / "images" / "coins.png"
needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="Chromium is missing: apt-get install chromium, or put one on the PATH"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page, with an adapter that changes the masks a little, and its own thresholds."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    adapter = tmp_path_factory.mktemp("adapter")
    get_peft_model(split_class().from_pretrained(SAM_TINY), config).save_pretrained(adapter)
    SegmentationSettings(min_iou=0.31, min_stability=0.5, grid=6).save(adapter)
    with browser.app("--adapter", str(adapter)) as url:
        yield url


def coin_at(x: int, y: int) -> np.ndarray:
    """The labelled coin there, bool (H, W)."""
    labels = Coins().read().labels
    assert labels[y, x], "no coin"
    return labels == labels[y, x]


@needs_chromium
def test_a_click_on_a_coin_gives_a_mask_that_covers_it(url, tmp_path):
    with browser.browser(url) as page:
        click(page, 190, 260)
        page.get_by_text("1 object.").wait_for()
        press(page, "Next object")
        page.get_by_text("Box", exact=True).click()
        drag(page, (24, 102), (70, 147))
        page.get_by_text("2 objects.").wait_for()
        assert not page.locator("#drag-outline").count()
        content = json.loads(download(page, "annotations.json", tmp_path).read_text())
        labels = np.asarray(Image.open(download(page, "labels.png", tmp_path)))
        press(page, "Undo")
        page.get_by_role("tab", name="Before and after").click()
        page.get_by_text("Objects: 1 before, 1 after.").wait_for()
        page.get_by_role("button", name="Clear").click()
        page.get_by_text("Click on an object").wait_for()
        page.get_by_role("button", name="Next object").click()
        page.get_by_text("There is no mask to keep: click on an object first.").wait_for()
        assert page.locator("#picture img").is_visible(), "a message leaves the page as it is"
    assert len(content["annotations"]) == labels.max() == 2
    for number, (entry, place) in enumerate(zip(content["annotations"], [(190, 260), (46, 125)], strict=True), 1):
        coin = coin_at(*place)
        mask = decode(entry["segmentation"], coin.shape)
        assert mask[coin].mean() > 0.9, f"mask {number} does not cover the coin"
        assert mask.mean() < 0.3, f"mask {number} covers everything"


@needs_chromium
def test_no_click_is_lost_and_those_that_mean_nothing_are_answered(url):
    """Clicks that are faster than their answers; a box by two clicks, one that leaves the picture, one of no size."""
    with browser.browser(url) as page:
        for x in (185, 190, 195):
            click(page, x, 260, wait=False)
        page.get_by_text("1 object.").wait_for()
        for _ in range(3):
            page.get_by_role("button", name="Undo").click()
        page.get_by_text("Click on an object", exact=True).wait_for()
        assert not page.get_by_text("There is nothing to undo.").count()
        page.get_by_role("button", name="Undo").click()
        page.get_by_text("There is nothing to undo.").wait_for()
        page.get_by_text("Box", exact=True).click()
        click(page, 24, 102)
        page.get_by_text("opposite corner", exact=True).wait_for()
        click(page, 24, 102, wait=False)
        page.get_by_text("Both corners are on one line").wait_for()
        click(page, 70, 147)
        page.get_by_text("1 object.").wait_for()
        drag(page, (310, 20), (500, 70))
        page.get_by_text("1 object.").wait_for()
        press(page, "Next object")
        for _ in range(3):
            page.get_by_role("button", name="Next object").click()
        page.get_by_text("There is no mask to keep: click on an object first.").first.wait_for()


@needs_chromium
def test_what_is_clicked_while_the_next_picture_is_on_its_way_waits_for_it(url):
    """A point, a box by dragging and Undo, on a slow connection: gradio drops clicks on half a picture."""
    with browser.browser(url) as page:
        page.route("**/file=**", lambda route: None)  # not answered before `unroute`
        click(page, 190, 260, wait=False)
        page.get_by_text("1 object.").wait_for()
        page.wait_for_function("!document.querySelector('#picture img').complete")
        click(page, 195, 260, wait=False)
        page.get_by_role("button", name="Undo").click()
        page.get_by_text("Box", exact=True).click()
        drag(page, (24, 102), (70, 147), wait=False)
        page.get_by_role("button", name="Next object").click()
        page.unroute("**/file=**")
        page.get_by_text("Click on the next one.").wait_for()
        for _ in range(4):  # the box is one action for each corner
            press(page, "Undo")
        page.get_by_text("Click on an object", exact=True).wait_for()
        page.get_by_role("button", name="Undo").click()
        page.get_by_text("There is nothing to undo.").wait_for()


@needs_chromium
def test_what_is_clicked_while_an_answer_is_on_its_way_counts(url):
    """Another mask, and Next object: gradio drops a second event of a kind unless told otherwise."""
    with browser.browser(url) as page:
        click(page, 190, 260)
        page.get_by_text("1 object.").wait_for()
        page.route("**/queue/data**", lambda route: None)  # not answered before `unroute`
        for name in ("Single", "A", "C"):
            page.get_by_role("radio", name=re.compile(rf"^{name} 0")).click()
        for x, y in ((335, 43), (46, 125)):
            page.get_by_role("button", name="Next object").click()
            click(page, x, y, wait=False)
        page.unroute("**/queue/data**")
        page.get_by_text("3 objects.").wait_for()
        for _ in range(4):
            press(page, "Undo")
        page.get_by_text("1 object.").wait_for()
        assert page.get_by_role("radio", name=re.compile("^C 0")).is_checked()


@needs_chromium
def test_the_images_of_the_folder_stay_at_hand_after_an_upload(url, tmp_path):
    Image.new("RGB", (60, 200), "grey").save(tmp_path / "mine.png")
    with browser.browser(url) as page:
        source = page.locator("#picture img").get_attribute("src")
        page.get_by_test_id("Upload-upload-button").set_input_files(tmp_path / "mine.png")
        page.wait_for_function("before => document.querySelector('#picture img').src != before", arg=source)
        assert page.get_by_label("Image", exact=True).input_value() == ""
        page.get_by_label("Image", exact=True).click()
        page.get_by_role("option", name="coins.png").click()
        page.wait_for_function("document.querySelector('#picture img').naturalWidth == 1024")
        click(page, 190, 260)
        page.get_by_text("1 object.").wait_for()


@needs_chromium
def test_each_user_has_an_image_of_their_own(url, tmp_path):
    """Uploaded in one browser, it is not seen in another; a file that is no image is named."""
    Image.fromarray(np.asarray(Image.open(COINS))[:, :300]).save(tmp_path / "mine.png")
    (tmp_path / "text.png").write_text("text")
    with browser.browser(url) as page, page.context.browser.new_context() as context:
        other = context.new_page()
        other.goto(url)
        other.get_by_text("Click on an object").wait_for()
        source = page.locator("#picture img").get_attribute("src")
        page.get_by_test_id("Upload-upload-button").set_input_files(tmp_path / "text.png")
        page.get_by_text("text.png: ").wait_for()
        page.get_by_test_id("Upload-upload-button").set_input_files(tmp_path / "mine.png")
        page.wait_for_function("before => document.querySelector('#picture img').src != before", arg=source)
        other.get_by_text("Point outside").click()
        click(page, 150, 150)
        page.get_by_text("1 object.").wait_for()
        assert "mine" in download(page, "labels.png", tmp_path).name
        assert other.locator("#picture img").get_attribute("src") == source
        assert other.get_by_text("Click on an object").is_visible()


def test_programs_segment_with_the_clicks_or_with_the_adapters_own_thresholds(url, tmp_path):
    client = Client(url, verbose=False, download_files=tmp_path)
    content = client.predict(handle_file(COINS), [[190, 260, 1]], None, api_name="/segment")
    assert [entry["image_id"] for entry in content["annotations"]] == [1]
    mask = decode(content["annotations"][0]["segmentation"], (303, 384))
    assert mask[coin_at(190, 260)].mean() > 0.9
    everything = client.predict(handle_file(COINS), None, None, api_name="/segment")["annotations"]
    assert len(everything) > 1
    assert min(entry["score"] for entry in everything) >= 0.31
    with pytest.raises(Exception, match="points: expected 3 numbers each"):
        client.predict(handle_file(COINS), [[190]], None, api_name="/segment")


def test_files_of_the_server_cannot_be_read(url):
    data = [{"path": str(COINS), "meta": {"_type": "gradio.FileData"}}, None, None]
    event = httpx.post(f"{url}/gradio_api/call/segment", json={"data": data}).json()["event_id"]
    assert "event: error" in httpx.get(f"{url}/gradio_api/call/segment/{event}", timeout=60).text
    for secret in (ROOT / "LICENSE", "/etc/passwd"):
        assert httpx.get(f"{url}/gradio_api/file={secret}").status_code in (403, 404)
