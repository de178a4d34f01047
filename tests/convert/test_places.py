"""Places: shared modules, modules that are called several times, functions in a model's code."""
import copy
import inspect
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support.trained_like import output, probe, trained_like_
from torch import nn

from timm_dyacts import (
    BReLU,
    ConversionError,
    DyReLU,
    SoftPool1d,
    SoftPool2d,
    convert,
    finish_transition,
    set_transition,
)
from timm_dyacts.convert.places import Places
from timm_dyacts.layers.calls import ByWidth, InTurn


class Layer(nn.Module):
    """As in ultralytics: one activation for all layers."""
    default_act = nn.SiLU()

    def __init__(self, ins, outs, act=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs)
        self.act = act or Layer.default_act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    """As in torchvision: one activation that is called twice, the second time after an addition."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width * 2, 1), nn.BatchNorm2d(width * 2)
        self.conv2, self.bn2 = nn.Conv2d(width * 2, width, 1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        if self.training and out.shape[0] == 1:  # not seen in the dry run
            out = self.relu(out + 1)
        return self.relu(self.bn2(self.conv2(out)) + x)


class Loop(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.relu = nn.ReLU()

    def forward(self, x):
        """Layers in turn, then the sum with the input."""
        y = x
        for conv in self.convs:
            y = self.relu(conv(y))
        return self.relu(y + x)


class Functions(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.slope = 0.1

    def forward(self, x, scale: float = 1.0):
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), kernel_size=3, stride=2, padding=1)
        x = self.conv2(x).relu() * scale
        if self.training:
            x = F.dropout(x, 0.5, self.training)
        return self.again(torch.relu(self.conv1(x)))

    def again(self, x):
        return F.relu6(input=self.conv2(x))


class Levels(nn.Module):
    """A place that is called in a comprehension, with other widths each time."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1)])
        self.relu = nn.ReLU()

    def forward(self, x):
        return torch.cat([self.relu(conv(x)) for conv in self.convs], 1)


def net(*layers, width=8):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
    return trained_like_(nn.Sequential(stem, *layers), 16)


def convert_and_compare(model, **kwargs):
    expected = output(model, probe(24))
    converted = convert(copy.deepcopy(model), input_size=(3, 16, 16), **kwargs)
    assert converted.conversion.function == 'exact' and converted.conversion.max_diff == 0
    outputs = output(converted, probe(24))
    if converted.conversion.flipped_output:
        outputs, expected = outputs.abs(), expected.abs()
    assert torch.equal(outputs, expected)
    return converted


def count(model, cls=DyReLU):
    return sum(isinstance(m, cls) for m in model.modules())


def train_a_step(model, batch=2):
    model.train()
    model(probe(24, batch=batch)).sum().backward()
    return [name for name, p in model.named_parameters() if p.grad is None]


# Shared modules


@pytest.mark.parametrize('act', ['dyrelu_b', 'brelu', 'bipolar'])
def test_each_place_of_a_shared_activation_gets_its_own(act):
    relu = nn.ReLU()
    model = net(Layer(8, 12, relu), Layer(12, 6, relu), nn.Sequential(nn.Conv2d(6, 6, 1), relu, nn.Conv2d(6, 4, 1)))
    converted = convert_and_compare(model, act=act)
    assert converted.conversion.counts == {f'ReLU -> {"DyReLUB" if act == "dyrelu_b" else "BReLU"}': 3}
    assert len({id(converted[1].act), id(converted[2].act), id(converted[3][1])}) == 3


def test_other_activations_than_relu_keep_the_rest_as_it_was():
    model = net(Layer(8, 12), Layer(12, 6))
    converted = convert(copy.deepcopy(model), act='dyrelu_b', input_size=(3, 16, 16))
    assert count(converted) == 2 and converted.conversion.function == 'approximate'
    assert isinstance(Layer.default_act, nn.SiLU) and model[1].act is model[2].act


def test_shared_parameters_are_copied_to_each_place():
    prelu = nn.PReLU(init=0.3)
    converted = convert_and_compare(net(Layer(8, 12, prelu), Layer(12, 6, prelu)), act='bprelu')
    assert converted[1].act.weight.item() == converted[2].act.weight.item()
    assert converted[1].act.weight is not converted[2].act.weight


def test_what_is_not_replaced_stays_the_one_instance():
    relu = nn.ReLU()
    model = net(Layer(8, 8, relu), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), relu, nn.Sigmoid()))
    model = nn.Sequential(model[:2], Gated(model[2]))
    converted = convert_and_compare(model, act='dyrelu_b')
    assert count(converted) == 1
    assert type(converted[1].gate[2]) is nn.ReLU
    assert [(s.name, s.reason) for s in converted.conversion.skipped] == [('1.gate.2', 'inside a gate')]


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return x * self.gate(x)


