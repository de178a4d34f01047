"""What the tests of pulling and pushing share: a served Hub, a client of it that stays, and a run folder."""
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from support.loopback_hub import Client, LoopbackHub

# ``time.sleep`` is silenced because the client would wait for seconds between its retries.
SETUP = """
    import time
    time.sleep = lambda seconds: None
    import dataclasses, sys
    import timm
    import torch
    import timm_dyacts
    from timm_dyacts import hub
    sys.path.insert(0, {tests!r})
    from support.hub_client import fingerprint

    def publish(*args, **kwargs):
        return dataclasses.asdict(hub.publish(*args, **kwargs)) | dict(folder=None)
"""


@contextmanager
def serve(folder: Path, token: bool = False) -> Iterator[tuple[LoopbackHub, Client]]:
    """Serve a Hub, to a client with the cache ``folder / 'cache'`` and the log ``folder / 'log'``."""
    with LoopbackHub() as server:
        env = server.env(folder / 'cache', token=server.token if token else None)
        setup = SETUP.format(tests=str(Path(__file__).parents[1]))
        with Client(env, setup, folder / 'log') as client:
            yield server, client


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Give a text that is the same for two models if their logits are, bit for bit."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return hashlib.sha256(model.eval()(x).numpy().tobytes()).hexdigest()


def read_folder(folder: Path) -> dict[str, bytes]:
    """Give the content of the files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
