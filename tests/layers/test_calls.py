"""State dicts of version 0.1, which had one operator or none in a place that is called several times."""
import copy
import logging

import pytest
import timm
import torch
from support.trained_like import output, probe, trained_like, trained_like_
from torch import nn

from timm_dyacts import DyReLU, Transition, convert
from timm_dyacts.layers.calls import ByWidth, InTurn, places_left_plain, update_entries

REMARK = 'The checkpoint is one of version 0.1'


class Levels(nn.Module):
    """One activation for two widths, called in a comprehension: an operator for each width."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 6, 1), nn.Conv2d(4, 4, 1)])
        self.relu = nn.ReLU()

    def forward(self, x):
        wide, same = [self.relu(conv(x)) for conv in self.convs]
        return same + wide[:, 2:]


class Chain(nn.Module):
    """One activation for two widths, called in a loop: an operator for each call."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)])
        self.relu = nn.ReLU()

    def forward(self, x):
        for conv in self.convs:
            x = self.relu(conv(x))
        return x


class Twice(nn.Module):
    """One activation for two convolutions of the same width."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))))


class Bottleneck(Twice):
    """One activation for two convolutions, and for the sum, which keeps its plain form."""

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


def converted(*blocks, **kwargs):
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *blocks, nn.Conv2d(4, 4, 1)), act='dyrelu_b', **kwargs)
    return moved(model)


@torch.no_grad()
def moved(model):
    """Dynamic ReLUs that have learned something."""
    for module in model.modules():
        if isinstance(module, DyReLU):
            for parameter in module.parameters():
                parameter.normal_(std=0.3)
    return model.eval()


def of_version_0_1(model):
    """The state dict that version 0.1 had of such a model, and a model that computes what it did with it."""
    places, plain = places_left_plain(model), copy.deepcopy(model)
    assert places
    for place in places:
        for name, module in plain.get_submodule(place).named_children():
            if isinstance(module, DyReLU):
                setattr(plain.get_submodule(place), name, nn.ReLU())
    inside = tuple(f'{place}.' for place in places)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}, plain


def remarks(caplog):
    return [record for record in caplog.records if record.getMessage().startswith(REMARK)]


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize('blocks', [[Levels], [Chain], [Bottleneck], [Levels, Chain, Bottleneck]], ids=
                         lambda blocks: '+'.join(block.__name__ for block in blocks))
@pytest.mark.parametrize('meta', [False, True])
def test_where_0_1_had_none_the_plain_activation_is_left(blocks, meta, caplog):
    model = converted(*(block() for block in blocks))
    assert isinstance(model[2].relu, ByWidth if blocks[0] is Levels else InTurn)
    state, plain = of_version_0_1(model)
    before = dict(state)
    other = copy.deepcopy(model).to('meta') if meta else model
    assert str(other.load_state_dict(state, assign=meta)) == '<All keys matched successfully>'
    assert state == before, 'the caller keeps it as it is'
    assert torch.equal(output(other, probe(8)), output(plain, probe(8)))
    assert len(remarks(caplog)) == 1
    assert f"{len(blocks)} places such as '2.relu'" in caplog.text
    other.train()(probe(8)).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_copies_and_wrapped_models_load_them_too(caplog):
    model = converted(Levels())
    state, plain = of_version_0_1(model)
    twice = convert(copy.deepcopy(model), act='relu')
    twice = moved(convert(twice, act='dyrelu_b'))
    for other, prefix in ((copy.deepcopy(model), ''), (nn.Sequential(model), '0.'), (twice, ''),
                          (torch.compile(model), '_orig_mod.')):
        caplog.clear()
        other.load_state_dict({prefix + key: value for key, value in state.items()})
        assert len(remarks(caplog)) == 1 and "such as '2.relu'" in caplog.text
        if prefix != '_orig_mod.':
            assert torch.equal(output(other, probe(8)), output(plain, probe(8)))


def test_what_is_not_of_0_1_is_loaded_as_ever(caplog):
    model = converted(Levels(), Bottleneck())
    state, _ = of_version_0_1(model)
    whole = model.state_dict()
    lost = [key for key in whole if key not in state]
    for key in lost:  # some of the entries
        for partial in ({k: v for k, v in whole.items() if k != key}, state | {key: whole[key]}):
            with pytest.raises(RuntimeError, match='Missing key'):
                model.load_state_dict(partial)
    for key in state:  # none, and others are not there either
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            model.load_state_dict({k: v for k, v in state.items() if k != key})
    expected = output(model, probe(8))
    missing = model.load_state_dict({'0.bias': model[0].bias}, strict=False).missing_keys
    assert set(missing) == set(whole) - {'0.bias'}
    assert torch.equal(output(model, probe(8)), expected), 'a part of a model leaves the rest as it is'
    model.load_state_dict(whole)
    assert not remarks(caplog)


def test_where_0_1_had_one_operator_its_entries_must_be_there(caplog):
    model = converted(Twice(), Levels())
    assert list(places_left_plain(model)) == ['3.relu']
    state, plain = of_version_0_1(model)
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith('2.relu')})
    shared = {key.replace('2.relu.0.', '2.relu.'): value for key, value in state.items() if '2.relu.1' not in key}
    model.load_state_dict(shared)
    assert len(remarks(caplog)) == 1
    plain[2].relu[1].load_state_dict(plain[2].relu[0].state_dict())
    assert torch.equal(output(model, probe(8)), output(plain, probe(8)))


def test_operators_that_0_1_did_not_have_are_not_made_up():
    nowhere_else = convert(nn.Sequential(nn.Conv2d(3, 4, 1), Levels()), act='dyrelu_b')
    silu = Levels()
    silu.relu = nn.SiLU()
    leading = convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), silu, nn.Conv2d(4, 4, 1)), act='dyrelu_b', transition=True)
    assert isinstance(leading[2].relu['6'], Transition)
    for model in (nowhere_else, leading):
        assert not places_left_plain(model)
        state = {key: value for key, value in model.state_dict().items() if '.relu.' not in key}
        with pytest.raises(RuntimeError, match='Missing key'):
            model.load_state_dict(state)
        assert update_entries(model, dict(state)) == []


@pytest.mark.parametrize('base, operator', [
    ('hrnet_w18_small', 'dyrelu_b'), ('hrnet_w18_small', 'dyrelu_a'), ('dla46_c', 'dyrelu_b')])
def test_variants_of_the_zoo(base, operator, tmp_path, caplog):
    name = f'{base}_{operator}'
    torch.manual_seed(0)
    model = moved(trained_like_(timm.create_model(name)))
    state, plain = of_version_0_1(model)
    torch.save(state, tmp_path / 'old.pth')
    expected = output(plain, probe())
    overlay = dict(file=str(tmp_path / 'old.pth'))
    ways = [lambda: timm.create_model(name, checkpoint_path=str(tmp_path / 'old.pth'))]
    if operator == 'dyrelu_b':
        ways.append(lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay))
    for load in ways:
        caplog.clear()
        loaded = load()
        assert torch.equal(output(loaded, probe()), expected)
        assert len(remarks(caplog)) == 1
    if base == 'dla46_c':
        caplog.clear()
        other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7).eval()
        assert torch.equal(other.forward_features(probe()), plain.forward_features(probe()))
        assert len(remarks(caplog)) == 1
        key = next(key for key in model.state_dict() if key not in state)
        torch.save(state | {key: model.state_dict()[key]}, tmp_path / 'old.pth')
        with pytest.raises(RuntimeError, match=f'neither one of {name} .it lacks .* nor one of {base}'):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_checkpoint_of_the_base_gets_no_remark(tmp_path, caplog):
    base = trained_like('dla46_c')
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    loaded = timm.create_model(
        'dla46_c_dyrelu_b', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'base.pth')))
    assert torch.equal(output(loaded, probe()), output(base, probe())) and not remarks(caplog)
