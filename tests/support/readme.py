"""The README and the guides beside the model cards: their pieces, and what running them takes."""
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

from .loopback_hub import LoopbackHub
from .trained_like import trained_like

__all__ = ['GUIDES', 'README', 'ROOT', 'blocks', 'guide', 'run_command', 'section', 'serve_resnet18']

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()
GUIDES = ROOT / 'model_cards' / 'guides'


def guide(name: str) -> str:
    """Give the text of a page in ``model_cards/guides``."""
    return (GUIDES / f'{name}.md').read_text()


def section(title: str, text: str = README) -> str:
    """Give the text of a section, without its heading."""
    return text.split(f'\n## {title}\n')[1].split('\n## ')[0]


def blocks(language: str, text: str = README) -> list[str]:
    """Give the blocks of code in a language."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


def run_command(command: str, folder: Path, env: dict[str, str] | None = None) -> str:
    """Run a line of a shell in a folder, and give what it prints."""
    env = dict(os.environ if env is None else env)
    env['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), env['PATH']])
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@contextmanager
def serve_resnet18() -> Iterator[LoopbackHub]:
    """Serve a Hub with the one checkpoint of timm's that the pages speak of, ``trained_like('resnet18')``."""
    weights = {key: value.contiguous() for key, value in trained_like('resnet18').state_dict().items()}
    with LoopbackHub() as hub:
        hub.add_repo(
            'timm/resnet18.a1_in1k', {'model.safetensors': safetensors.torch.save(weights), 'config.json': b'{}'})
        yield hub
