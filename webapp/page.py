"""The page: what is on it, and which action each of its parts starts."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from image_data.images import IMAGE_SUFFIXES
from segmentation.overlays import distinct_colours

from . import session as actions
from .downloads import write_files
from .drawing import draw, draw_masks
from .handlers import (
    choices_of,
    raises,
    required,
    segment_file,
    settings_of,
    status_of,
    table_of,
    warns,
)
from .model import SharedModel
from .open_image import open_file
from .picture_clicks import COMPLETE_CLICKS
from .screen_scaling import place_in_image
from .session import ActionError, Session


MAX_FILE_SIZE = "50mb"
SECONDS_TO_KEEP = 3600  # after the last action of a user
MOST_USERS = 100  # at a time; the image of whoever has done nothing for the longest is closed for another
MODES = [("Point inside", "inside"), ("Point outside", "outside"), ("Box", "box")]
MOST_POINTS = 64  # along a side of the grid
COLUMNS = ["object", "pixels", "left, top: size", "rating", "stability"]
COLUMN_WIDTHS: list[str | int] = ["15%", "15%", "34%", "14%", "22%"]
CSS = """
.gradio-container { max-width: 1400px !important; margin: auto; }
.gradio-container .fillable { max-width: none !important; padding: 16px 24px !important; }
#objects * { font-family: var(--font) !important; font-size: 13px !important; }
#choice label { padding: 6px 8px; }
#picture img { cursor: crosshair; }
#drag-outline { position: fixed; z-index: 1000; pointer-events: none; }
#drag-outline { border: 2px solid white; outline: 1px solid black; }
"""
LAUNCH_OPTIONS: dict[str, Any] = {
    # The page serves these fonts itself; of some others gradio has only a few letters.
    "theme": gr.themes.Default(
        primary_hue="blue",
        font=[gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", (400, 700)), "monospace"],
    ).set(block_info_text_color="*neutral_600"),  # the default is too pale to read
    "css": CSS,
    "js": COMPLETE_CLICKS,
    "max_file_size": MAX_FILE_SIZE,
    "state_session_capacity": MOST_USERS,
    "footer_links": ["api", "settings"],
    "share": False,
}


class Page:
    """The page of one model.

    Args:
        model: The model.
        images: Images to choose from, by name; the first is open at the start.
        about: What the page says of the model, Markdown.
        details: What it says below the rest.
    """

    def __init__(self, model: SharedModel, images: Mapping[str, Path], about: str, details: str = "") -> None:
        self.model, self.images = model, images
        with gr.Blocks(
            title="Segment Anything", analytics_enabled=False, delete_cache=(600, SECONDS_TO_KEEP)
        ) as self.blocks:
            gr.Markdown(about)
            self.session = gr.State(None, time_to_live=SECONDS_TO_KEEP)
            with gr.Row():
                with gr.Column(scale=3, min_width=400):
                    self.add_pictures()
                with gr.Column(scale=2, min_width=320):
                    self.add_controls()
            gr.Markdown(details)
            self.views = [
                *(self.session, self.picture, self.status, self.choice),
                *(self.table, self.selected, self.remove, self.tabs, self.files),
            ]
            self.connect()
            self.add_api()

    def add_pictures(self) -> None:
        """What to do next, the image, and the same before and after fine-tuning."""
        self.status = gr.Markdown(min_height=24)
        with gr.Tabs() as self.tabs:
            with gr.Tab("Picture", id="picture"):
                self.picture = gr.Image(
                    label="Picture",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="picture",
                    alt_text="The image, with the masks and the clicks so far",
                )
            with gr.Tab("Before and after", id="comparison", visible=self.model.has_adapter) as self.comparison:
                self.slider = gr.ImageSlider(
                    label="Left: without the adapter. Right: with it.",
                    interactive=False,
                    buttons=["fullscreen"],
                    max_height=800,
                )
                self.difference = gr.Markdown()

    def add_controls(self) -> None:
        """What to open, how to prompt, and what to do with the masks."""
        with gr.Row():
            self.name = gr.Dropdown(list(self.images), label="Image", scale=3)
            self.upload = gr.UploadButton("Upload", file_types=list(IMAGE_SUFFIXES), size="md", scale=1, min_width=100)
        with gr.Tabs():
            with gr.Tab("One object"):
                self.mode = gr.Radio(
                    MODES,
                    value="inside",
                    label="What a click marks",
                    info="A box: drag, or click on two opposite corners.",
                    elem_id="mode",
                )
                self.choice = gr.Radio(
                    [],
                    label="Mask",
                    elem_id="choice",
                    info="A, B and C: what one point may mean, such as a part or the whole. Single: for several "
                    "points or a box. The number is the model's rating, from 0 to 1.",
                )
                self.next = gr.Button("Next object", variant="primary")
            with gr.Tab("All objects"):
                self.add_sliders()
        with gr.Row():
            self.undo = gr.Button("Undo")
            self.clear = gr.Button("Clear")
        self.table = gr.Dataframe(
            headers=COLUMNS,
            column_widths=COLUMN_WIDTHS,
            interactive=False,
            label="Objects",
            max_height=260,
            elem_id="objects",
        )
        self.selected = gr.State(None)  # number of an object in the table
        with gr.Row():
            self.remove = gr.Button()
            self.save = gr.Button("Make files")
        self.files = gr.Files(label="Label image, overlay, COCO annotations", interactive=False, visible=False)

    def add_sliders(self) -> None:
        """Thresholds, at first those that the weights come with."""
        settings = self.model.settings
        thresholds = [
            ("Lowest rating", "The fit that the model expects (predicted IoU).", settings.min_iou),
            ("Lowest stability", "How little a stricter outline changes the mask.", settings.min_stability),
            ("Largest overlap", "Of two that share more (IoU), the better stays.", settings.max_overlap),
        ]
        self.sliders = [gr.Slider(0, 1, value, step=0.01, label=label, info=info) for label, info, value in thresholds]
        most = max(MOST_POINTS, settings.grid)
        more = "More find smaller objects, and take longer."
        self.sliders.append(gr.Slider(1, most, settings.grid, step=1, label="Points per side", info=more))
        self.find = gr.Button("Find all objects", variant="primary")

    def connect(self) -> None:
        """Starts an action for each part."""
        opened = [*self.views, self.name]
        self.on(self.blocks.load, self.open_first, [], opened)
        self.on(self.name.input, self.open_named, [self.name], opened)
        each: dict[str, Any] = {"trigger_mode": "multiple"}  # also while an earlier one waits for its answer
        self.on(self.upload.upload, self.open_upload, [self.upload], opened, **each)
        quick = {**each, "show_progress": "hidden"}  # which would cover the picture, and take the next click on it
        self.on(self.picture.select, self.click, [self.session, self.mode], **quick)
        self.on(self.choice.input, self.take(actions.choose_mask), [self.session, self.choice], **quick)
        self.on(self.next.click, self.take(actions.finish_object), [self.session], **quick)
        self.on(self.undo.click, self.take(actions.undo), [self.session], **quick)
        self.on(self.clear.click, self.take(actions.clear), [self.session], **quick)
        self.on(self.remove.click, self.remove_object, [self.session, self.selected], **quick)
        self.on(self.find.click, self.find_all, [self.session, *self.sliders])
        for slider in self.sliders[:3]:
            self.on(slider.release, self.find_again, [self.session, *self.sliders], trigger_mode="always_last")
        compare = [self.slider, self.difference]
        self.on(self.comparison.select, self.compare, [self.session], compare)
        self.on(self.save.click, self.write, [self.session], [self.files])
        self.on(self.table.select, self.select, [self.session], [self.selected, self.remove], **quick)

    def on(
        self,
        event: Callable[..., Any],
        handler: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any] | None = None,
        **options: Any,
    ) -> None:
        """Runs `handler` at an event, one at a time for all users, as there is one model."""
        outputs = self.views if outputs is None else outputs
        event(
            warns(handler, len(outputs)),
            inputs,
            outputs,
            api_visibility="private",
            concurrency_id="model",
            concurrency_limit=1,
            **options,
        )

    def view(self, session: Session) -> list[Any]:
        """Returns the values of `views`."""
        choices = choices_of(session)
        return [
            session,
            draw(session),
            status_of(session),
            gr.Radio(choices, value=session.choice if choices else None),
            table_of(session),
            None,
            gr.Button("Remove object", interactive=False),
            gr.Tabs(selected="picture"),
            gr.Files(None, visible=False),
        ]

    def open_first(self) -> list[Any]:
        """Opens the first of the images."""
        return self.open_named(next(iter(self.images)))

    def open_named(self, name: str) -> list[Any]:
        """Opens one of the images."""
        return [*self.view(Session(open_file(self.model, self.images[name], name))), name]

    def open_upload(self, path: str) -> list[Any]:
        """Opens the user's own image, and deletes its file."""
        try:
            return [*self.view(Session(open_file(self.model, Path(path)))), None]
        finally:
            Path(path).unlink(missing_ok=True)  # the session has its pixels

    def click(self, session: Session | None, mode: str, event: gr.SelectData) -> list[Any]:
        """Adds a click on the picture."""
        session = required(session)
        place = place_in_image(event.index, session.image.fitted.shape, session.image.size)
        return self.view(actions.add_click(session, place, mode))

    def take(self, action: Callable[..., Session]) -> Callable[..., list[Any]]:
        """Returns a handler that takes an action."""
        return lambda session, *values: self.view(action(required(session), *values))

    def remove_object(self, session: Session | None, number: int | None) -> list[Any]:
        """Removes the object that was clicked on in the table."""
        return self.view(actions.remove_object(required(session), number or 0))

    def find_all(self, session: Session | None, *values: float) -> list[Any]:
        """Finds all objects with the values of the sliders."""
        settings = settings_of(self.model, values)
        return self.view(actions.find_all(required(session), settings))

    def find_again(self, session: Session | None, *values: float) -> list[Any]:
        """Applies other thresholds to objects that were found from the grid."""
        session = required(session)
        if session.search is None or any(each.prompt for each in session.objects):
            return [gr.skip()] * len(self.views)
        return self.find_all(session, *values)

    def compare(self, session: Session | None) -> tuple[tuple[Any, ...], str]:
        """Shows the masks without the adapter beside those with it."""
        session = required(session)
        before, after = actions.without_adapter(session), session.segments
        is_paired = all(each.prompt for each in session.objects)  # then an object keeps its colour
        colours = distinct_colours(after) if is_paired else None
        pictures = [draw_masks(session.image, segments, colours) for segments in (before, after)]
        return tuple(pictures), f"Objects: {len(before)} before, {len(after)} after."

    def select(self, session: Session | None, event: gr.SelectData) -> tuple[int, gr.Button]:
        """Says which object the button would remove."""
        number = event.index[0] + 1
        return number, gr.Button(f"Remove object {number}", interactive=number <= len(required(session).objects))

    def write(self, session: Session | None) -> gr.Files:
        """Writes the files to download."""
        session = required(session)
        if not session.objects:
            raise ActionError("There is no object yet: click on one first.")
        folder = Path(self.blocks.GRADIO_CACHE, secrets.token_hex(16))  # from which `delete_cache` deletes them
        return gr.Files([str(path) for path in write_files(session, folder)], visible=True)

    def add_api(self) -> None:
        """An endpoint for programs, whose parts are not shown."""
        with gr.Row(visible=False):
            image, points, box, result = gr.File(), gr.JSON(), gr.JSON(), gr.JSON()
            gr.Button().click(
                raises(lambda *values: segment_file(self.model, *values)),
                [image, points, box],
                [result],
                api_name="segment",
                concurrency_id="model",
            )
