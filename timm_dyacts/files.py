"""Files that are there whole or not at all, whatever happens while they are written."""
import csv
import hashlib
import io
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    'check_output', 'format_csv', 'lock', 'replace_text', 'sha256', 'umask', 'write_durably', 'write_output',
]

# Whoever is still writing has touched the file within this time, in seconds.
_ABANDONED_AFTER = 3600.0


def write_durably(path: str | os.PathLike[str], write: Callable[[Any], Any]) -> None:
    """Write a binary file and return when it is on the disk: ``path`` holds the old content or the new, never a part.

    The content is written beside, under a name that no other process or thread uses, and renamed. The file gets the
    permissions that the umask leaves. Where writing fails, ``path`` is as it was and nothing is left beside it. What a
    killed process left there is removed by a later one.

    Args:
        path: The file, in a folder that exists.
        write: Writes the content to the file that it is given.

    Raises:
        OSError: The file could not be written. The message names it and says why, also where ``write`` raises something
            else for it, as ``torch.save`` does on a full disk.
    """
    path = Path(path)
    _remove_abandoned(path)
    beside = path.with_name(f'{path.name}.{secrets.token_hex(8)}.tmp')
    writer = None
    try:
        with open(beside, 'xb') as file:
            writer = _Writer(file)
            write(writer)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as e:
        with suppress(OSError):
            os.remove(beside)
        cause = (writer and writer.error) or e
        if isinstance(cause, OSError) and cause.errno is not None and isinstance(e, Exception):
            raise OSError(cause.errno, cause.strerror, str(path)) from e
        raise


class _Writer:
    """A file to write to that remembers what went wrong."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left: states of a training are large, and may be killed often."""
    pattern = re.compile(re.escape(path.name) + r'\.[0-9a-f]{16}\.tmp')
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _ABANDONED_AFTER:
                os.remove(entry)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 as ``write_durably`` does."""
    write_durably(path, lambda file: file.write(text.encode()))


def check_output(path: str | os.PathLike[str], option: str) -> None:
    """Say before the work that a file which a user named cannot be written after it.

    Args:
        path: The file.
        option: The option that named it, for the message.

    Raises:
        OSError: It is a folder, lies in none that exists, or may not be written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{option} must be a file, got the folder {str(path)!r}.')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'{option} must be a file in a folder that exists, got {str(path)!r}.')
    if not os.access(path if _is_stream(path) else path.parent, os.W_OK):
        raise PermissionError(f'{option} must be a file that can be written, got {str(path)!r}.')


def write_output(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file where a user wants it: whole or not at all, or into a pipe or device, as it comes; text in UTF-8."""
    content = content.encode() if isinstance(content, str) else content
    if not _is_stream(Path(path)):
        write_durably(path, lambda file: file.write(content))
        return
    with open(path, 'wb') as file:
        file.write(content)


def _is_stream(path: Path) -> bool:
    """Say whether a path is a pipe, a device or standard output, which renaming would put a file in place of."""
    if path.absolute().parts[1:2] in (('dev',), ('proc',)):  # /dev/stdout may lead to a file
        return path.exists()
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def format_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Format a table as CSV, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def umask() -> int:
    """Give the permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file that one process at a time can hold. The system releases it when the process ends, however it ends.

    Where the file system knows no locks, nothing is held: a folder on it can be used all the same.

    Args:
        path: The file, in a folder that exists. It is made where there is none, and stays there.

    Raises:
        BlockingIOError: Another process holds it. The message says which.
    """
    if fcntl is None:
        yield
        return
    with open(path, 'a+', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(file.read().strip() or 'another process') from None
        except OSError:
            pass
        with suppress(OSError):  # on a full disk it is held all the same, and does not say by whom
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # processes that load data may live on, and have the file open
