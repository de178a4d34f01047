"""What is wrong with samples, and with the processes that load them."""
import struct
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from PIL import Image

__all__ = ['UNREADABLE', 'DataError', 'WorkerError', 'worker_errors']

T = TypeVar('T')

# What data sets let through of decoders, of which Pillow's raise SyntaxError for a broken PNG.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(ValueError):
    """A sample that cannot be trained or evaluated on."""


class WorkerError(OSError):
    """A process that loads data has died."""


def worker_errors(function: Callable[..., T]) -> Callable[..., T]:
    """Let a function raise ``WorkerError`` where PyTorch says, anywhere in it, that a worker has died."""
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        try:
            try:
                return function(*args, **kwargs)
            except (EOFError, ConnectionError) as e:  # it died while it was handing over a batch
                if any('resource_sharer' in frame.filename for frame in traceback.extract_tb(e.__traceback__)):
                    raise _worker_error(type(e).__name__) from e
                raise
        except RuntimeError as e:  # which a signal may raise while another error is on its way
            if str(e).startswith('DataLoader worker (pid'):
                raise _worker_error(str(e)) from e
            raise
    return call


def _worker_error(reason: str) -> WorkerError:
    return WorkerError(
        f'A process that loads data (--workers) died, as happens where memory runs out: lower --workers or '
        f'--batch-size. PyTorch says: {reason}')
