"""Cuts images into overlapping tiles."""

from collections.abc import Iterator


Window = tuple[slice, slice]  # rows and columns of an image


def tiles(part: Window, side: int | None, overlap: float) -> Iterator[Window]:
    """Windows of at most `side` pixels that cover `part`; the last of a row or column ends at the border."""
    if side is None:
        yield part
        return

    def starts(span: slice) -> list[int]:
        last = max(span.start, span.stop - side)
        return [*range(span.start, last, max(1, round(side * (1 - overlap)))), last]

    for top in starts(part[0]):
        for left in starts(part[1]):
            yield slice(top, min(top + side, part[0].stop)), slice(left, min(left + side, part[1].stop))