# Places that are called several times


@pytest.mark.parametrize('act, new', [('dyrelu_b', 3), ('brelu', 1), ('bipolar', 1)])
def test_a_call_gets_its_own_where_there_are_parameters(act, new):
    model = net(nn.ReLU(), Block(8), Block(8))
    converted = convert_and_compare(model, act=act)
    if act != 'dyrelu_b':
        assert type(converted[2]) is Block and isinstance(converted[2].relu, BReLU)
        return
    relu = converted[2].relu
    assert isinstance(relu, InTurn) and [type(m).__name__ for m in relu] == ['DyReLUB', 'DyReLUB', 'ReLU']
    assert [m.channels for m in relu[:2]] == [16, 8]
    assert isinstance(converted[2], Block) and type(converted[2]) is type(converted[3])
    assert 'called several times' in str(converted.conversion)
    assert '2.relu.1.fc1_weight' in converted.conversion.new_keys
    assert train_a_step(converted) == []
    converted.train()(probe(24, batch=1))  # the call that the dry run has not seen gets the plain one


def test_a_place_of_several_calls_that_is_left_alone():
    model = net(Block(8), Loop(), Block(8))
    converted = convert_and_compare(model, act='dyrelu_b', where='3.*')
    assert count(converted) == 2 and converted[3].relu[0].channels == 16
    for before, after in zip(model[:3].modules(), converted[:3].modules(), strict=True):
        assert type(after) is type(before)
    assert len([s for s in converted.conversion.skipped if s.reason == "not one of where='3.*'"]) == 2
    assert converted.conversion.notes == [
        'called several times in one pass of their block, so that each call has got an operator: 1']


def test_calls_in_a_loop():
    converted = convert_and_compare(net(nn.ReLU(), Loop()), act='dyrelu_b')
    assert isinstance(converted[2].relu, InTurn) and count(converted[2]) == 4
    used = []
    for i, module in enumerate(converted[2].relu):
        module.register_forward_hook(lambda *args, i=i: used.append(i))
    converted(probe(16))
    converted(probe(16))
    assert used == [0, 1, 2, 3] * 2
    converted[2].convs.append(nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match='turn must be the number'):
        for _ in range(2):
            converted[2].convs.append(nn.Conv2d(8, 8, 1))
        converted(probe(16))


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    converted = convert_and_compare(net(nn.ReLU(), Loop()), act='dyrelu_b')
    expected = output(converted, probe(16))
    handle = converted[2].convs[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        converted(probe(16))
    handle.remove()
    assert torch.equal(output(converted, probe(16)), expected)


def test_one_for_each_width_where_calls_cannot_be_told_apart():
    converted = convert_and_compare(net(nn.ReLU(), Levels()), act='dyrelu_b')
    assert isinstance(converted[2].relu, ByWidth) and list(converted[2].relu) == ['8', '12']
    assert 'so that each number has got an operator: 1' in str(converted.conversion)
    assert train_a_step(converted) == []
    back = convert_and_compare(converted, act='relu')
    assert count(back) == 0
    with pytest.raises(ValueError, match='number of channels'):
        converted[2].relu(torch.zeros(2, 9, 4, 4))


def test_a_block_that_is_called_several_times_keeps_one_operator():
    block = Block(8)
    converted = convert_and_compare(net(nn.ReLU(), block, nn.Conv2d(8, 8, 1), block), act='dyrelu_b')
    assert converted[2] is converted[4] and count(converted[2]) == 2


# Functions


@pytest.mark.parametrize('act', ['dyrelu_b', 'brelu'])
def test_functions_become_modules(act):
    converted = convert_and_compare(net(nn.ReLU(), Functions()), act=act)
    assert converted.conversion.skipped == []
    assert isinstance(converted[2], Functions)
    names = ['hardtanh', 'relu_1', 'relu_2', 'relu_3']
    assert [name for name, m in converted[2].named_children() if isinstance(m, (DyReLU, BReLU))] == names
    assert {r.old for r in converted.conversion.replaced} >= {'ReLU', 'relu()', 'hardtanh()'}
    assert hasattr(converted[2], 'max_pool2d') == (act == 'brelu'), 'pools that nobody needs stay functions'
    train_a_step(converted)


def test_max_pools_that_are_functions():
    model = net(nn.ReLU(), Functions())
    converted = convert(copy.deepcopy(model), pool='softpool', input_size=(3, 16, 16))
    assert converted.conversion.counts == {'max_pool2d() -> SoftPool2d': 1}
    assert isinstance(converted[2].max_pool2d, SoftPool2d) and converted[2].max_pool2d.padding == (1, 1)
    assert output(converted, probe(24)).shape == output(model, probe(24)).shape
    assert 'F.relu(self.conv1(x), inplace=True)' in inspect.getsource(type(converted[2]).forward)


class Signals(nn.Module):
    """A 1-D residual network, with the max pool as a module or as a function."""

    def __init__(self, pool):
        super().__init__()
        self.stem, self.bn, self.fc = nn.Conv1d(2, 8, 7, 2, 3), nn.BatchNorm1d(8), nn.Linear(16, 5)
        self.conv1, self.bn1 = nn.Conv1d(8, 16, 3, 2, 1), nn.BatchNorm1d(16)
        self.conv2, self.short = nn.Conv1d(16, 16, 3, 1, 1), nn.Conv1d(8, 16, 1, 2)
        self.relu = nn.ReLU(inplace=True)
        self.pool, self.kind = nn.MaxPool1d(3, 2, 1), pool

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        if self.kind == 'module':
            x = self.pool(x)
        elif self.kind == 'function':
            x = F.max_pool1d(x, 3, stride=2, padding=1)
        else:
            x = torch.max_pool1d(x, 3, 2, 1)
        y = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.relu(self.conv2(y) + self.short(x)).mean(-1))


