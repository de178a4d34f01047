"""The face of the package, the order of its rooms, and what it says of the packages that it needs."""
import ast
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from support.readme import README, ROOT, guide

import timm_dyacts
from timm_dyacts import version

PACKAGE = ROOT / 'timm_dyacts'
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text()


@pytest.fixture(scope='module')
def project():
    """The table of that name in pyproject.toml."""
    # Before Python 3.11 pytest itself requires tomli.
    toml = importlib.import_module('tomllib' if sys.version_info >= (3, 11) else 'tomli')
    return toml.loads((ROOT / 'pyproject.toml').read_text())['project']


# The face


@pytest.mark.parametrize('name', timm_dyacts.__all__)
def test_what_is_offered_exists_and_is_documented(name):
    value = getattr(timm_dyacts, name)
    if name != '__version__':
        # A class would inherit that of its base.
        assert vars(value).get('__doc__') if inspect.isclass(value) else value.__doc__
    assert f'`{name}`' in guide('api')


def test_nothing_else_is_public():
    submodules = {module.name for module in pkgutil.iter_modules(timm_dyacts.__path__)}
    public = {name for name in dir(timm_dyacts) if not name.startswith('_')}
    assert public - submodules <= set(timm_dyacts.__all__)
    assert len(timm_dyacts.__all__) == len(set(timm_dyacts.__all__))


def test_what_only_convert_needs_is_kept_inside():
    for name in ('ChannelAffine', 'LazyDyReLU', 'channel_signs', 'factory', 'OPERATORS'):
        assert not hasattr(timm_dyacts, name)


def test_what_a_user_calls_is_there():
    assert {'convert', 'lsuv_', 'ConversionReport', 'Replacement', 'Skip', 'hub'} <= set(timm_dyacts.__all__)
    assert timm_dyacts.lsuv_ is importlib.import_module('timm_dyacts.lsuv').lsuv_
    assert {'load', 'publish', 'verify'} <= set(timm_dyacts.hub.__all__)


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_module_says_what_it_is_and_what_it_offers(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    names = {target.id for node in tree.body if isinstance(node, ast.Assign)
             for target in node.targets if isinstance(target, ast.Name)}
    only_a_docstring = len(tree.body) == 1
    assert '__all__' in names or path.name == '__main__.py' or only_a_docstring


# The rooms


def rooms():
    """The rooms in the order of CONTRIBUTING.md."""
    [listing] = re.findall(r'^```text\n(version .*?)^```', CONTRIBUTING, re.DOTALL | re.MULTILINE)
    return [room for line in listing.splitlines() for room in re.split(' {2,}', line)[0].split()]


def imports_of(path):
    """The rooms that a module imports from, wherever in its text."""
    package = ('timm_dyacts', *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or '').split('.')) if node.module else base
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split('.')) for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == 'timm_dyacts' and len(name) > 1)


def test_rooms_import_only_rooms_above_them():
    order = rooms()
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == '.py' or (path / '__init__.py').exists()}
    assert there - {'__init__', '__main__'} == set(order)
    wrong = [
        f'{path.relative_to(ROOT)} imports {theirs}'
        for path in sorted(PACKAGE.rglob('*.py'))
        if (room := path.relative_to(PACKAGE).parts[0].removesuffix('.py')) in order
        for theirs in imports_of(path)
        if theirs in order and theirs != room and order.index(theirs) >= order.index(room)
    ]
    assert not wrong


def test_the_arrows_are_those_of_the_code():
    [listing] = re.findall(r'^```text\n(layers .*?)^```', CONTRIBUTING, re.DOTALL | re.MULTILINE)
    arrows = [line.split('->') for line in listing.splitlines() if not line.startswith('cli')]
    drawn = {(a, b) for left, right in arrows for a in left.replace(',', ' ').split()
             for b in right.replace(',', ' ').split()}
    found = {(path.relative_to(PACKAGE).parts[0].removesuffix('.py'), room)
             for path in PACKAGE.rglob('*.py') for room in imports_of(path)}
    assert drawn <= found


