"""What others may see: paths of this machine are reduced to their last part, which names no user and no folder."""
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

__all__ = ['reduced']

# Words before a name of timm's, the Hub's or a library's, in which a slash makes no path
_NAMED = re.compile(r'(?:hf[-_]hub:|(?:torch|hfds|hfids|tfds|wds|wids)/)', re.IGNORECASE)
_PREFIX = re.compile(rf'(?:local-dir:|file:|{_NAMED.pattern})', re.IGNORECASE)
_URL = re.compile(r'(?!file:)[a-z][a-z0-9+.-]*://', re.IGNORECASE)
_PATH = re.compile(r'/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|.*\\|(?:file|local-dir):', re.DOTALL)
# Folders whose members are named after users
_HOME = re.compile(r'(?:.*[/\\])?(?:home|users)[/\\][^/\\]+', re.IGNORECASE | re.DOTALL)
# What timm looks up at the Hub and nowhere else
_IDS = frozenset({'hf_hub_id'})


def reduced(value: Any, names: bool = False) -> Any:
    """Give a value of YAML or JSON without the folders in its texts.

    Names of models and data sets at the Hub stay, and so do URLs, but for what they hold of passwords and queries.

    Args:
        value: The value; lists and mappings are gone through.
        names: Take a slash for a part of a name, such as ``'user/model'``, where the text does not begin like a path.
    """
    if isinstance(value, Mapping):
        return {reduced(key, names): reduced(item, names or key in _IDS) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [reduced(item, names) for item in value]
    return _reduced_text(value, names) if isinstance(value, str) else value


def _reduced_text(text: str, names: bool) -> str:
    if text.startswith('pipe:'):  # a command that gives the files of a data set
        return 'pipe:'
    if _URL.match(text):
        parts = urlsplit(re.sub(r'\s+', '', text))
        return urlunsplit((parts.scheme, parts.netloc.rpartition('@')[2], parts.path, '', ''))
    prefix = match[0] if (match := _PREFIX.match(text)) else ''
    rest = text[len(prefix):]
    is_name = names or bool(_NAMED.fullmatch(prefix))
    if is_name and not _PATH.match(rest) and not os.path.exists(rest):
        return text
    return ('' if prefix.startswith('file') else prefix) + _last_part(rest)


def _last_part(path: str) -> str:
    path = path.rstrip('/\\')
    if _HOME.fullmatch(path) or path and path == os.path.expanduser('~'):
        return '~'
    name = re.split(r'[/\\]', path)[-1]
    return '~' if name.startswith('~') else name