@pytest.mark.parametrize('kind', ['module', 'function', 'torch'])
@pytest.mark.parametrize('length', [64, 61])
def test_signals(kind, length):
    torch.manual_seed(0)
    model = Signals(kind)
    for _ in range(2):
        model.train()(torch.randn(4, 2, length))
    x = torch.randn(2, 2, length)
    expected = output(model, x)
    for request in (
            dict(act='dyrelu_b'), dict(act='dyrelu_c'), dict(act='brelu'), dict(act='belu', transition=True),
            dict(pool='softpool', transition=True), dict(act='dyrelu_a', pool='softpool', transition=True)):
        converted = convert(copy.deepcopy(model), **request)
        assert converted.conversion.function == 'exact' and torch.equal(output(converted, x), expected)
        if 'transition' in request:
            finish_transition(converted)
            again = convert(copy.deepcopy(model), **{k: v for k, v in request.items() if k != 'transition'})
            assert list(converted.state_dict()) == list(again.state_dict())
            assert torch.equal(output(converted, x), output(again, x))
        if 'pool' in request:
            assert count(converted, SoftPool1d) == 1
            assert kind == 'module' or 'max_pool1d() -> SoftPool1d' in again.conversion.counts
    assert count(convert(model, act='dyrelu_b')) == 3