# The packages that it needs


def test_supported_versions_are_those_of_the_project(project):
    requirements = {r.name: r.specifier for r in map(Requirement, project['dependencies'])}
    for package, versions in version.SUPPORTED.items():
        assert requirements[package] == SpecifierSet(versions)
    floors = {name: str(next(iter(s for s in spec if s.operator == '>='))) for name, spec in requirements.items()}
    python = project['requires-python'].removeprefix('>=')
    assert (
        f'Python {python}, PyTorch {floors["torch"][2:]}, torchvision {floors["torchvision"][2:]}, '
        f'timm {floors["timm"][2:]} or later'
    ) in ' '.join(README.split())


def test_the_oldest_releases_are_those_of_the_project(project):
    """Each constraint is the lower bound of a requirement, but where that has no wheel for some Python."""
    lines = (ROOT / 'tests' / 'constraints-oldest.txt').read_text().splitlines()
    oldest = [Requirement(line) for line in lines if not line.startswith('#')]
    pinned = {r.name: r.specifier for r in oldest if r.marker is None or r.marker.evaluate({'python_version': '3.10'})}
    required = map(Requirement, project['dependencies'] + project['optional-dependencies']['demo'])
    floors = {r.name: next(s.version for s in r.specifier if s.operator == '>=') for r in required}
    assert pinned.keys() == floors.keys()
    for name, floor in floors.items():
        [exactly] = pinned[name]
        assert exactly.operator == '==' and exactly.version in (floor, f'{floor}.0', f'{floor}.1'), name


def test_the_oldest_releases_are_those_that_were_run():
    lines = (ROOT / 'tests' / 'constraints-oldest.txt').read_text().splitlines()
    pinned = dict(line.split('==') for line in lines if not line.startswith('#') and ';' not in line)
    names = ('torch', 'torchvision', 'timm', 'huggingface_hub')
    assert f'| 3.10 | {" | ".join(pinned[name] for name in names)} | the fast half' in README


def test_what_is_imported_is_declared(project):
    """Packages that come with another one only as long as that one needs them, too."""
    names = {
        'PIL': 'pillow', 'yaml': 'pyyaml', 'sklearn': 'scikit-learn',
        'segmentation_models_pytorch': 'segmentation-models-pytorch'}
    declared = {Requirement(text).name for text in project['dependencies']}
    optional = {
        Requirement(text).name
        for extra in ('demo', 'onnx', 'downstream') for text in project['optional-dependencies'][extra]}
    imported = set()
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split('.')[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
    imported -= sys.stdlib_module_names
    imported -= {'timm_dyacts', 'triton'}  # PyTorch comes with the Triton that it works with
    assert {names.get(name, name) for name in imported} <= declared | optional
    assert {'numpy', 'pillow', 'pyyaml', 'tqdm'} <= declared


def test_the_project_says_who_and_where(project):
    assert project['authors'] and project['urls']
    minors = [int(text.rsplit('.', 1)[1]) for text in project['classifiers'] if ':: 3.' in text]
    assert minors == sorted(minors) and {10, 11, 12, 13} <= set(minors)
    assert project['scripts'] == {'timm-dyacts': 'timm_dyacts.cli:main'}


def test_templates_are_packed(project):
    """By the pattern for package data, which is one for each folder of files that are not Python."""
    toml = (ROOT / 'pyproject.toml').read_text()
    [patterns] = re.findall(r'^timm_dyacts = \[(.*)\]$', toml, re.MULTILINE)
    packed = {path for pattern in re.findall(r'"([^"]+)"', patterns) for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob('*') if path.is_file() and path.suffix not in ('.py', '.pyc')}
    assert packed == others


def test_the_linter_of_the_project_knows_its_folders():
    """A path in the configuration that leads nowhere would turn a rule off without a word."""
    toml = (ROOT / 'pyproject.toml').read_text()
    paths = re.findall(r'^"([\w/]+\.py)" = \["F401"\]$', toml, re.MULTILINE)
    assert paths and all(Path(ROOT, path).exists() for path in paths)
