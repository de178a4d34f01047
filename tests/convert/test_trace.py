"""The record of a forward pass."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_dyacts.convert.leaves import tensors_in
from timm_dyacts.convert.trace import trace_forward


class Net(nn.Module):
    """A shared activation, a gate, an idle layer, a residual addition."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.again = self.act
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Sigmoid())
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.idle = nn.Linear(2, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.bn(self.conv1(x)))
        x = x + self.conv2(x) * self.gate(x)
        x = self.again(x)
        return self.fc(F.relu(x).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def trace(net):
    return trace_forward(net, torch.randn(2, 3, 8, 8))


def test_names_of_modules(net, trace):
    assert trace.names[net.act] == ['act', 'again']
    assert trace.name(net.gate[1]) == 'gate.1'
    assert trace.name(net) == ''


def test_calls_of_modules(net, trace):
    assert [call.module for call in trace.calls[:2]] == [net, net.conv1]
    assert [call.shape for call in trace.calls_of(net.act)] == [torch.Size([2, 8, 8, 8])] * 2
    assert trace.calls_of(net.idle) == []
    assert all(c in trace.calls for calls in trace.calls_by_module.values() for c in calls)
    assert sum(map(len, trace.calls_by_module.values())) == len(trace.calls)
    assert list(trace.calls_by_module)[:4] == [net, net.conv1, net.bn, net.act], 'in the order of the first calls'
    call, = trace.calls_of(net.conv1)
    assert [trace.ops[i].name for i in call.span] == ['convolution']
    assert call.channel_dim is None, 'nothing tells where the channels of the input are'
    assert trace.calls_of(net.bn)[0].channels == 8
    whole, = trace.calls_of(net)
    assert whole.span == range(len(trace.ops)) and whole.output is trace.output


def test_operators_know_their_module(net, trace):
    assert {op.module for op in trace.ops if op.name == 'convolution'} == {'conv1', 'gate.1', 'conv2'}
    relus = [op.module for op in trace.ops if op.name == 'relu']
    assert sorted(relus) == ['', 'act', 'act', 'gate.2'], 'a shared module goes by its first name'


def test_the_main_path_leaves_gates_out(net, trace):
    on_path = {name for name, m in net.named_modules() if name and trace.is_on_main_path(m)}
    assert on_path == {'conv1', 'bn', 'act', 'conv2', 'gate', 'gate.3', 'fc'}, 'the sigmoid is the last that counts'
    assert {trace.ops[i].module for i in trace.main_path} >= {'', 'conv1', 'fc'}
    assert {op.name for op in trace.ops if op.module == 'gate.2'} == {'relu'}
    assert all(trace.ops[i].module != 'gate.2' for i in trace.main_path)


def test_who_made_what(net, trace):
    after_addition = trace.calls_of(net.act)[1]
    assert after_addition.producer.name == 'add' and len(after_addition.producer.inputs) == 2
    assert trace.calls_of(net)[0].producer is None
    index = trace.find_producer(after_addition.input, after_addition.start)
    assert trace.ops[index] is after_addition.producer
    assert trace.find_producer(trace.input, len(trace.ops)) is None
    assert trace.find_producer(after_addition.input, index) is None, 'not before it was made'


def test_uses(net, trace):
    stem, = trace.calls_of(net.bn)
    assert trace.uses[id(stem.input)] == 1
    assert trace.uses[id(trace.calls_of(net.conv2)[0].input)] == 3, 'addition, convolution and gate'
    assert trace.uses[id(trace.output)] == 0


def test_layers_of_operators(net, trace):
    layers = [trace.layer_of(op) for op in trace.ops if op.name in ('convolution', 'addmm')]
    assert layers == [net.conv1, net.conv2, net.gate[1], net.fc]
    assert trace.layer_of(next(op for op in trace.ops if op.name == 'relu')) is None


def test_computed_weights_belong_to_no_layer():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    trace = trace_forward(nn.Sequential(conv), torch.randn(1, 3, 4, 4))
    assert [trace.layer_of(op) for op in trace.ops if op.name == 'convolution'] == [None]


def channel_dims(model, x):
    trace = trace_forward(model, x)
    return [call.channel_dim for call in trace.calls if isinstance(call.module, nn.ReLU)]


class Shaped(nn.Module):
    def __init__(self, before, reshape):
        super().__init__()
        self.before, self.reshape, self.act = before, reshape, nn.ReLU()

    def forward(self, x):
        return self.act(self.reshape(self.before(x)))


@pytest.mark.parametrize('reshape, dim', [
    (lambda x: x, 1),
    (lambda x: x.permute(0, 2, 3, 1), 3),
    (lambda x: x.flatten(2), 1),
    (lambda x: x.flatten(2).transpose(1, 2), 2),
    (lambda x: x.mean((2, 3)), 1),
    (lambda x: x.mean(3), 1),
    (lambda x: x.mean(1), None),
    (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2), 2),
    (lambda x: x.unsqueeze(1), 2),
    (lambda x: x.unsqueeze(-1), 1),
    (lambda x: x[:, :, 0], 1),
    (lambda x: x[0], 0),
    (lambda x: x[:, 0], None),
    (lambda x: x.flatten(), None),
    (lambda x: x.relu() + 1, 1),
])
def test_where_the_channels_are(reshape, dim):
    assert channel_dims(Shaped(nn.Conv2d(3, 6, 1), reshape), torch.randn(2, 3, 4, 5)) == [dim]


