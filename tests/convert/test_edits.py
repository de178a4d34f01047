"""Changes of a model, and the way back."""
import torch
from torch import nn

from timm_dyacts.convert.edits import Edits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.act = nn.ReLU()
        self.tail = nn.Sequential(self.act, nn.Identity())
        self.register_buffer('first', torch.zeros(2))
        self.register_buffer('second', torch.ones(2))

    def describe(self):
        return 'class'


def snapshot(net):
    return (
        {name: (id(m), vars(m).keys() - {'training'}) for name, m in net.named_modules(remove_duplicate=False)},
        [(name, id(p), p.clone()) for name, p in net.named_parameters()],
        list(net.state_dict()),
    )


def assert_same(before, after):
    assert before[0] == after[0] and before[2] == after[2]
    for (name, id_, value), (other_name, other_id, other) in zip(before[1], after[1], strict=True):
        assert (name, id_) == (other_name, other_id) and torch.equal(value, other)


def test_everything_is_taken_back_in_the_opposite_order():
    net = Net()
    before = snapshot(net)
    edits = Edits(net)
    edits.replace(['act', 'tail.0'], nn.SiLU())
    assert isinstance(net.act, nn.SiLU) and net.tail[0] is net.act
    edits.replace(['act'], nn.GELU())
    edits.set_attribute(net.conv, 'weight', nn.Parameter(torch.ones(4, 3, 3, 3)))
    edits.set_attribute(net.conv, 'bias', nn.Parameter(torch.ones(4)))
    edits.set_attribute(net.conv, 'stride', (2, 2))
    edits.set_attribute(net, 'describe', lambda: 'instance')
    assert net.describe() == 'instance'
    edits.delete_attribute(net, 'describe')
    edits.set_attribute(net, 'new', 3)
    edits.register_buffer('mark', torch.ones(()))
    edits.delete_buffer('first')
    assert list(net.state_dict()) == ['second', 'mark', 'conv.weight', 'conv.bias']
    edits.multiply([(net.conv.bias, -torch.ones(4, dtype=torch.int8))])
    assert (net.conv.bias == -1).all()

    edits.undo()
    assert_same(snapshot(net), before)
    assert net.conv.bias is None and net.conv.stride == (1, 1)
    assert net.describe() == 'class' and not hasattr(net, 'new')
    edits.undo()
    assert_same(snapshot(net), before)


def test_back_to_a_mark():
    net = Net()
    edits = Edits(net)
    edits.set_attribute(net.conv, 'stride', (2, 2))
    mark = edits.mark()
    edits.set_attribute(net.conv, 'stride', (3, 3))
    edits.set_attribute(net.conv, 'padding', (1, 1))
    edits.undo(mark)
    assert (net.conv.stride, net.conv.padding) == ((2, 2), (0, 0))
    edits.undo()
    assert net.conv.stride == (1, 1)


def test_signs_come_back_to_the_last_bit():
    weight = torch.tensor([0.0, -0.0, 1e-45, -3.4e38, float('inf')])
    net = nn.Module()
    net.weight = nn.Parameter(weight.clone())
    edits = Edits(net)
    edits.multiply([(net.weight, torch.tensor([-1, -1, -1, -1, 1], dtype=torch.int8))])
    assert torch.equal(net.weight, torch.cat([-weight[:4], weight[4:]]))
    edits.undo()
    assert torch.equal(net.weight.view(torch.int32), weight.view(torch.int32))
    assert net.weight.grad_fn is None and net.weight.requires_grad


def test_a_new_buffer_does_not_survive():
    net = Net()
    edits = Edits(net)
    edits.register_buffer('mark', torch.ones(()))
    edits.undo()
    assert 'mark' not in net.state_dict() and not hasattr(net, 'mark')
