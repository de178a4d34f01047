"""The hashes by which the Hub, git and our record in a config know a file."""
import hashlib
import os
from pathlib import Path

from ..files import sha256

__all__ = ['git_sha1', 'sha256']


def git_sha1(path: str | os.PathLike[str]) -> str:
    """Compute the name that git gives to the content of a file."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
