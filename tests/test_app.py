"""The page of `app.py` without a browser: what a user does, and what comes of it."""

import pickle
import socket
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, SamModel

import app
from checkpoint_tools.checkout import ROOT, SAM_TINY, split_class
from segmentation.settings import SegmentationSettings
from webapp import session as actions
from webapp import zero_gpu
from webapp.drawing import draw, draw_masks
from webapp.handlers import (
    choices_of,
    message_of,
    raises,
    required,
    segment_file,
    settings_of,
    status_of,
    table_of,
    warns,
)
from webapp.model import SharedModel
from webapp.open_image import OpenImage, open_file
from webapp.screen_scaling import LONG_SIDE, place_in_image
from webapp.session import ActionError, Session


COINS = ROOT / "docs" / "images" / "coins.png"
COIN, OTHER_COIN = (335.5, 43.5), (277.5, 53.5)
SETTINGS = SegmentationSettings(min_iou=0.3, min_stability=0.3, grid=5)


@pytest.fixture(scope="module")
def model() -> SharedModel:
    """With an adapter that changes the masks."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False, task_type="FEATURE_EXTRACTION")
    adapted = get_peft_model(split_class().from_pretrained(SAM_TINY), config).eval()
    return SharedModel(adapted, AutoProcessor.from_pretrained(SAM_TINY), SETTINGS)


@pytest.fixture(scope="module")
def coins(model: SharedModel) -> Session:
    return Session(open_file(model, COINS))


@pytest.fixture(scope="module")
def stock() -> SamModel:
    return SamModel.from_pretrained(SAM_TINY).eval()


def masks_of(stock: SamModel, pixels: np.ndarray, multimask: bool, **prompts) -> np.ndarray:
    """As the documentation of transformers makes them."""
    processor = AutoProcessor.from_pretrained(SAM_TINY)
    inputs = processor(Image.fromarray(pixels), return_tensors="pt", **prompts)
    sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes")]
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        outputs = stock(**inputs, multimask_output=multimask)
    return processor.post_process_masks(outputs.pred_masks, *sizes)[0][0].numpy()


def assert_same_masks(segments, expected: np.ndarray) -> None:
    assert len(segments) == len(expected)
    for segment, mask in zip(segments, expected, strict=True):
        assert mask.any()
        assert np.mean(segment.full(mask.shape) != mask) < 1e-4  # but for pixels at the threshold


def test_a_click_gives_the_masks_of_stock_sam_with_and_without_the_adapter(model, coins, stock):
    session = actions.add_click(coins, COIN, "inside")
    session = actions.add_click(session, OTHER_COIN, "outside")
    prompts = {"input_points": [[[*map(list, (COIN, OTHER_COIN))]]], "input_labels": [[[1, 0]]]}
    without = session.image.masks(session.marks.prompt.prompted, adapted=False)
    copy = split_class().from_pretrained(SAM_TINY)
    copy.load_state_dict(merged_weights(model))
    merged = copy.to_sam().eval()
    for masks, oracle in ((without, stock), (session.masks, merged)):
        for part, multimask in ((masks[:3], True), (masks[3:], False)):
            assert_same_masks(part, masks_of(oracle, session.image.pixels, multimask, **prompts))
    assert (without[3].full((303, 384)) != session.masks[3].full((303, 384))).mean() > 0.001, (
        "the adapter does nothing"
    )


def merged_weights(model: SharedModel) -> dict[str, torch.Tensor]:
    """Those of the base with the adapter added to them, by its definition: W + B A alpha / r."""
    peft = model.model
    state = {
        name.replace(".base_layer", ""): value.clone()
        for name, value in peft.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    config = peft.peft_config["default"]
    lora = {name: value for name, value in peft.get_base_model().state_dict().items() if "lora_" in name}
    for name, down in lora.items():
        if ".lora_A." in name:
            up = lora[name.replace("lora_A", "lora_B")]
            state[name.split(".lora_A.")[0] + ".weight"] += up @ down * config.lora_alpha / config.r
    return state


def test_two_clicks_make_a_box(coins, stock):
    session = actions.add_click(coins, (362, 70), "box")
    assert "opposite corner" in status_of(session)
    assert not session.masks
    session = actions.add_click(session, (310, 18), "box")  # from the lower right to the upper left
    prompt = session.marks.prompt
    assert (prompt.box, prompt.corner) == ((310, 18, 362, 70), None)
    assert session.choice == 3, "a box means one object"
    expected = masks_of(stock, session.image.pixels, False, input_boxes=[[[310, 18, 362, 70]]])
    assert_same_masks(session.image.masks(prompt.prompted, adapted=False)[3:], expected)


def test_objects_are_kept_chosen_removed_and_brought_back(coins):
    first = actions.add_click(coins, COIN, "inside")
    assert [label for label, _ in choices_of(first)] == [
        f"{name} {mask.rating:.2f}" for name, mask in zip(["A", "B", "C", "Single"], first.masks, strict=True)
    ]
    assert first.choice == np.argmax([mask.rating for mask in first.masks[:3]])
    other = actions.choose_mask(first, 3)
    assert other.segments == [other.masks[3]]
    both = actions.add_click(actions.finish_object(other), OTHER_COIN, "inside")
    assert [row[:2] for row in table_of(both)] == [[1, other.masks[3].area], [2, both.current.segment.area]]
    assert actions.remove_object(both, 1).segments == [*map(equal, both.segments[1:])]
    assert len(actions.remove_object(both, 2).segments) == 1
    assert not actions.clear(both).segments
    session = actions.clear(both)
    for expected in (both, actions.finish_object(other), other, first, coins):
        session = actions.undo(session)
        assert session.marks == expected.marks or session.marks.prompt == expected.marks.prompt
        assert [s.area for s in session.segments] == [s.area for s in expected.segments]
    with pytest.raises(ActionError, match="nothing to undo"):
        actions.undo(session)


class equal:
    """Equals segments with the same mask."""

    def __init__(self, segment):
        self.segment = segment

    def __eq__(self, other):
        return self.segment.box == other.box and np.array_equal(self.segment.crop, other.crop)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda session: actions.add_click(session, (400, 10), "inside"), "outside of the image of 384 x 303"),
        (lambda session: actions.finish_object(session), "no mask to keep"),
        (lambda session: actions.choose_mask(session, 0), "no mask to choose"),
        (lambda session: actions.remove_object(session, 1), "no object 1"),
        (lambda session: actions.find_all(session, replace(SETTINGS, min_iou=1.0)), "rated 1 or higher"),
        (
            lambda session: actions.find_all(session, replace(SETTINGS, min_stability=1.0)),
            "a stability of 1",
        ),
        (lambda session: [session := actions.add_click(session, (9, 9), "box") for _ in "ab"], "on one line"),
    ],
)
def test_what_is_not_possible_is_said(coins, action, message):
    with pytest.raises(ActionError, match=message):
        action(coins)


def test_the_grid_finds_objects_and_thresholds_apply_without_another_run(coins, monkeypatch):
    session = actions.find_all(coins, SETTINGS)
    assert len(session.segments) > 1
    monkeypatch.setattr(OpenImage, "candidates", lambda *args, **kwargs: pytest.fail("the model runs again"))
    ratings = sorted(segment.rating for segment in session.segments)
    stricter = actions.find_all(session, replace(SETTINGS, min_iou=ratings[-1]))
    assert [segment.rating for segment in stricter.segments] == [ratings[-1]]
    assert len(actions.find_all(stricter, SETTINGS).segments) == len(session.segments)


def test_too_many_masks_are_neither_drawn_nor_kept(coins, monkeypatch):
    everything = replace(SETTINGS, min_iou=0.0, min_stability=0.0)
    session = actions.find_all(coins, everything)
    monkeypatch.setattr(actions, "MOST_OBJECTS", len(session.segments) - 1)
    with pytest.raises(ActionError, match=r"masks are above the thresholds, and the page shows at most"):
        actions.find_all(coins, everything)
    monkeypatch.undo()
    monkeypatch.setattr(actions, "MOST_CANDIDATES", 10)
    session = actions.find_all(coins, everything)
    assert not session.search.candidates
    again = actions.find_all(session, replace(everything, max_overlap=0.4))
    assert 0 < len(again.segments) <= len(session.segments)


def test_before_and_after_differ_by_the_adapter_alone(model, coins):
    session = actions.find_all(coins, SETTINGS)
    session = actions.finish_object(actions.add_click(session, COIN, "inside"))
    base = SharedModel(split_class().from_pretrained(SAM_TINY).eval(), model.predictor.processor, SETTINGS)
    alone = actions.find_all(Session(open_file(base, COINS)), SETTINGS)
    clicked = actions.add_click(alone, COIN, "inside").masks[session.marks.objects[-1].choice]
    assert actions.without_adapter(session) == [*map(equal, [*alone.segments, clicked])]
    again = actions.add_click(coins, COIN, "inside")
    assert again.masks[0].rating == actions.add_click(Session(open_file(model, COINS)), COIN, "inside").masks[0].rating


def test_a_large_image_is_segmented_in_the_tile_around_the_click(model, stock):
    pixels = np.tile(np.asarray(Image.open(COINS).convert("RGB")), (2, 2, 1))
    tiled = SharedModel(model.model, model.predictor.processor, replace(SETTINGS, tile=303, overlap=0.25))
    session = Session(OpenImage(tiled, pixels, "large.png"))
    session = actions.add_click(session, (384 + 335.5, 303 + 43.5), "inside")
    (window,) = {key[:4] for key in session.image._encoded}
    top, bottom, left, right = window
    assert (bottom - top, right - left) == (303, 303)
    point = [384 + 335.5 - left, 303 + 43.5 - top]
    expected = masks_of(stock, pixels[top:bottom, left:right], True, input_points=[[[point]]])
    masks = session.image.masks(session.marks.prompt.prompted, adapted=False)[:3]
    assert_same_masks(masks, np.pad(expected, ((0, 0), (top, 606 - bottom), (left, 768 - right))))


def test_clicks_on_the_scaled_picture_are_places_in_the_image(coins):
    assert max(coins.image.fitted.shape) == LONG_SIDE
    scale = LONG_SIDE / 384
    x, y = place_in_image((round(100 * scale), round(50 * scale)), coins.image.fitted.shape, coins.image.size)
    assert (x, y) == pytest.approx((100, 50), abs=0.5)
    session = actions.add_click(coins, COIN, "inside")
    changed = np.any(draw_masks(session.image, session.segments) != session.image.fitted, -1)
    mask = Image.fromarray(session.segments[0].full((303, 384)))
    assert np.mean(changed != np.asarray(mask.resize(changed.shape[::-1], Image.Resampling.NEAREST))) < 0.01
    assert (draw(session) != draw_masks(session.image, session.segments)).any(), "the click is not drawn"


def test_programs_get_coco_annotations(model):
    entries = segment_file(model, str(COINS), [[*COIN, 1], [*OTHER_COIN, 0]], None)["annotations"]
    session = actions.add_click(Session(open_file(model, COINS)), COIN, "inside")
    session = actions.add_click(session, OTHER_COIN, "outside")
    assert [entry["area"] for entry in entries] == [session.segments[0].area]
    assert len(segment_file(model, str(COINS), None, None)["annotations"]) > 1
    for points, box in (([[1, 2]], None), ("text", None), (None, [1, 2, 3]), ([[1, 2, "x"]], None)):
        with pytest.raises(ValueError, match=r"(points|box): expected [34] numbers each"):
            segment_file(model, str(COINS), points, box)


def test_errors_are_messages_without_html(monkeypatch):
    def fail(error: Exception) -> None:
        raise error

    no_image = ValueError("<img src=x>: no image")
    with pytest.raises(gr.Error) as error:
        raises(fail)(no_image)
    assert message_of(gr.Error("No GPU is free.")) == "No GPU is free."
    assert error.value.message == "&lt;img src=x&gt;: no image"
    assert not error.value.print_exception
    messages: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda message, title: messages.append(message))
    assert warns(fail, 3)(no_image) == [gr.skip()] * 3
    assert warns(fail, 1)(ZeroDivisionError()) == gr.skip()
    assert messages[0] == error.value.message
    assert "ZeroDivisionError. The server's log" in messages[1]
    with pytest.raises(ActionError, match="No image is open"):
        required(None)


def test_sliders_change_the_settings_of_the_weights(model):
    assert settings_of(model, (0.5, 0.6, 0.7, 8.0)) == replace(
        SETTINGS, min_iou=0.5, min_stability=0.6, max_overlap=0.7, grid=8
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{empty}"], "expected a folder of images"),
        (["--images", "{empty}/none"], "expected a folder"),
        (["--base", "{empty}"], "not a SAM v1 checkpoint"),
        (["--adapter", "{empty}"], "not an adapter"),
        (["--adapter-revision", "main"], "--adapter-revision: expected --adapter"),
        (["--revision", "main"], "--revision: expected --base or --adapter"),
        (["--port", "99999"], "--port 99999: expected a number from 1 to 65535"),
        (["--port", "{taken}"], "--port {taken} is taken"),
        (["--max-pixels", "0"], "--max-pixels 0: expected"),
    ],
)
def test_what_the_page_cannot_be_made_of_is_said_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "._coins.png").touch()  # as macOS leaves them beside images
    (tmp_path / "folder.png").mkdir()
    with socket.socket() as listener, pytest.raises(SystemExit) as end:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        names = {"empty": tmp_path, "taken": listener.getsockname()[1]}
        app.main([argument.format(**names) for argument in arguments])
    output = f"{end.value} {capsys.readouterr().err}"
    assert message.format(**names) in output
    assert "Traceback" not in output


def test_on_zero_gpu_the_model_runs_in_marked_functions_and_their_results_are_on_the_cpu(monkeypatch, model):
    """With a stand-in for the package `spaces`, which sends arguments and results to another process."""
    calls = []

    def gpu(function):
        def elsewhere(*args):
            calls.append(function.__name__)
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(args)))))

        return elsewhere

    monkeypatch.setattr(zero_gpu, "spaces", SimpleNamespace(GPU=gpu))
    lent = SharedModel(model.model, model.predictor.processor, SETTINGS)
    session = actions.add_click(Session(open_file(lent, COINS)), COIN, "inside")
    session = actions.find_all(session, SETTINGS)
    assert calls == ["run_encoder", "run_decoder", "run_grid"]
    expected = actions.find_all(Session(open_file(model, COINS)), SETTINGS)
    assert [segment.area for segment in session.segments] == [segment.area for segment in expected.segments]
