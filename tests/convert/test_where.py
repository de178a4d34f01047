"""``where``: which activations become Dynamic ReLU, and what that costs; ``max_hidden``, which caps the widest."""
import pytest
import timm
import torch
from support.trained_like import max_diff, output, probe, trained_like
from timm.models import save_for_hf
from torch import nn

from timm_dyacts import ConversionError, DyReLU, DyReLUB, convert
from timm_dyacts.cli.convert import main as convert_main
from timm_dyacts.coverage import measure


def places(model):
    return {name for name, module in model.named_modules() if isinstance(module, DyReLU)}


def call_order(model, types, size=64):
    """The paths of modules in the order in which a forward pass gets to them."""
    order = []
    for name, module in model.named_modules():
        if isinstance(module, types):
            module.register_forward_hook(lambda m, args, out, name=name: name in order or order.append(name))
    output(model, probe(size).to(next(model.parameters()).device))
    return order


@pytest.mark.parametrize('name', ['resnet26', 'mobilenetv2_050', 'regnetx_002', 'vgg11'])
def test_late_is_inner_in_the_second_half(name):
    with torch.device('meta'):
        order = call_order(timm.create_model(name), (nn.ReLU, nn.ReLU6))
        inner = convert(timm.create_model(name), act='dyrelu_b')
        late = convert(timm.create_model(name), act='dyrelu_b', where='late')
    backbone = [path for path in order if path.partition('.')[0] not in ('head', 'pre_logits')]
    assert places(late) == places(inner) & set(backbone[len(backbone) // 2:])
    assert 0 < len(places(late)) < len(places(inner))
    skipped = {s.name: s.reason for s in late.conversion.skipped}
    assert skipped[backbone[0]] == "in the first half of the activations (where='late')"
    assert late.conversion.function == 'exact'


@pytest.mark.parametrize('name, replaced', [
    ('Bottleneck', 1), ('Bottle2neck', 1), ('ResNetBottleNeckLayer', 1), ('BasicBlock', 2)])
def test_what_is_a_bottleneck_block(name, replaced):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.act1 = nn.Conv2d(3, 4, 1), nn.ReLU()
            self.conv2, self.act2 = nn.Conv2d(4, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.act2(self.conv2(self.act1(self.conv1(x))) + x)

    block = type(name, (Block,), {})
    assert len(places(convert(nn.Sequential(block(), nn.Conv2d(3, 2, 1)), act='dyrelu_b'))) == replaced
    assert len(places(convert(nn.Sequential(block(), nn.Conv2d(3, 2, 1)), act='dyrelu_b', where='all'))) == 2


class Backwards(nn.Module):
    """Registers its activations in the opposite order to that in which it calls them, an odd number of them."""

    def __init__(self):
        super().__init__()
        for i in (4, 3, 2, 1, 0):
            self.add_module(f'act{i}', nn.ReLU())
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        for i in range(5):
            x = getattr(self, f'act{i}')(self.conv(x))
        return x


def test_the_order_is_that_of_the_calls_and_the_middle_is_late():
    assert places(convert(Backwards(), act='dyrelu_b', where='late', input_size=(3, 8, 8))) == {'act2', 'act3', 'act4'}


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv2_050'])
def test_late_does_not_depend_on_the_input_size(name):
    with torch.device('meta'):
        found = [places(convert(timm.create_model(name), act='dyrelu_b', where='late', input_size=(3, size, size)))
                 for size in (64, 131, 224)]
    assert found[0] and found[0] == found[1] == found[2]


def test_late_again_changes_nothing_and_inner_completes_it():
    model = convert(timm.create_model('test_resnet'), act='dyrelu_b', where='late')
    before = {name: id(model.get_submodule(name)) for name in places(model)}
    convert(model, act='dyrelu_b', where='late')
    assert {name: id(model.get_submodule(name)) for name in places(model)} == before
    convert(model, act='dyrelu_b')
    assert places(model) == places(convert(timm.create_model('test_resnet'), act='dyrelu_b'))


@pytest.mark.parametrize('where, expected', [
    ('layer4.*', {f'layer4.{block}.act{i}' for block in (0, 1) for i in (1, 2, 3)}),
    ('layer[34].1.act2', {'layer3.1.act2', 'layer4.1.act2'}),
    ('act1*', {'act1'}),
    ('layer1.0.act1', {'layer1.0.act1'}),
])
def test_a_wildcard_names_them_those_behind_additions_too(where, expected):
    model = convert(timm.create_model('resnet26'), act='dyrelu_b', where=where)
    assert places(model) == expected
    assert {s.reason for s in model.conversion.skipped} == {f'not one of where={where!r}'}


def test_a_wildcard_does_not_reach_into_gates_and_heads():
    with torch.device('meta'):
        model = convert(timm.create_model('seresnet50'), act='dyrelu_b', where='*')
        everywhere = convert(timm.create_model('seresnet50'), act='dyrelu_b', where='all')
    assert places(model) == places(everywhere) and not any('.se.' in path for path in places(model))


def test_a_wildcard_that_matches_nothing_is_an_error_that_shows_paths():
    with pytest.raises(ConversionError, match=r"Nothing .*\n  act1 \(ReLU\): not one of where='layer5\.\*'"):
        convert(timm.create_model('resnet18'), act='dyrelu_b', where='layer5.*')


@pytest.mark.parametrize('where', ['outer', '', 3, 'Late', ['layer4.*']])
def test_what_where_does_not_accept(where):
    with pytest.raises(ValueError, match="where must be one of 'inner', 'all', 'late', or a wildcard"):
        convert(timm.create_model('resnet18'), act='dyrelu_b', where=where)


@pytest.mark.parametrize('options', [
    dict(where='late'),
    dict(where='layer4.*', act_kwargs=dict(max_hidden=4)),
    dict(where='late', act_kwargs=dict(max_hidden=4, reduction=4, k=3), start='fit'),
])
@pytest.mark.parametrize('suffix', ['dyrelu_b_nobn', 'dyrelu_c'])
def test_the_variants_take_it_start_exactly_and_keep_it_in_their_config(suffix, options, tmp_path):
    base = trained_like('resnet10t')
    torch.save(base.state_dict(), tmp_path / 'base.pth')
    overlay = dict(file=str(tmp_path / 'base.pth'))
    model = timm.create_model(f'resnet10t_{suffix}', pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert max_diff(output(model, probe()), output(base, probe())) <= (1e-4 if 'nobn' in suffix else 0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DyReLU):
                module.fc2_weight.normal_(0, 0.1)
    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True)
    assert places(loaded) == places(model)
    assert torch.equal(output(loaded, probe()), output(model, probe()))


def test_the_command_takes_it(tmp_path, capsys):
    convert_main(['test_resnet', '--output', str(tmp_path / 'out'), '--act', 'dyrelu_b', '--where', 'late',
                  '--act-kwargs', 'max_hidden=3'])
    loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)
    assert {m.fc1_weight.shape[0] for m in loaded.modules() if isinstance(m, DyReLUB)} == {3}
    assert places(loaded) == places(convert(timm.create_model('test_resnet'), act='dyrelu_b', where='late'))


def test_coverage_measures_it():
    row = measure('timm', 'test_resnet', 'dyrelu_b_late', 60, False)
    assert row['result'] == 'exact' and float(row['difference']) == 0
    assert 0 < row['replaced'] < measure('timm', 'test_resnet', 'dyrelu_b', 60, False)['replaced']


# max_hidden


@pytest.mark.parametrize('channels, reduction, cap, hidden', [
    (64, 8, None, 8), (64, 8, 8, 8), (64, 8, 3, 3), (64, 8, 100, 8), (4, 8, 1, 1), (4, 8, 5, 1), (1280, 8, 32, 32),
])
@pytest.mark.parametrize('mode', ['a', 'b', 'c'])
def test_the_hidden_width_is_capped(mode, channels, reduction, cap, hidden):
    module = DyReLU(channels, mode, reduction, max_hidden=cap)
    assert module.fc1_weight.shape == (hidden, channels) and module.fc2_weight.shape[1] == hidden
    x = torch.randn(2, channels, 5, 4)
    assert torch.equal(module(x), x.relu())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    lazy = DyReLU(None, mode, reduction, max_hidden=cap)
    lazy.load_state_dict(module.state_dict())
    assert torch.equal(lazy(x), module(x))
    assert (f'max_hidden={cap}' in repr(module)) == (cap is not None)


@pytest.mark.parametrize('value, error', [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_what_max_hidden_does_not_accept(value, error):
    with pytest.raises((error, ValueError), match='max_hidden'):
        DyReLUB(8, max_hidden=value)
