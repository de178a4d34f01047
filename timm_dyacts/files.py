"""Files that are there whole or not at all, whatever happens while they are written."""
import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

__all__ = ['format_csv', 'replace_text', 'write_durably']


def write_durably(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Write a binary file, and return when it is on the disk."""
    with open(path, 'wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file beside and rename it: ``path`` holds the old text or the new one, never a part."""
    beside = f'{os.fspath(path)}.tmp'
    write_durably(beside, lambda file: file.write(text.encode()))
    os.replace(beside, path)


def format_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table as CSV, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
