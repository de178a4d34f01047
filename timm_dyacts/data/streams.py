"""Data sets that can only be read from their beginning, some of whose images cannot be read."""
from collections.abc import Iterator
from typing import Any

from timm.data import IterableImageDataset

from ..messages import one_line
from .errors import UNREADABLE, DataError

__all__ = ['ImageStream']


class ImageStream(IterableImageDataset):
    """timm's stream of images, except that one that cannot be read does not end it.

    In training, which counts on full batches, the image before takes its place; an evaluation leaves it out. What
    webdataset itself cannot decode is left out in both, with a warning.

    Attributes:
        on_bad_image: What to do with an image that cannot be read, ``'skip'`` or ``'error'``.
    """

    on_bad_image = 'skip'

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        last = None
        is_training = getattr(self.reader, 'is_training', False)
        for number, (image, label) in enumerate(self._read()):
            try:
                last = (image if self.transform is None else self.transform(image)), label
            except UNREADABLE as e:
                if self.on_bad_image == 'error':
                    raise DataError(
                        f'sample {number} of the stream cannot be read ({one_line(e)}); --on-bad-image skip leaves it '
                        f'out.') from e
                if last is None or not is_training:
                    continue
            yield last

    def _read(self) -> Iterator[tuple[Any, int]]:
        try:
            yield from self.reader
        except (*UNREADABLE, RuntimeError, TypeError) as e:  # what readers raise at broken data
            raise DataError(f'The stream cannot be read: {one_line(e) or type(e).__name__}.') from e