class Kept(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.slope, self.conv = call, 0.2, nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        if self.call == 'argument':
            return F.leaky_relu(x, self.slope)
        if self.call == 'variable':
            relu = F.relu
            return relu(x)
        if self.call == 'in place':
            F.relu_(x)
            return x
        return free(x)


def free(x):
    return F.relu(x)


@pytest.mark.parametrize('call, reason', [
    ('argument', 'its arguments may differ from call to call'),
    ('variable', 'what is called there cannot be told'),
    ('in place', 'it works in place, and nothing takes its result'),
    ('free', 'it is not in a method of a module'),
])
def test_functions_that_cannot_be_replaced_are_reported(call, reason):
    converted = convert_and_compare(net(nn.ReLU(), Kept(call)), act='dyrelu_b')
    skip, = converted.conversion.skipped
    assert skip.name == '2' and skip.reason == f'a function call, not a module: {reason}'
    assert type(converted[2]) is Kept


# What a rewritten model has to go through


@pytest.fixture
def rewritten():
    return convert_and_compare(net(nn.ReLU(), Block(8), Loop(), Functions(), Levels()), act='dyrelu_b')


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(rewritten, copied):
    with torch.no_grad():
        for p in rewritten.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    other = copied(rewritten)
    assert [type(m) for m in other.modules()] == [type(m) for m in rewritten.modules()]
    assert torch.equal(output(other, probe(24)), output(rewritten, probe(24)))
    other.load_state_dict(rewritten.state_dict())
    assert other.state_dict().keys() == rewritten.state_dict().keys()


@pytest.mark.parametrize('compiled', [
    lambda m: torch.jit.script(m),
    lambda m: torch.compile(m, backend='eager', fullgraph=True),
    lambda m: torch.export.export(m, (probe(24),)).module(),
    lambda m: torch.fx.symbolic_trace(m),
], ids=['script', 'compile', 'export', 'fx'])
def test_compilers(compiled):
    model = convert_and_compare(net(nn.ReLU(), Block(8), Loop(), Functions()), act='dyrelu_b').eval()
    with torch.no_grad():
        assert torch.allclose(compiled(model)(probe(24)), model(probe(24)), atol=1e-5)


def test_distributed_training(rewritten, tmp_path):
    dist = torch.distributed
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(rewritten).train())
        torch.manual_seed(0)
        wrapped(probe(24)).sum().backward()
    finally:
        dist.destroy_process_group()
    torch.manual_seed(0)
    rewritten.train()(probe(24)).sum().backward()
    for a, b in zip(wrapped.module.parameters(), rewritten.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_back_to_plain(rewritten):
    back = convert_and_compare(rewritten, act='relu')
    assert count(back) == 0
    plain = net(nn.ReLU(), Block(8), Loop(), Functions(), Levels())
    assert back.state_dict().keys() == plain.state_dict().keys()


class Routed(nn.Module):
    """As in ultralytics: what each layer reads is noted on it."""

    def __init__(self):
        super().__init__()
        self.layers = net(nn.ReLU(), nn.MaxPool2d(2), nn.SiLU(), nn.Conv2d(8, 8, 1))
        for i, layer in enumerate(self.layers):
            layer.source, layer.type = i - 1, type(layer).__name__  # ``type`` hides a method of all modules

    def forward(self, x):
        outputs = {-1: x}
        for i, layer in enumerate(self.layers):
            outputs[i] = layer(outputs[layer.source])
        return x.new_zeros(()) + outputs[i]


@pytest.mark.parametrize('request_', [
    dict(act='dyrelu_b', pool='softpool'), dict(act='dyrelu_b', pool='softpool', transition=True), dict(act='bipolar'),
], ids=['direct', 'transition', 'bipolar'])
def test_what_is_noted_on_a_layer_stays(request_):
    model = Routed().eval()
    expected = output(model, probe(24))
    kinds = [layer.type for layer in model.layers]
    converted = convert(model, **request_)
    if 'transition' in request_ or request_['act'] == 'bipolar':
        assert converted.conversion.function == 'exact' and torch.equal(output(converted, probe(24)), expected)
    if 'transition' in request_:
        finish_transition(set_transition(converted, 1))
        output(converted, probe(24))
    assert [layer.type for layer in converted.layers] == kinds and 'inplace' not in vars(converted.layers[2])
    assert all(type(layer) is not nn.MaxPool2d for layer in converted.layers)


def test_what_is_noted_under_a_name_that_is_taken():
    model = Routed()
    model.layers[3].f = -1  # ``Bipolar`` has its function there
    with pytest.raises(ConversionError, match=r"'layers.3' cannot become a Bipolar, .* noted f = -1"):
        convert(model, act='bipolar')
    assert type(model.layers[3]) is nn.SiLU and type(model.layers[1]) is nn.ReLU


def snapshot(model):
    return [
        (name, id(m), type(m), {k: v for k, v in vars(m).items() if not isinstance(v, dict)}, list(m._modules),
         list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules(remove_duplicate=False)]


class Counting(nn.Module):
    """Counts its calls, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer('last', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        self.last += torch.rand(())
        return x


def test_a_refusal_leaves_the_model_as_it_was():
    relu = nn.ReLU()
    model = net(relu, Block(8), Loop(), Functions(), Layer(8, 8, relu), Counting(), nn.Softmax(1))
    before, state, random = snapshot(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ConversionError):
        convert(model, act='belu', pool='softpool', input_size=(3, 16, 16))
    assert snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model[6].seen == [] or len(model[6].seen) == 3  # of `trained_like_`


def test_without_steps_to_take_nothing_is_prepared(monkeypatch):
    monkeypatch.setattr(Places, '_put_in', lambda *args: pytest.fail('nothing to put in'))
    convert(timm.create_model('test_resnet'), act='dyrelu_b')


# Architectures


@pytest.mark.parametrize('name, act', [
    ('resnet18', 'dyrelu_b'), ('densenet121', 'dyrelu_b'), ('googlenet', 'brelu'), ('squeezenet1_1', 'dyrelu_b')])
def test_torchvision_classifiers(name, act):
    torch.manual_seed(0)
    kwargs = dict(init_weights=False) if name == 'googlenet' else {}
    model = trained_like_(getattr(torchvision.models, name)(**kwargs), 96)
    converted = convert(copy.deepcopy(model), act=act)
    assert converted.conversion.function == 'exact' and converted.conversion.skipped == []
    assert torch.equal(output(converted, probe(96)), output(model, probe(96)))
    assert not any(type(m) is nn.ReLU for m in converted.modules())


def test_res2net_of_timm():
    model = timm.create_model('res2net50_26w_4s')
    converted = convert(copy.deepcopy(model), act='dyrelu_b')
    assert converted.conversion.function == 'exact' and count(converted) == 1 + 16 * 4
    assert {s.reason for s in converted.conversion.skipped} == {
        "after the addition of a bottleneck block (where='inner')"}
    assert torch.equal(output(converted, probe(64)), output(model, probe(64)))
