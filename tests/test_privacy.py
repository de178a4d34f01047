"""What others may see of a run's options: no folder of this machine, whatever the option."""
import pytest
import yaml

from timm_dyacts.options import declarations, published, to_dict
from timm_dyacts.privacy import reduced
from timm_dyacts.training import TrainConfig

MARKER = 'mallory'
# Ways to write that a thing lies in somebody's folder
HOSTILE = [
    f'/home/{MARKER}/data/flowers', f'/home/{MARKER}', f'/home/{MARKER}/', f'~{MARKER}', f'~{MARKER}/x',
    f'./{MARKER}/x', f'../{MARKER}/x', f'{MARKER}/x', f'{MARKER}/deep/x.pth',
    f'C:\\Users\\{MARKER}\\x', f'c:/Users/{MARKER}/x', f'\\\\server\\{MARKER}\\x', f'file:///home/{MARKER}/x',
    f'local-dir:/home/{MARKER}/run', f'local-dir:{MARKER}/run',
    f'/home/{MARKER} the great/x', f'hfds//home/{MARKER}/x', f'hf-hub:/home/{MARKER}/x', f'torch/~/{MARKER}/x',
    f'https://{MARKER}:secret@example.org/x.pth', f'https://example.org/x.pth?token={MARKER}#{MARKER}',
    f's3://{MARKER}@bucket/x', f'pipe:curl -u {MARKER} https://example.org/x.tar', f'/Users/{MARKER}',
]


@pytest.mark.parametrize('text', HOSTILE)
def test_no_option_shows_a_folder(text):
    """Every option there is, also one that is declared tomorrow."""
    for name, declaration in declarations(TrainConfig).items():
        for value in (text, [text], {'key': text}, {'key': [{'deep': text}]}):
            shown = yaml.safe_dump(published({name: value}, TrainConfig))
            assert MARKER not in shown, (declaration.flag, shown)


@pytest.mark.parametrize('name', [
    'output', 'experiment', 'resume', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id'])
def test_private_options(name):
    assert published({name: MARKER, 'model': 'resnet18'}, TrainConfig) == {'model': 'resnet18'}


def test_unknown_options_are_not_published():
    assert published({'author': MARKER}, TrainConfig) == {}


@pytest.mark.parametrize('text, expected', [
    ('hf-hub:user/model@v1', 'hf-hub:user/model@v1'),
    ('torch/cifar10', 'torch/cifar10'),
    ('hfds/user/flowers', 'hfds/user/flowers'),
    ('https://example.org/weights/x.pth', 'https://example.org/weights/x.pth'),
    ('resnet50.a1_in1k', 'resnet50.a1_in1k'),
    ('train[:80%]', 'train[:80%]'),
    ('rand-m9-mstd0.5', 'rand-m9-mstd0.5'),
    ('/data/flowers', 'flowers'),
    ('local-dir:runs/7', 'local-dir:7'),
    ('flowers', 'flowers'),
])
def test_what_means_something_elsewhere_stays(text, expected):
    assert reduced(text) == expected


def test_names_with_a_slash():
    assert reduced({'hf_hub_id': 'user/model', 'notes': ['a/b']}, names=True) == \
        {'hf_hub_id': 'user/model', 'notes': ['a/b']}
    assert reduced({'hf_hub_id': '/home/mallory/model'}) == {'hf_hub_id': 'model'}


def test_the_recipe_can_be_trained_with():
    """What is published of a run is taken by ``TrainConfig``, and is the same run but for its paths."""
    config = TrainConfig(model='resnet18', data_dir='/home/mallory/flowers', epochs=3, output='/home/mallory/out')
    recipe = published(to_dict(config), TrainConfig)
    again = TrainConfig(**recipe)
    assert (again.data_dir, again.epochs, again.output) == ('flowers', 3, './output/train')
