"""Whose checkpoint is it? Files of variants and bases, in timm's and others' names: right on load, or refused."""
import re

import pytest
import timm
import torch
from support.trained_like import output, probe, trained_like, trained_like_
from torch import nn
from torch.nn.modules import module as torch_module

from timm_dyacts.zoo.weights import _compare

OPERATORS = ('dyrelu_b', 'softpool', 'brelu', 'belu')


def load(name, state, path, **kwargs):
    torch.save(state, path)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def own(name, **kwargs):
    torch.manual_seed(1)
    return trained_like_(timm.create_model(name, **kwargs))


def in_torchvision_names(state):
    """A DenseNet as torchvision's files have it: ``norm.1`` for ``norm1``, and from before there were counters."""
    return {
        re.sub(r'(denselayer\d+\.(?:norm|conv))([12]\.)', r'\1.\2', key): value
        for key, value in state.items() if not key.endswith('num_batches_tracked')
    }


def vgg_in_torchvision_names(state):
    """Linear layers where timm has convolutions, and names of their own."""
    renamed = {}
    for key, value in state.items():
        for ours, theirs in (('pre_logits.fc1', 'classifier.0'), ('pre_logits.fc2', 'classifier.3'),
                             ('head.fc', 'classifier.6')):
            key = key.replace(ours, theirs)
        renamed[key] = value.flatten(1) if value.ndim == 4 and key.startswith('classifier') else value
    return renamed


@pytest.mark.parametrize('operator', ['dyrelu_a', *OPERATORS])
def test_a_base_in_the_names_of_others(operator, tmp_path):
    base = trained_like('densenet121')
    foreign = in_torchvision_names(base.state_dict())
    assert 'features.denseblock1.denselayer1.norm.1.weight' in foreign
    model = load(f'densenet121_{operator}', foreign, tmp_path / 'file.pth')
    expected = load(f'densenet121_{operator}', base.state_dict(), tmp_path / 'timm.pth')
    assert torch.equal(output(model, probe()), output(expected, probe()))
    if model.conversion.function == 'exact':
        assert torch.equal(output(model, probe()), output(base, probe()))


def test_a_base_with_other_shapes(tmp_path):
    base = timm.create_model('vgg11')
    foreign = vgg_in_torchvision_names(base.state_dict())
    model = load('vgg11_softpool', foreign, tmp_path / 'file.pth', num_classes=10)
    assert torch.equal(model.pre_logits.fc1.weight, base.pre_logits.fc1.weight)


@pytest.mark.parametrize('operator', OPERATORS)
def test_what_old_checkpoints_lack_is_not_missed(operator, tmp_path):
    """Files from before PyTorch 0.4.1 have no ``num_batches_tracked``."""
    base, variant = trained_like('resnet18'), own(f'resnet18_{operator}')
    for i, model in enumerate((base, variant)):
        state = {key: value for key, value in model.state_dict().items() if 'num_batches' not in key}
        loaded = load(f'resnet18_{operator}', state, tmp_path / f'{i}.pth')
        expected = load(f'resnet18_{operator}', model.state_dict(), tmp_path / f'full{i}.pth')
        assert torch.equal(output(loaded, probe()), output(expected, probe()))


def test_the_tag_is_that_of_the_base_too(tmp_path):
    """torchvision's Inception has an auxiliary classifier, which timm leaves out under its tag, and no other."""
    torch.manual_seed(0)
    whole = timm.create_model('inception_v3', aux_logits=True)
    state = whole.state_dict()
    assert any(key.startswith('AuxLogits.') for key in state)
    model = load('inception_v3_softpool.tv_in1k', state, tmp_path / 'file.pth')
    assert torch.equal(model.Mixed_7c.branch_pool.conv.weight, whole.Mixed_7c.branch_pool.conv.weight)
    with pytest.raises(RuntimeError, match='AuxLogits'):
        load('inception_v3_softpool.gluon_in1k', state, tmp_path / 'file.pth')


class TestAnArchitectureThatTimmLoadsLeniently:
    """timm's DLA takes files that lack entries, or have others, and says so in the log."""

    @pytest.mark.parametrize('operator', OPERATORS)
    def test_layers_that_timm_does_not_have_are_left_out(self, operator, tmp_path):
        """The authors' files have projections that nothing uses."""
        base = trained_like('dla46_c')
        state = base.state_dict() | {'level3.project.0.weight': torch.ones(64, 64, 1, 1)}
        model = load(f'dla46_c_{operator}', state, tmp_path / 'file.pth')
        expected = load(f'dla46_c_{operator}', base.state_dict(), tmp_path / 'timm.pth')
        assert torch.equal(output(model, probe()), output(expected, probe()))

    @pytest.mark.parametrize('num_classes', [1000, 10])
    @pytest.mark.parametrize('operator', OPERATORS)
    def test_what_would_go_wrong_is_refused(self, operator, num_classes, tmp_path):
        partial = trained_like('dla46_c').state_dict()
        del partial['level2.tree1.conv1.weight']
        others = {name: own(f'dla46_c_{name}').state_dict() for name in ('dyrelu_b', 'brelu')}
        others.pop(operator, None)
        if operator == 'belu':
            del others['brelu']  # the same entries: told apart by the config only
        for state in (partial, timm.create_model('resnet18').state_dict(), *others.values()):
            with pytest.raises(RuntimeError, match='neither one of dla46_c_.* nor one of dla46_c'):
                load(f'dla46_c_{operator}', state, tmp_path / 'file.pth', num_classes=num_classes)


