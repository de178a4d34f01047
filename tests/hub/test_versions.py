"""What the room uses of other packages, and they do not promise to keep, is looked for at import."""
import importlib
import importlib.util
import sys
from types import ModuleType

import huggingface_hub
import pytest
import timm

import timm_dyacts.hub
from timm_dyacts.version import SUPPORTED


class Without(ModuleType):
    """A module without one of its names."""

    def __init__(self, module, name):
        super().__init__(module.__name__)
        self._module, self._name = module, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._module, name)


@pytest.mark.parametrize('module, package, part, name', [
    ('stage', timm, 'timm.models', 'filter_pretrained_cfg'),
    ('errors', huggingface_hub, 'huggingface_hub.errors', 'EntryNotFoundError'),
    ('push', huggingface_hub, 'huggingface_hub.utils', 'validate_repo_id'),
])
def test_an_unknown_version_is_refused(module, package, part, name, monkeypatch):
    spec = importlib.util.find_spec(f'{timm_dyacts.hub.__name__}.{module}')
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    monkeypatch.setitem(sys.modules, part, Without(importlib.import_module(part), name))
    version = package.__version__.replace('.', r'\.')
    with pytest.raises(ImportError, match=f'{package.__name__} {version} is not known .*{name}.* supports') as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(error.value).endswith(f'supports {package.__name__}{SUPPORTED[package.__name__]}.')
