"""Share models over the Hugging Face Hub: publish a run folder, load what was published.

A published checkpoint is a repo with ``model.safetensors`` and timm's ``config.json``, so that a plain
``timm.create_model('hf-hub:user/name', pretrained=True)`` loads it. The config holds one entry more, which timm passes
over and ``load`` checks: the versions that the model needs and the SHA-256 of what was published with it::

    "timm_dyacts": {
        "requires": {"timm": ">=1.0.31", "timm_dyacts": ">=0.1.0"},
        "sha256": {"README.md": "...", "model.safetensors": "..."}
    }
"""
from .errors import ChecksumError, HubError, MissingFileError
from .pull import load, verify
from .push import Publication, publish

__all__ = ['ChecksumError', 'HubError', 'MissingFileError', 'Publication', 'load', 'publish', 'verify']
