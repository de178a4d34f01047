"""Signs as a union-find with parity."""
import torch

from timm_dyacts.convert.signs.unknowns import ANY, PLUS, Unknowns


def test_ties_hold_whatever_their_order():
    unknowns = Unknowns()
    a, b, c, d = unknowns.new(4).tolist()
    assert unknowns.tie(a, -b)
    assert unknowns.tie(c, -d)
    assert unknowns.tie(b, c)
    assert unknowns.signs(torch.tensor([a, b, c, d])).tolist() in ([1, -1, -1, 1], [-1, 1, 1, -1])
    assert unknowns.tie(d, -PLUS)
    assert unknowns.signs(torch.tensor([a, b, c, d, -a])).tolist() == [-1, 1, 1, -1, 1]


def test_a_contradiction_is_noticed_and_changes_nothing():
    unknowns = Unknowns()
    a, b, c = unknowns.new(3).tolist()
    assert unknowns.tie(a, b) and unknowns.tie(b, -c)
    assert not unknowns.tie(a, c)
    assert unknowns.tie(a, -c), 'known already'
    assert unknowns.tie(c, PLUS)
    assert unknowns.signs(torch.tensor([a, b, c])).tolist() == [-1, -1, 1]
    assert not unknowns.tie(a, PLUS)


def test_what_nothing_fixes_is_positive_and_a_zero_has_any_sign():
    unknowns = Unknowns()
    ids = unknowns.new(2)
    assert ids.dtype == torch.int64
    assert unknowns.signs(torch.tensor([[ids[0], -ids[1]], [PLUS, -PLUS], [ANY, ANY]])).tolist() == [
        [1, -1], [1, -1], [1, 1]]


def test_the_known_sign_represents_all_that_it_is_tied_to():
    unknowns = Unknowns()
    a, b = unknowns.new(2).tolist()
    unknowns.tie(a, b)
    unknowns.tie(b, -PLUS)
    assert unknowns.find(a) == unknowns.find(b) == (PLUS, -1)
    assert unknowns.find(-a) == (PLUS, 1)


def test_long_chains():
    unknowns = Unknowns()
    ids = unknowns.new(5000).tolist()
    for a, b in zip(ids, ids[1:], strict=False):
        assert unknowns.tie(b, -a)
    unknowns.tie(ids[0], PLUS)
    assert unknowns.signs(torch.tensor(ids)).tolist() == [1, -1] * 2500
