"""Image files as training and evaluation need them: upright, in one mode, and none that takes all memory.

Pillow refuses what has more than ``2 * Image.MAX_IMAGE_PIXELS`` pixels, some 179 million, before it decodes any. Beyond
that, no image takes more than some copies of its pixels do, of 4 bytes each.
"""
import os
import stat
from contextlib import nullcontext
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image, ImageMode, ImageOps, UnidentifiedImageError

from ..messages import one_line

__all__ = ['INPUT_MODES', 'SizeLimit', 'UnreadableImageError', 'open_image', 'read_image', 'to_mode']

# The modes of 8 bits that Pillow converts images of all common modes to
INPUT_MODES = ('L', 'LA', 'RGB', 'YCbCr', 'HSV', 'RGBA', 'RGBX', 'CMYK')

# Modes of grey pixels with more than 8 bits, and the largest value of those that have one.
_DEEP = ('I;16', 'I;16B', 'I;16L', 'I;16N', 'I', 'F')
_LARGEST = 2 ** 16 - 1
# A progressive JPEG goes through all of its pixels once for each scan, of which most have ten.
_MAX_PIXEL_SCANS = 4_000_000_000
_START_OF_SCAN = b'\xff\xda'
_CHUNK = 1 << 20


class UnreadableImageError(OSError):
    """An image that cannot be decoded, or that does not say what its pixels mean."""


def open_image(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file, but no pipe or device, which might never end.

    Raises:
        OSError: It cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UnreadableImageError('not a regular file')
    return open(path, 'rb')


def read_image(file: IO[bytes] | str, mode: str) -> Image.Image:
    """Read an image, turned as its EXIF data say, and converted.

    Args:
        file: The image, or its path.
        mode: Mode of PIL images, such as ``'RGB'``. Grey pixels of 16 bits are scaled to the 8 of most modes.

    Raises:
        UnreadableImageError: Anything else but an image comes out, for whatever reason.
    """
    try:
        opened = open_image(file) if isinstance(file, str) else nullcontext(file)
        with opened as stream, Image.open(stream) as image:
            if image.format == 'EPS':
                raise ValueError('EPS, for which Pillow starts Ghostscript')
            if image.info.get('progressive'):
                _check_scans(stream, image.size)
            image.load()
            return to_mode(image, mode)
    except UnidentifiedImageError as e:
        raise UnreadableImageError('cannot identify image file') from e
    except Exception as e:  # decoders raise almost anything for a broken file
        raise UnreadableImageError(one_line(e) or type(e).__name__) from e


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Turn an image as its EXIF data say, and convert it.

    Raises:
        ValueError: Its pixels have no known range, or cannot be converted.
    """
    file_format = image.format
    image = _scale(_turn(image), file_format, mode)
    if 'A' not in ImageMode.getmode(mode).bands:
        image.info.pop('transparency', None)  # Pillow would warn that it is left out
    return image.convert(mode)


def _check_scans(file: IO[bytes], size: tuple[int, int]) -> None:
    """Raise ``ValueError`` if a progressive JPEG would take long, before any of it is decoded."""
    position = file.tell()
    file.seek(0)
    scans, last = 0, b''
    while chunk := file.read(_CHUNK):
        scans += (last + chunk).count(_START_OF_SCAN)
        last = chunk[-1:]
    file.seek(position)
    if scans * size[0] * size[1] > _MAX_PIXEL_SCANS:
        raise ValueError(f'{scans} scans of {size[0]} x {size[1]} pixels would take too long')


def _turn(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data are no reason to leave a picture out
        return image


def _scale(image: Image.Image, file_format: str | None, mode: str) -> Image.Image:
    """Bring deep grey pixels into the range of 8 bits, where Pillow would cut off what is beyond."""
    if image.mode not in _DEEP or mode in _DEEP:
        return image
    if not image.mode.startswith('I;16') and not (image.mode == 'I' and file_format in ('PNG', 'PPM')):
        # whose pixels have 16 bits at most
        raise ValueError(f'its pixels, of mode {image.mode}, have no known range: convert it to 8 or 16 bits')
    pixels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((pixels * 255 + _LARGEST // 2) // _LARGEST).astype(np.uint8))


@dataclass(frozen=True)
class SizeLimit:
    """Refuses images that would become too large where timm scales their short side to the size of the model.

    Args:
        side: What the short side becomes, in pixels.
    """
    side: float

    def __call__(self, image: Any) -> Any:
        """Give the image.

        Raises:
            UnreadableImageError: It would have more pixels than an image may have.
        """
        largest = Image.MAX_IMAGE_PIXELS
        if isinstance(image, Image.Image) and largest is not None:
            short, long = sorted(image.size)
            if self.side ** 2 * long > 2 * largest * short:
                raise UnreadableImageError(
                    f'{image.width} x {image.height} pixels would become too many where the short side is scaled to '
                    f'{self.side:.0f}')
        return image
