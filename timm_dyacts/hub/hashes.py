"""The hashes by which the Hub, git and our record in a config know a file."""
import hashlib
import os
from pathlib import Path

__all__ = ['git_sha1', 'sha256']


def sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def git_sha1(path: str | os.PathLike[str]) -> str:
    """Compute the name that git gives to the content of a file."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
