"""The README's snippets run as written, and what it claims is so."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from support.loopback_hub import LoopbackHub, run_python
from support.readme import README, ROOT, blocks
from support.trained_like import trained_like

from timm_dyacts import zoo


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder in which the README's relative paths are those of a checkout."""
    folder = tmp_path_factory.mktemp('checkout')
    (folder / 'scripts').symlink_to(ROOT / 'scripts')
    return folder


def run(command: str, folder: Path) -> str:
    env = dict(os.environ, PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']]))
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def test_the_main_job_learns_the_digits(workspace):
    """Installation itself is what the run of continuous integration begins with."""
    install, main_job = blocks('bash')[0].splitlines()
    assert install == "pip install -e '.[demo]'"
    top1 = re.search(r'top1\D*([\d.]+)', run(main_job, workspace).splitlines()[-1])
    assert float(top1.group(1)) >= 98


def test_the_test_command_is_the_one_of_ci():
    install, test = blocks('bash')[1].splitlines()
    ci = (ROOT / '.ci' / 'run').read_text()
    assert install.replace('pip install', 'pip install --quiet') in ci
    assert test in ci


def test_the_tour(workspace, tmp_path):
    train, validate = blocks('bash')[2].splitlines()
    run(train, workspace)
    result = run(validate, workspace)
    assert json.loads(result.split('--result')[1])['top1'] > 50

    base = trained_like('resnet18')
    weights = safetensors.torch.save({k: v.contiguous() for k, v in base.state_dict().items()})
    tour = '\n'.join(blocks('python'))
    assert tour.count('import timm_dyacts') == 1
    with LoopbackHub() as hub:
        hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': weights, 'config.json': b'{}'})
        done = run_python(f'import os; os.chdir({str(workspace)!r})\n{tour}', hub.env(tmp_path))
    for comment in re.findall(r'^# (\{.*\})$', tour, re.MULTILINE):
        assert comment in done.stdout
    assert "['0', '1', '2'" in done.stdout or "['zero', 'one'" in done.stdout


def test_the_training_commands(workspace):
    [section] = [block for block in blocks('bash') if '--resume auto' in block]
    train, validate = section.splitlines()
    run(train, workspace)
    run(validate, workspace)
    assert len((workspace / 'results.csv').read_text().splitlines()) == 3


def test_the_counts():
    variants = list(zoo.variants())
    assert f'There are {len(variants)} variants of {len({v.base for v in variants})} architectures' in README


def test_the_table_is_what_the_script_measures():
    printed = run_python(
        f'import runpy; runpy.run_path({str(ROOT / "scripts" / "zoo_table.py")!r}, run_name="__main__")', os.environ)
    table = README.split('<!-- zoo table -->\n')[1].split('<!-- end of zoo table -->')[0]
    assert table == printed.stdout
