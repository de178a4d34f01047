"""timm's own ``train.py`` and ``validate.py`` through ``timm-dyacts run``; with a variant, in test_other_libraries.py.

timm's wheel does not have them: the environment variable ``TIMM_SCRIPTS`` says in which folder they are.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.readme import ROOT

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS', 'not given'))
pytestmark = pytest.mark.skipif(
    not (SCRIPTS / 'train.py').exists(), reason='TIMM_SCRIPTS is to be the folder of train.py and validate.py of timm')

DATA = ['--data-dir', 'photos', '--num-classes', 2, '--img-size', 48, '--batch-size', 4, '--device', 'cpu',
        '--workers', 0]
TRAIN = [*DATA, '--epochs', 2, '--warmup-epochs', 0, '--lr', 0.02, '--model-ema', '--mixup', 0.2, '--output', 'output']
RUN = ['-m', 'timm_dyacts', 'run']


@pytest.fixture(scope='module')
def folder(tmp_path_factory, write_photos):
    folder = tmp_path_factory.mktemp('scripts')
    write_photos(folder / 'photos')
    return folder


def python(folder, *command):
    env = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='')
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(path):
    checkpoint = torch.load(path, map_location='cpu', weights_only=False)
    return {(part, key): value for part in ('state_dict', 'state_dict_ema') for key, value in checkpoint[part].items()}


def test_with_a_model_of_timm_nothing_is_different(folder):
    results = []
    for name, program in (('plain', []), ('run', RUN)):
        python(folder, *program, SCRIPTS / 'train.py', '--model', 'test_resnet', '--experiment', name, *TRAIN)
        out = folder / 'output' / name
        validated = python(
            folder, *program, SCRIPTS / 'validate.py', '--model', 'test_resnet', *DATA,
            '--checkpoint', out / 'last.pth.tar')
        result = json.loads(validated.split('--result')[1])
        results.append((
            (out / 'summary.csv').read_bytes(), weights(out / 'last.pth.tar'), result['top1'], result['top1_err']))
    (summary, state, *metrics), (our_summary, our_state, *our_metrics) = results
    assert our_summary == summary and our_metrics == metrics
    assert our_state.keys() == state.keys() and all(torch.equal(our_state[key], state[key]) for key in state)