def test_where_linear_layers_and_norms_put_them():
    assert channel_dims(Shaped(nn.Linear(7, 6), lambda x: x), torch.randn(2, 3, 7)) == [2]
    assert channel_dims(Shaped(nn.LayerNorm(7), lambda x: x), torch.randn(2, 3, 7)) == [2]
    assert channel_dims(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 4, 4)) == [None, 1]


def test_the_model_is_left_as_it_was(net):
    net.train()
    net.bn.eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    trace_forward(net, torch.randn(2, 3, 8, 8))
    assert net.training and net.conv1.training and not net.bn.training
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError):
        trace_forward(net, torch.randn(2, 5, 8, 8))
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_it_runs_in_eval_mode_without_gradients(net):
    trace = trace_forward(nn.Sequential(net, nn.Dropout(0.9)).train(), torch.randn(2, 3, 8, 8))
    assert not trace.output.requires_grad
    assert 'native_dropout' not in {op.name for op in trace.ops}


def test_in_inference_mode_it_sees_the_same(net):
    x = torch.randn(2, 3, 8, 8)
    expected = trace_forward(net, x)
    with torch.inference_mode():
        trace = trace_forward(net, x.clone())
    path = [expected.name(m) for m in net.modules() if expected.is_on_main_path(m)]
    assert path == [trace.name(m) for m in net.modules() if trace.is_on_main_path(m)]
    assert [c.channel_dim for c in trace.calls] == [c.channel_dim for c in expected.calls]


def test_tensors_in_any_nesting():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [t.numel() for t in tensors_in(({'x': [a, 3]}, (b, None), c))] == [1, 2, 3]


def test_squeeze_excite_of_timm_is_a_gate():
    model = timm.create_model('seresnet18')
    trace = trace_forward(model, torch.randn(1, 3, 64, 64))
    assert not trace.is_on_main_path(model.layer1[0].se.fc1)
    assert trace.is_on_main_path(model.layer1[0].conv1)


class Written(nn.Module):
    """Writes to parts of a tensor, uses a gate, computes what nobody reads, and takes distances from places."""

    def __init__(self):
        super().__init__()
        self.conv, self.final = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.parts, self.gate, self.unread, self.last = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.conv(x)
        self.unread(x)
        kept = torch.zeros_like(x)
        kept[:, 1:] = self.parts(x)[:, 1:]
        kept[:, :1] *= torch.sigmoid(self.gate(x))[:, :1]
        kept += self.final(x)
        places = torch.arange(4.0).view(4, 1, 1)
        sides = kept.clone()
        sides[0].copy_(places - self.last(kept[0]))
        return sides


def test_what_is_written_to_a_part_reaches_those_who_read_the_whole():
    model = Written()
    trace = trace_forward(model, torch.randn(2, 3, 4, 4))
    found = {name: module for name, module in model.named_children() if type(module) is nn.ReLU}
    assert {n for n, m in found.items() if trace.is_on_main_path(m)} == {'parts', 'last'}
    assert {n for n, m in found.items() if trace.reaches_output(m)} == {'parts', 'gate', 'last'}


def test_what_is_behind_the_last_weights():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.ReLU())
    trace = trace_forward(net, torch.randn(2, 3, 4, 4))
    assert [trace.is_behind_weights(module) for module in net] == [False, False, True, True, True, True]


def test_weights_that_are_read_as_views():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.weight = nn.ReLU(), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            out = x.new_zeros(2, 2, 3)
            out[:, 0] = self.act(x) @ self.weight.t()[:, :]
            return out

    model = Product()
    assert not trace_forward(model, torch.randn(2, 4)).is_behind_weights(model.act)
