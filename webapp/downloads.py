"""Files of what was segmented: a label image, an overlay, and COCO annotations."""

from pathlib import Path

from segmentation.result_files import Annotations, SegmentedImage, write_pictures

from .session import Session


def write_files(session: Session, folder: Path) -> list[Path]:
    """Writes all three, as `segment.py` does, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = write_pictures(result_of(session), folder)
    annotations = annotations_of(session)
    annotations.write(folder, with_table=False)
    return [*pictures, folder / "annotations.json"]


def annotations_of(session: Session) -> Annotations:
    """Returns COCO annotations of the objects."""
    annotations = Annotations()
    annotations.add(result_of(session))
    return annotations


def result_of(session: Session) -> SegmentedImage:
    """Returns the image, its objects, and the clicks on them."""
    prompts = [each.prompt.prompted for each in session.objects if each.prompt]
    return SegmentedImage(session.image.name, session.image.pixels, session.segments, prompts)
