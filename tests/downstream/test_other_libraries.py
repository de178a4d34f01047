"""The programs of model_cards/guides/other-libraries.md, as written."""
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
from packaging.requirements import Requirement
from support.loopback_hub import LoopbackHub
from support.readme import ROOT, blocks
from support.trained_like import trained_like

PAGE = (ROOT / 'model_cards' / 'guides' / 'other-libraries.md').read_text()
SECTIONS = dict(re.findall(r'^## ([^\n]*)\n(.*?)(?=^## |\Z)', PAGE, re.DOTALL | re.MULTILINE))
PROGRAMS = [
    (title, number, program)
    for title, text in SECTIONS.items() for number, program in enumerate(blocks('python', text))
]


@pytest.fixture(scope='module')
def hub():
    """A Hub with the checkpoint of timm's that the page speaks of."""
    state = trained_like('resnet18').state_dict()
    weights = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    with LoopbackHub() as hub:
        hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': weights, 'config.json': b'{}'})
        yield hub


@pytest.fixture(scope='module')
def run(tmp_path_factory, hub, write_photos):
    """Run a command or a program where the photos and the run of the page are."""
    folder = tmp_path_factory.mktemp('workspace')
    env = hub.env(folder / 'cache') | dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='')
    env['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), env['PATH']])
    write_photos(folder / 'photos')

    def run(*command, timeout=300):
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
        return done.stdout

    run.folder = folder
    [train] = blocks('bash', PAGE.split('\n## ')[0])
    run('sh', '-c', train)
    return run


@pytest.mark.parametrize('title, number, program', PROGRAMS, ids=[f'{title}-{number}' for title, number, _ in PROGRAMS])
def test_a_program(request, title, number, program):
    for module in sorted(set(re.findall(r'^(?:import|from) (\w+)', program, re.MULTILINE))):
        if find_spec(module) is None:
            pytest.skip(f'{module} is not installed')
    if 'onnx' in program:
        pytest.importorskip('onnxscript')
    run = request.getfixturevalue('run')  # which takes seconds, and nothing where the library is missing
    path = Path(run.folder, f'{title.split()[0]}_{number}.py')
    path.write_text(program)
    printed = run(sys.executable, str(path))
    if title == 'torchmetrics':
        results = (run.folder / 'output' / 'photos' / 'summary.csv').read_text()
        assert printed.strip() in {f'{float(value):.2f}' for value in re.findall(r'[\d.]+', results)}


def test_the_scripts_of_timm(request):
    scripts = Path(os.environ.get('TIMM_SCRIPTS', 'not given'))
    if not (scripts / 'train.py').exists():
        pytest.skip('TIMM_SCRIPTS is to be the folder of train.py and validate.py of timm')
    run = request.getfixturevalue('run')
    [commands] = blocks('bash', SECTIONS["timm's own train.py and validate.py"])
    _, validated = (
        run('sh', '-c', re.sub(r'(?<= run )(?=\w+\.py )', f'{scripts}/', command)) for command in commands.splitlines())
    state = torch.load(run.folder / 'output' / 'timm' / 'last.pth.tar', weights_only=False)['state_dict']
    trained = [value for key, value in state.items() if 'fc2' in key]
    assert len(trained) >= 8 and all(value.isfinite().all() and value.any() for value in trained)
    last = (run.folder / 'output' / 'timm' / 'summary.csv').read_text().splitlines()[-1].split(',')
    assert json.loads(validated.split('--result')[1])['top1'] == pytest.approx(float(last[3]))


def test_each_library_of_the_extra_is_on_the_page():
    """With the version that was run, which is what the extra asks for."""
    toml = (ROOT / 'pyproject.toml').read_text()
    [extra] = re.findall(r'^downstream = \[\n(.*?)^\]', toml, re.DOTALL | re.MULTILINE)
    asked = {r.name: next(iter(r.specifier)).version for r in map(Requirement, re.findall(r'"(.*)"', extra))}
    rows = re.findall(r'^\| `?([\w-]+)`? \| ([\d.]+) \|$', SECTIONS['What was run'], re.MULTILINE)
    assert {name: version for name, version in rows} == asked
