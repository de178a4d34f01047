"""What is wrong with samples, and with the processes that load them."""
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

__all__ = ['UNREADABLE', 'DataError', 'WorkerError', 'worker_errors']

# What data sets let through of decoders, of which Pillow's raise SyntaxError for a broken PNG.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(ValueError):
    """A sample that cannot be trained or evaluated on."""


class WorkerError(OSError):
    """A process that loads data has died."""


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn PyTorch's errors about a worker that died, which may come up anywhere, into a ``WorkerError``."""
    try:
        yield
    except RuntimeError as e:
        if not str(e).startswith('DataLoader worker (pid'):
            raise
        raise WorkerError(
            f'A process that loads data (--workers) died, as happens where memory runs out: lower --workers or '
            f'--batch-size. PyTorch says: {e}') from e
