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
    assert unknowns.find(a) == unknowns.find(b) == -PLUS
    assert unknowns.find(-a) == PLUS


def test_long_chains():
    unknowns = Unknowns()
    ids = unknowns.new(5000).tolist()
    for a, b in zip(ids, ids[1:], strict=False):
        assert unknowns.tie(b, -a)
    unknowns.tie(ids[0], PLUS)
    assert unknowns.signs(torch.tensor(ids)).tolist() == [1, -1] * 2500


def test_many_ties_at_a_time_are_as_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    for count in (5, 40, 300):
        signs = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
        a, b = torch.randint(0, count, (2, count // 2), generator=generator)
        one, many = Unknowns(), Unknowns()
        ids = one.new(count)
        assert torch.equal(many.new(count), ids)
        pairs = ids[a], ids[b] * signs[a] * signs[b]
        assert many.tie(*pairs)
        assert all(one.tie(x, y) for x, y in zip(*pairs, strict=True))
        assert torch.equal(many.find(ids), one.find(ids))
        assert torch.equal(many.find(-ids), -one.find(ids))


def test_a_contradiction_between_many_is_noticed():
    for cycle in (2, 3, 50):
        unknowns = Unknowns()
        ids = unknowns.new(cycle)
        assert not unknowns.tie(ids, ids.roll(1) * torch.tensor([-1] + [1] * (cycle - 1)))


def test_opposites_are_skipped_where_that_is_asked_for():
    unknowns = Unknowns()
    a, b, c, d = unknowns.new(4)
    assert unknowns.tie(a, -b)
    assert not unknowns.tie(torch.stack([a, c]), torch.stack([b, d]), skip_opposites=True)
    assert unknowns.find(c) == unknowns.find(d) and unknowns.find(a) == -unknowns.find(b)


def test_long_chains_of_many():
    unknowns = Unknowns()
    ids = unknowns.new(5000)
    for start in range(4998, -1, -1):  # the worst order: each tie makes the path longer
        unknowns.tie(ids[start + 1], -ids[start])
    assert unknowns.tie(ids[0], PLUS)
    assert unknowns.signs(ids).tolist() == [1, -1] * 2500
