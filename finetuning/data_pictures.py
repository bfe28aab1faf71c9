"""Draws some of the images with their objects outlined and numbered, so that a wrong reading is seen at a glance."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from image_data.overlaps import void_of
from image_data.pillow_images import number_of
from image_data.samples import Sample
from segmentation.corrective_clicks import deepest
from segmentation.overlays import draw_segments
from segmentation.segments import Segment, segments_of


COLUMNS, MOST = 3, 6
MOST_NUMBERS = 150  # in a picture
CELL = 480  # pixels of a picture's longer side
LEGEND = "Coloured: used. White outlines: left out. White lines: no label."
CHARACTERS = 60  # in the width of a picture
CAPTION, MARGIN = 44, 12  # pixels
FONT = ImageFont.load_default(size=15)
SMALL_FONT = ImageFont.load_default(size=12)


def draw_samples(samples: dict[str, list[Sample]]) -> Image.Image:
    """Returns a picture of some samples of each part: the used objects in colours, all others in white."""
    chosen = [(part, sample) for part, of_part in samples.items() for sample in spread_out(of_part, part, samples)]
    cells = [draw_sample(sample, part) for part, sample in chosen]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    width = MARGIN + min(COLUMNS, len(cells)) * (CELL + MARGIN)
    heights = [max(cell.height for cell in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (width, MARGIN + sum(heights) + CAPTION // 2), "white")
    ImageDraw.Draw(sheet).text(
        (MARGIN, sheet.height - CAPTION // 2), without_middle(LEGEND, CHARACTERS * len(rows[0])), "black", FONT
    )
    for row, top in zip(rows, np.cumsum([MARGIN, *heights]).tolist(), strict=False):
        for column, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + column * (CELL + MARGIN), top))
    return sheet


def spread_out(of_part: list[Sample], part: str, samples: dict[str, list[Sample]]) -> list[Sample]:
    """Returns some of the samples, evenly spread: about two of three pictures show what is learnt from."""
    others = len(samples) - 1
    share = MOST - 2 if part == "training" else max(1, 2 // others)
    rest = sum(map(len, samples.values())) - len(of_part)
    places = np.linspace(0, len(of_part) - 1, min(max(share, MOST - rest), len(of_part)))
    return [of_part[place] for place in np.unique(places.round().astype(int))]


def draw_sample(sample: Sample, part: str) -> Image.Image:
    """Returns a picture of a sample, `CELL` pixels wide, with a caption."""
    image, labels = sample.read()
    scale = CELL / max(image.shape[:2])
    size = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
    labels = resized(labels, size)
    shown = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)).copy()
    shown[void_of(labels) & hatching(size)] = 255
    is_used = np.isin(labels, sample.ids)
    shown = outlined_in_white(shown, segments_of(np.where(is_used, 0, labels)))
    used = segments_of(np.where(is_used, labels, 0))
    picture = Image.fromarray(draw_segments(shown, used, opacity=0.2))
    write_numbers(picture, used)
    cell = Image.new("RGB", (CELL, size[0] + CAPTION), "white")
    cell.paste(picture, ((CELL - size[1]) // 2, CAPTION))
    name = sample.source.name.replace("\\", "/").rsplit("/", 1)[-1]
    rows, columns = sample.window
    lines = [name, f"{part}: {number_of(len(sample.ids), 'object')}, {image.shape[1]} x {image.shape[0]} pixels"]
    if rows.start or columns.start:
        lines[1] += f" from ({columns.start}, {rows.start})"
    for line, top in zip(lines, (2, 22), strict=True):
        ImageDraw.Draw(cell).text((0, top), without_middle(line), fill="black", font=FONT)
    return cell


def resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns labels (..., H, W) at another size (height, width), of each pixel the nearest."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, labels.shape[-2:], strict=True)
    )
    return labels[..., rows[:, None], columns]


def hatching(size: tuple[int, int]) -> np.ndarray:
    """Returns a mask (H, W) of diagonal lines."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows + columns) % 8 < 2


def outlined_in_white(image: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """Returns an image (H, W, 3) in which segments have a white line."""
    for segment in segments:
        image[segment.window][segment.crop & ~ndimage.binary_erosion(segment.crop)] = 255
    return image


def write_numbers(picture: Image.Image, segments: Sequence[Segment]) -> None:
    """Writes the numbers of segments, from 1, where they are broadest; of many, those of the largest."""
    canvas = ImageDraw.Draw(picture)
    large = sorted(range(len(segments)), key=lambda index: -segments[index].crop.sum())[:MOST_NUMBERS]
    for index in large:
        (row, column), _ = deepest(segments[index].crop)
        place = segments[index].left + column, segments[index].top + row
        canvas.text(
            place, str(index + 1), fill="white", font=SMALL_FONT, anchor="mm", stroke_width=2, stroke_fill="black"
        )


def without_middle(line: str, most: int = CHARACTERS) -> str:
    """A line without its middle, if it is too long."""
    return line if len(line) <= most else f"{line[: most // 2 - 1]}…{line[-most // 2 :]}"
