"""Image files as training and evaluation need them: upright, in one mode, and none that takes all memory.

Pillow refuses what has more than ``2 * Image.MAX_IMAGE_PIXELS`` pixels, some 179 million, before it decodes any; they
would take 540 MB. Beyond that, no image takes more than its pixels do.
"""
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ..messages import one_line

__all__ = ['UnreadableImageError', 'read_image']

# Modes of grey pixels with more than 8 bits, and the largest value of those that have one.
_DEEP = ('I;16', 'I;16B', 'I;16L', 'I;16N', 'I', 'F')
_LARGEST = 2 ** 16 - 1


class UnreadableImageError(OSError):
    """An image that cannot be decoded, or that does not say what its pixels mean."""


def read_image(file: IO[bytes] | str, mode: str) -> Image.Image:
    """Read an image, turned as its EXIF data say, and converted.

    Args:
        file: The image, or its path.
        mode: Mode of PIL images, such as ``'RGB'``. Grey pixels of 16 bits are scaled to the 8 of most modes.

    Raises:
        UnreadableImageError: Anything else but an image comes out, for whatever reason.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return _scale(_turn(image), image.format, mode).convert(mode)
    except Exception as e:  # decoders raise almost anything for a broken file
        raise UnreadableImageError(one_line(e) or type(e).__name__) from e


def _turn(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data are no reason to leave a picture out
        return image


def _scale(image: Image.Image, file_format: str | None, mode: str) -> Image.Image:
    """Bring deep grey pixels into the range of 8 bits, where Pillow would cut off what is beyond."""
    if image.mode not in _DEEP or mode in _DEEP:
        return image
    if not image.mode.startswith('I;16') and file_format != 'PNG':  # whose pixels have 16 bits at most
        raise ValueError(f'its pixels, of mode {image.mode}, have no known range: convert it to 8 or 16 bits')
    pixels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((pixels * 255 + _LARGEST // 2) // _LARGEST).astype(np.uint8))
