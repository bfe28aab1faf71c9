"""Keeps the images in memory that were read last."""

from collections import OrderedDict

from .sources import LabelledImage, Source


class ImageCache:
    """Reads sources, and keeps what it has read up to a number of bytes.

    Args:
        limit: Bytes of pixels and labels to keep; the image read last is kept, whatever its size.
    """

    def __init__(self, limit: int = 512 * 2**20):
        self.limit = limit
        self.bytes = 0
        self.images: OrderedDict[Source, LabelledImage] = OrderedDict()

    def read(self, source: Source) -> LabelledImage:
        """Returns the image and its objects."""
        if source in self.images:
            self.images.move_to_end(source)
            return self.images[source]
        whole = source.read()
        self.bytes += whole.nbytes
        while self.images and self.bytes > self.limit:
            _, oldest = self.images.popitem(last=False)
            self.bytes -= oldest.nbytes
        self.images[source] = whole
        return whole
