"""What is wrong with samples, and with the processes that load them."""
import re
import signal
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
        text = str(e)
        if not re.match(r'DataLoader worker \(pid', text):
            raise
        killed = f'signal: {signal.strsignal(signal.SIGKILL)}' in text
        why = ', as happens where memory runs out: lower --workers or --batch-size' if killed else ''
        what = 'was killed' if killed else 'ended, which is no fault of an image'
        shm = '; if /dev/shm is too small, lower --workers' if 'shm' in text or 'Bus error' in text else ''
        raise WorkerError(f'A process that loads data (--workers) {what}{why}{shm}. PyTorch says: {text}') from e
