"""The ``config.json`` of a published checkpoint: timm's, with our record in it."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from ..run_folder import CONFIG
from ..version import __version__
from ..zoo import suggest
from .bounds import check_arguments, check_size
from .errors import HubError, shown, summarize

__all__ = ['RECORD', 'check_config', 'read_config', 'recorded', 'recorded_sha256', 'requirements']

RECORD = 'timm_dyacts'  # our entry


def requirements() -> dict[str, str]:
    """Give the version specifiers, by package, of what is published now."""
    return dict(timm=f'>={timm.__version__}', timm_dyacts=f'>={__version__}')


def recorded_sha256(config: Mapping[str, Any], file: str, name: str) -> str | None:
    """Give the SHA-256 that a config has on record of a file, ``None`` if it has none.

    Args:
        config: The config.
        file: Name of the file.
        name: What to call the checkpoint in messages.

    Raises:
        HubError: What is on record is no SHA-256.
    """
    value = recorded(config, 'sha256').get(file)
    if value is not None and not (isinstance(value, str) and re.fullmatch('[0-9a-f]{64}', value)):
        raise HubError(
            f"The {CONFIG} of '{name}' has {shown(value)} as the SHA-256 of {file}; accepted are 64 digits of 0-9 and "
            f"a-f. Its owner has to publish it again.")
    return value


def recorded(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Give what a config has on record under ``'sha256'`` (by file) or ``'requires'`` (by package)."""
    record = config.get(RECORD)
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read a config.

    Args:
        path: The file.
        name: What to call the checkpoint in messages.

    Raises:
        HubError: It is not one of timm's.
    """
    check_size(path, name)
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise HubError(
            f"The {CONFIG} of '{name}' is not JSON: {summarize(e)}. Its owner has to publish it again.") from e
    parts = [config.get(key, {}) for key in ('pretrained_cfg', 'model_args')] if isinstance(config, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(config.get('architecture'), str):
        raise HubError(
            f"The {CONFIG} of '{name}' is not one of timm's, with an architecture and its arguments. Is it a model of "
            f"another library?")
    return config


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Raise a ``HubError`` if a config cannot give a model here, or not the one that was published."""
    check_arguments(config, name)
    _check_requirements(config, name)
    _check_architecture(config, name)
    _check_classes(config, name)


def _check_requirements(config: Mapping[str, Any], name: str) -> None:
    installed = dict(timm=timm.__version__, timm_dyacts=__version__)
    for package, specifier in recorded(config, 'requires').items():
        if package not in installed:
            continue
        try:
            # Some versions of packaging take lists as well, and `===` takes any text, which users are to paste.
            if not isinstance(specifier, str) or not re.fullmatch(r'[\w.*+!<>=~, -]{1,200}', specifier, re.ASCII):
                raise InvalidSpecifier
            allowed = SpecifierSet(specifier)
        except InvalidSpecifier:
            raise HubError(
                f"The {CONFIG} of '{name}' asks for {package} {shown(specifier)}, which is no version specifier. Its "
                f"owner has to publish it again.") from None
        if not allowed.contains(installed[package], prereleases=True):
            raise HubError(
                f"'{name}' needs {package} {specifier}, and {installed[package]} is installed: "
                f"pip install --upgrade '{package}{specifier}'")


def _check_architecture(config: Mapping[str, Any], name: str) -> None:
    architecture = config['architecture']
    if not timm.is_model(architecture) or not architecture.isprintable():  # the tag of a name may be any
        raise HubError(
            f"Could not load '{name}': its architecture {shown(architecture)} is known neither to timm "
            f"{timm.__version__} nor to timm_dyacts {__version__}.{suggest(architecture)} A newer version may "
            f"know it: pip install --upgrade timm timm_dyacts")


def _check_classes(config: Mapping[str, Any], name: str) -> None:
    """timm takes a contradiction as a wish for another classifier, and leaves that one untrained.

    A number in ``pretrained_cfg`` that is not that of the config is none: the latter counts, and older releases of timm
    have left the former at that of the weights that a model was fine-tuned from.
    """
    cfg, args = config.get('pretrained_cfg', config), config.get('model_args', {})
    where = 'num_classes' if config.get('num_classes') is not None else 'pretrained_cfg.num_classes'
    told = {
        where: config.get('num_classes', cfg.get('num_classes')),
        'model_args.num_classes': args.get('num_classes'),
        'the length of label_names': len(names) if isinstance(names := config.get('label_names'), list) else None,
    }
    told = {key: value for key, value in told.items() if value is not None}
    first, *others = told.values() or (None,)
    if any(other != first for other in others):
        raise HubError(
            f"The {CONFIG} of '{name}' contradicts itself about the number of classes: "
            f"{', '.join(f'{key} is {shown(value)}' for key, value in told.items())}. Its owner has to publish it "
            f"again.")
