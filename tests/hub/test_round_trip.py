"""The guide's story of publishing and pulling, with the card's own code on the other side."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from support.loopback_hub import LoopbackHub, run_python
from support.predictions import predict
from support.readme import ROOT, blocks, guide
from support.trained_like import trained_like

from timm_dyacts.data import create_dataset
from timm_dyacts.run_folder import RunFolder

STORY = guide('publishing')
REPO_ID = 'user/resnet10t_dyrelu_b.digits'
# What somebody adds to the first snippet of the card, which leaves ``model``.
PREDICT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.predictions import predict

torch.save(predict(model), sys.argv[1])
"""


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """The story as written: (the Hub, the folder of the checkout)."""
    folder = tmp_path_factory.mktemp('checkout')
    (folder / 'scripts').symlink_to(ROOT / 'scripts')
    base = trained_like('resnet10t')
    weights = safetensors.torch.save({k: v.contiguous() for k, v in base.state_dict().items()})
    with LoopbackHub() as hub:
        hub.add_repo('timm/resnet10t.c3_in1k', {'model.safetensors': weights})
        env = hub.env(folder / 'cache', token=hub.token)
        env['PATH'] = os.pathsep.join([os.path.dirname(sys.executable), env['PATH']])
        for command in blocks('bash', STORY)[0].splitlines():
            done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
        yield hub, folder


@pytest.fixture(scope='module')
def snippets(published):
    """The Python of the card."""
    card = published[0].repos[REPO_ID].find().files['README.md'].content.decode()
    return re.findall(r'```python\n(.*?)```', card, re.DOTALL)


def test_the_card_names_its_source(published):
    card = published[0].repos[REPO_ID].find().files['README.md'].content.decode()
    assert 'base_model: timm/resnet10t.c3_in1k' in card and 'license: apache-2.0' in card
    assert 'The warm start was exact' in card


def test_the_dry_run_showed_what_was_published(published):
    hub, folder = published
    shown = {path.name: path.read_bytes() for path in (folder / 'output/story/digits/publish').iterdir()}
    files = hub.repos[REPO_ID].find().files
    assert {name: blob.content for name, blob in files.items() if name != '.gitattributes'} == shown


def test_the_cards_code_gives_the_same_predictions(published, snippets, tmp_path):
    """In a fresh process with an empty cache, without a token, all of it as copied out of the card and the guide."""
    hub, folder = published
    code = '\n'.join([snippets[0], PREDICT, *snippets[1:], *blocks('python', STORY)])
    process = run_python(code, hub.env(tmp_path / 'cache'), str(tmp_path / 'logits.pt'))
    theirs = torch.load(tmp_path / 'logits.pt')
    ours = predict(timm.create_model(f'local-dir:{folder}/output/story/digits', pretrained=True).eval())
    assert torch.equal(theirs, ours)
    targets = torch.tensor(create_dataset('digits').targets)
    assert (theirs.argmax(1) == targets).float().mean() > 0.5, 'it has learnt something'

    probabilities, shapes = process.stdout.splitlines()[:5], process.stdout.splitlines()[5:]
    assert all(re.fullmatch(r'\d+\.\d% \d', line) for line in probabilities)
    assert len(shapes) == 6 and shapes[-1] == 'torch.Size([1, 512])'


def test_the_cards_recipe_trains_again(published, tmp_path):
    """Where there is nothing but the package and the recipe that was published."""
    pytest.importorskip('timm_dyacts.cli.train')
    hub, _ = published
    files = hub.repos[REPO_ID].find().files
    card = files['README.md'].content.decode()
    [recipe] = re.findall(r'```bash\n(.*?)```', card.split('## Recipe')[1], re.DOTALL)
    install, command = recipe.splitlines()
    assert install == 'pip install timm_dyacts'
    (tmp_path / 'args.yaml').write_bytes(files['args.yaml'].content)
    arguments = [sys.executable, '-m', 'timm_dyacts', *command.split()[1:], '--epochs', '1', '--warmup-epochs', '0']
    env = hub.env(tmp_path / 'cache') | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / 'output' / 'train').iterdir()  # where a run was written is not published
    results = RunFolder(folder).checkpoint('best').read_results()
    assert results.start.source == 'timm/resnet10t.c3_in1k' and results.start.warm_start == 'exact'


def test_the_measurement_can_be_repeated(published, tmp_path):
    command = re.search(r'`timm-dyacts (validate --verify \S+ \S+)`', STORY.replace('\n', ' '))[1]
    hub, folder = published
    arguments = [sys.executable, '-m', 'timm_dyacts', *command.split(), '--dataset', 'digits', '--workers', '0']
    done = subprocess.run(arguments, cwd=folder, env=hub.env(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"top1"' in done.stdout
