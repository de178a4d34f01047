"""The pieces of the README."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text()


STORY = README.split('## Publish and pull')[1].split('\n## ')[0]


def blocks(language: str, text: str = README.replace(STORY, '')) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
