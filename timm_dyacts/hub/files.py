"""The files of a published checkpoint, and their hashes."""
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import HubError, summarize

__all__ = ['CARD', 'CONFIG', 'PICKLED_WEIGHTS', 'RECORD', 'WEIGHTS', 'git_sha1', 'read_config', 'recorded', 'sha256']

CARD = 'README.md'
CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
PICKLED_WEIGHTS = 'pytorch_model.bin'
RECORD = 'timm_dyacts'  # our entry in config.json


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


def git_sha1(path: str | os.PathLike) -> str:
    """The name that git gives to the content of a file."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def recorded(config: dict[str, Any], key: str) -> dict[str, Any]:
    """What a config has on record under 'sha256' (by file) or 'requires' (by package)."""
    record = config.get(RECORD)
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The content of the ``config.json`` of the checkpoint called ``name``."""
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise HubError(
            f"The {CONFIG} of '{name}' is not JSON: {summarize(e)}. Its owner has to publish it again.") from e
    parts = [config.get(key, {}) for key in ('pretrained_cfg', 'model_args')] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(config.get('architecture'), str):
        raise HubError(
            f"The {CONFIG} of '{name}' is not one of timm's, with an architecture and its arguments. Is it a model of "
            f"another library?")
    return config