@pytest.mark.parametrize('num_classes', [1000, 10])
@pytest.mark.parametrize('source, target', [
    ('dyrelu_b', 'softpool'), ('dyrelu_b', 'brelu'), ('dyrelu_b', 'dyrelu_a'), ('dyrelu_b', 'dyrelu_c'),
    ('dyrelu_c', 'dyrelu_b'), ('dyrelu_b', 'dyrelu_b_nobn'), ('brelu', 'softpool'), ('brelu', 'dyrelu_b'),
    ('brelu', 'brelu_nobn'), ('brelu_nobn', 'brelu'), ('brelu_nobn', 'softpool_nobn'), ('softpool_nobn', 'softpool'),
    ('softpool_nobn', 'dyrelu_b'),
])
def test_weights_of_another_variant_are_refused(source, target, num_classes, tmp_path):
    """With another number of classes too, where timm itself is not strict."""
    state = own(f'resnet18_{source}').state_dict()
    with pytest.raises(RuntimeError, match=f'neither one of resnet18_{target} .* nor one of resnet18'):
        load(f'resnet18_{target}', state, tmp_path / 'file.pth', num_classes=num_classes)


@pytest.mark.parametrize('num_classes', [1000, 10])
@pytest.mark.parametrize('operator', [*OPERATORS, 'softpool_nobn', 'brelu_nobn'])
def test_a_damaged_checkpoint_is_refused(operator, num_classes, tmp_path):
    for name in ('resnet18', f'resnet18_{operator}'):
        state = own(name).state_dict()
        del state['layer1.0.conv1.weight']
        with pytest.raises(RuntimeError, match='"layer1.0.conv1.weight"'):
            load(f'resnet18_{operator}', state, tmp_path / 'file.pth', num_classes=num_classes)


@pytest.mark.parametrize('kwargs', [
    {}, dict(num_classes=10), dict(num_classes=0), dict(in_chans=1), dict(num_classes=0, global_pool=''),
    dict(features_only=True),
])
@pytest.mark.parametrize('operator', [*OPERATORS, 'dyrelu_b_nobn', 'softpool_nobn', 'brelu_nobn'])
def test_own_weights_stay_own(operator, kwargs, tmp_path):
    trained = own(f'resnet18_{operator}')
    model = load(f'resnet18_{operator}', trained.state_dict(), tmp_path / 'file.pth', **kwargs)
    loaded = (model.model if 'features_only' in kwargs else model).state_dict()
    changed = {'in_chans': ('conv1.weight',)}.get(next(iter(kwargs), None), ('fc.',) if kwargs else ())
    for key, value in trained.state_dict().items():
        if not key.startswith(changed):
            assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize('operator', ['dyrelu_b', 'brelu'])
def test_no_classifier_to_load(operator, tmp_path):
    """A backbone that was published without one, into a model for other classes."""
    trained = own(f'resnet18_{operator}', num_classes=0)
    model = load(f'resnet18_{operator}', trained.state_dict(), tmp_path / 'file.pth', num_classes=10)
    assert torch.equal(output(trained, probe()), model.eval().forward_head(model.forward_features(probe()), True))


def test_a_variant_may_have_fewer_entries_than_its_base_and_no_new_one():
    """As without BatchNorm where the convolutions have biases. A base's checkpoint is not taken for its own."""
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    variant = nn.Sequential(nn.Conv2d(3, 4, 1))
    variant.pretrained_cfg = dict(classifier=None, first_conv='0')
    assert _compare(variant.state_dict(), variant) == ''
    assert _compare(base.state_dict(), variant) == \
        'it has besides "1.bias", "1.running_mean", "1.running_var" and 1 more'


def test_nothing_of_the_watching_stays(tmp_path):
    """The keys are recorded by hooks on modules that are being built: gone when they have been."""
    model = load('resnet18_dyrelu_b', trained_like('resnet18').state_dict(), tmp_path / 'file.pth')
    assert not torch_module._global_module_registration_hooks
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        load('resnet18_dyrelu_b', {'nothing': torch.zeros(1)}, tmp_path / 'file.pth')
    assert not torch_module._global_module_registration_hooks


@pytest.mark.parametrize('operator', OPERATORS)
def test_a_file_of_the_base_whose_classifier_is_not_taken_over(operator, tmp_path):
    """As ``--pretrained-path`` asks for it: the classes of the file may be any."""
    base = trained_like('resnet10t', num_classes=9)
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    overlay = dict(file=str(tmp_path / 'base.pth'), num_classes=-1)
    variant = timm.create_model(
        f'resnet10t_{operator}', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert variant.num_classes == 5 and variant.fc.weight.shape[0] == 5
    weights = variant.state_dict()
    for name, value in base.state_dict().items():
        if name.startswith('layer'):
            assert torch.equal(weights[name].abs(), value.abs()), name  # those of bipolar variants are flipped
    del (incomplete := base.state_dict())['layer2.0.conv1.weight']
    torch.save(incomplete, tmp_path / 'base.pth')
    with pytest.raises(RuntimeError, match='Missing key.*layer2.0.conv1.weight'):
        timm.create_model(f'resnet10t_{operator}', pretrained=True, pretrained_cfg_overlay=overlay)
