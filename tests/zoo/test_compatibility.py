"""What checkpoints, configs and scripts out there rely on: the names of the zoo and of what its models hold."""
import hashlib
import json
import re

import pytest
import timm
import torch

from timm_dyacts.layers.calls import InTurn, places_left_plain

# Digests of the sorted names and shapes in the state dict, as version 0.1 had them.
STATE_DICTS = {
    'resnet18_dyrelu_a': '5b692de5a3068f2803ec0580911349858152d7722d572361ab6125522124ec3a',
    'resnet18_dyrelu_b': 'a1f5f1a2f10a659838d355903a3dec82c2656fa4105eddeccc9a7ff7caa2b8e4',
    'resnet18_dyrelu_c_nobn': 'b1435a5dae2bc80c0d8c0e02efa4dfda4cb9740daba151ffcfd3b47510a25976',
    'resnet50_softpool': 'a70dbc5161cf2045a7a1e47946736ad5f6b3d6f300049d2836bdd65e7da398d0',
    'resnet_brelu_nobn': '97427b2268e28887d59e1b89d128b18e1268dccdb2fa920b10cbf0f153e95ebb',
    'seresnet50_softpool_nobn': '693a370ada40bc0fd84370585e5e1a2b036bd656119f1bf51ad6edc6713d37e5',
    'mobilenetv2_softpool': '11dab7ce8b76d519a2f1efd1376b4193f89f93eb279d5969c8a3278e51727488',
    'mobilenetv3_small_050_dyrelu_b': '3da724b2c88006c244dfd3d319c98f89c991c6fc7d86d17c1d5e2b4ee7088529',
    'efficientnet_b0_dyrelu_c': '3130866ecf3e804002619e78f5643716b1c78ec14f48ad46eef67e6ea1425006',
    'densenet121_belu': '4f441fdd51587231857a734208ac4f27192b2a9c17754b77a26f065b3f1bfa39',
    'regnety_002_brelu': '326b675c7a460cf99f023118b4b35d813e01df8ae28ca4e95b016b51b8611860',
    'dla34_dyrelu_b': '9dfae68e5e9a368ae62c4c1995aaf9e089e2568159c8174f171d634baa4d387a',
    'dla60_dyrelu_b': 'c0ff21ed4a83817f609cd562c84f431c808ac82d722db93891fd898af6f002c6',
    'hrnet_w18_small_dyrelu_b': 'e30f383fc013473463ae35a851c39681b5ee8ca815ebe395ca3218cc56685afa',
    'convmixer_768_32_dyrelu_b': '328fbf390bd74d39c05be84d482ebb299842e1fd2cb99df9a23e97d8accf8254',
    'inception_v3_softpool': '981156f603a76f3d9da10200da57f3dc5cddf57efc1ff9cc1100bccf5b515963',
    'vgg11_bn_brelu': 'ad531ad3fe93a868da8cc6525863ed3c46522a0e94897b0b0a20c284fbe32242',
}
NEWER = {f'{base}_dyrelu_b' for base in (
    'res2net50_26w_4s', 'res2net50d', 'res2net101_26w_4s', 'res2next50')}


def digest(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@pytest.mark.parametrize('name', STATE_DICTS)
def test_the_state_dict_has_the_names_and_shapes_of_version_0_1(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    state = model.state_dict()
    # Where there was none since the calls differ in width, `accept_old_entries` makes up for it.
    left_plain = tuple(f'{place}.' for place in places_left_plain(model))
    assert bool(left_plain) == name.startswith(('dla60', 'hrnet'))
    state = {key: value for key, value in state.items() if not key.startswith(left_plain)}
    # Where one operator served several calls, each has got its own; `InTurn` reads checkpoints of the one.
    for place, module in model.named_modules():
        if isinstance(module, InTurn):
            state = {key.replace(f'{place}.0.', f'{place}.'): value for key, value in state.items()
                     if not re.match(rf'{re.escape(place)}\.[1-9]', key)}
    assert digest(sorted((key, list(value.shape)) for key, value in state.items())) == STATE_DICTS[name]


def test_the_zoo_has_the_names_of_version_0_1():
    names = sorted(set(timm.list_models(module='zoo')) - NEWER)
    assert len(names) == 542
    assert digest(names) == '1685196ec811aa07dab0786121bab9fe9373f8ce117084f6a0385c3ee0a9a4eb'


def test_the_zoo_has_the_pretrained_tags_of_version_0_1():
    """With timm 1.0.31; a later one may have more of them."""
    if timm.__version__ != '1.0.31':
        pytest.skip('the tags are those of the installed timm')
    names = sorted(timm.list_pretrained([f'{name}.*' for name in timm.list_models(module='zoo') if name not in NEWER]))
    assert digest(names) == '465eb43e1579238354fd34dfd0070a7091830aeb1b37aa03363b63c141f2d7f0'
