"""What is published of a real run says nothing of the machine that it ran on."""
import json
import os
import platform
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.photos import write_photos
from support.small_run import train_small

from timm_dyacts import cli, hub

pytest.importorskip('matplotlib')
MARKER = 'mallory'


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A run that started from files in folders with a marker in their names, and the folder of a dry run of it."""
    home = tmp_path_factory.mktemp('x') / MARKER
    images = write_photos(home / 'flowers')
    weights = Path(train_small(images, home / 'out').folder, 'model.safetensors')
    run = Path(train_small(
        images, home / 'out', '--initial-checkpoint', weights, '--experiment', f'{MARKER}-7', '--workers', 0).folder)
    options = yaml.safe_load((run / 'args.yaml').read_text())
    options |= dict(log_wandb=True, wandb_tags=[MARKER], wandb_project=MARKER)
    (run / 'args.yaml').write_text(yaml.safe_dump(options))
    results = json.loads((run / 'results.json').read_text())
    assert MARKER in results['start']['source']  # for the owner of the run, all is on record
    config = json.loads((run / 'config.json').read_text())
    config['model_args']['act_layer'] = 'relu'
    config['pretrained_cfg']['notes'] = [f'/home/{MARKER}/notes']
    config['pretrained_cfg']['url'] = f'file:///home/{MARKER}/weights.pth'
    config['label_names'][0] = '/m/012345'  # the name of a class, as Open Images has them
    (run / 'config.json').write_text(json.dumps(config))
    return hub.publish(run, 'user/model', dry_run=True)


def test_no_published_byte_names_the_user(published):
    secrets = {MARKER, os.path.expanduser('~') + os.sep, *(name for name in [platform.node()] if len(name) > 5)}
    paths = list(published.folder.iterdir())
    assert {'args.yaml', 'README.md', 'config.json', 'curves.png', 'confusion.png'} <= {path.name for path in paths}
    for path in paths:
        for secret in secrets:
            assert secret.encode() not in path.read_bytes(), (path.name, secret)


def test_pictures_have_no_text_but_the_programs_name(published):
    """Their compressed chunks would hide it from a search through the bytes."""
    for path in published.folder.glob('*.png'):
        with Image.open(path) as image:
            image.load()
            assert set(image.info) <= {'Software', 'dpi'}, path.name
            assert 'Matplotlib' in image.info.get('Software', 'Matplotlib')


def test_what_makes_the_recipe_is_there(published):
    recipe = yaml.safe_load((published.folder / 'args.yaml').read_text())
    assert (recipe['data_dir'], recipe['initial_checkpoint']) == ('flowers', 'model.safetensors')
    assert recipe['model'] == 'test_resnet' and 'output' not in recipe
    assert json.loads((published.folder / 'config.json').read_text())['label_names'][0] == '/m/012345'
    assert 'a file `model.safetensors`' in (published.folder / 'README.md').read_text()


def test_the_dry_run_tells(published, capsys):
    cli.main(['publish', str(published.folder.parent), '--repo-id', 'user/model', '--dry-run'])
    said = capsys.readouterr().out
    left_out = said.partition('args.yaml is published without ')[2].partition('.')[0].split(', ')
    assert {'output', 'experiment', 'wandb_project', 'wandb_tags'} <= set(left_out)
    assert "data_dir is 'flowers'" in said and "initial_checkpoint is 'model.safetensors'" in said
