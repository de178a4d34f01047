"""The pieces of the README."""
import re
from pathlib import Path

__all__ = ['README', 'ROOT', 'STORY', 'blocks', 'section']

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()


def section(title: str) -> str:
    """Give the text of a section, without its heading."""
    return README.split(f'\n## {title}\n')[1].split('\n## ')[0]


# Needs a Hub, and is told in tests/hub/test_round_trip.py.
STORY = section('Publish and pull')


def blocks(language: str, text: str = README.replace(STORY, '')) -> list[str]:
    """Give the blocks of code in a language, of all sections but ``STORY`` unless told otherwise."""
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
