"""The record of a forward pass holds no elements of what it computed on the way."""
import weakref

import torch
from torch import nn

from timm_dyacts.convert.stand_ins import SpreadMeta, StandIns
from timm_dyacts.convert.trace import trace_forward


class Net(nn.Module):
    """Keeps weak references to what it computes, and sees which of it is still there at its end."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Linear(8, 4)
        self.alive = None

    def forward(self, x):
        features = self.conv(x)
        seen = [weakref.ref(features)]
        features = self.act(features) * 2
        seen.append(weakref.ref(features))
        pooled = features.mean((2, 3))
        best = pooled.argmax(1)
        pooled = pooled.unsqueeze_(1)
        del features
        self.alive = [ref() is not None for ref in seen]
        return dict(logits=self.fc(pooled.squeeze(1)), best=[best, pooled])


def test_memory_is_freed_while_a_pass_is_recorded():
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    expected = net(x)
    trace = trace_forward(net, x)
    assert net.alive == [False, False]
    out = trace.output
    assert torch.equal(out['logits'], expected['logits']) and torch.equal(out['best'][0], expected['best'][0])
    kept = {id(t) for t in (x, *net.parameters(), out['logits'], *out['best'])}
    tensors = [t for op in trace.ops for t in (*op.inputs, *op.outputs)]
    assert {id(t) for t in tensors} >= kept
    assert all(t.is_meta for t in tensors if id(t) not in kept and t.is_floating_point() and t._base is None)
    assert any(t.is_meta for t in tensors)


def test_each_tensor_has_one_stand_in():
    net = Net().eval()
    trace = trace_forward(net, torch.randn(2, 3, 8, 8))
    conv, relu = (next(op for op in trace.ops if op.name == name) for name in ('convolution', 'relu'))
    assert relu.args[0] is conv.out and relu.out is conv.out, 'changed in place'
    assert (conv.out.shape, conv.out.stride()) == ((2, 8, 6, 6), (288, 36, 6, 1))
    call, = trace.calls_of(net.act)
    assert call.input is conv.out and call.output is relu.out
    whole, = trace.calls_of(net)
    assert whole.output['logits'] is trace.output['logits']
    assert trace.ops[-1].out is trace.output['logits']
    unsqueezed = next(op for op in trace.ops if op.name == 'unsqueeze')
    assert unsqueezed.inputs[0].shape in ((2, 8), (2, 1, 8)) and unsqueezed.outputs[0].shape == (2, 1, 8)


def test_a_shape_that_changes_in_place():
    stand_ins, x = StandIns(), torch.zeros(2, 3)
    stand_ins.add([x], [])
    before = stand_ins.of(x)
    assert before.is_meta and before.shape == (2, 3)
    x.unsqueeze_(0)
    stand_ins.add([x], [x])
    assert stand_ins.of([x, (x, 1)])[0].shape == (1, 2, 3) and before.shape == (2, 3)
    assert stand_ins.back([x, torch.zeros(1)]) == {id(stand_ins.of(x)): x}


def test_what_stands_for_itself():
    stand_ins = StandIns()
    given = torch.zeros(3)
    own = [torch.arange(3), torch.ones(2, dtype=torch.bool), torch.zeros(2, device='meta'), nn.Parameter(torch.ones(1))]
    stand_ins.add([*own, given], [given])
    assert all(stand_ins.of(t) is t for t in (*own, given))
    assert not stand_ins.back(own)


def test_what_reads_a_meta_tensor_is_computed_without_values():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with SpreadMeta(), torch.no_grad():
        y = net(torch.empty(2, 3, 8, 8, device='meta'))
        assert y.is_meta and y.shape == (2, 8, 6, 6)
        assert torch.equal(net[0].weight + 1, state['0.weight'] + 1)  # what does not is computed as ever
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_a_record_without_values_knows_the_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    trace, plain = (trace_forward(net, torch.zeros(2, 3, 8, 8, device=device)) for device in ('meta', 'cpu'))
    assert [op.name for op in trace.ops] == [op.name for op in plain.ops]
    assert [trace.layer_of(op) for op in trace.ops] == [plain.layer_of(op) for op in plain.ops]
    assert trace.layer_of(trace.ops[0]) is net[0] and trace.output.is_meta
    assert trace.flops == plain.flops == 2 * 2 * (8 * 27 * 36 + 8 * 36 * 5)
