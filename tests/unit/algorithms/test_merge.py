"""How a mean is merged: hand-worked numbers, and torch's own optimizer for DiLoCo."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hpcavg.algorithms import merge
from hpcavg.algorithms.merge import Blend, OuterMomentum


def rows(*values):
    return torch.tensor(values, dtype=torch.float64).reshape(len(values), -1)


def follow(how, start, means, rates):
    """Return the parameters after each of the means, merged at the given local rates."""
    x = rows(start)
    state = how.init(x)
    found = []
    for mean, rate in zip(means, rates, strict=True):
        x.fill_(-99.0)  # where the learner is does not matter, only where the last merge left it
        how.apply(x, rows(mean)[0], state, rate)
        found.append(x.item())
    return found


def slowmo(beta, outer_lr=1.0):
    return OuterMomentum(outer_lr, beta, nesterov=False, per_rate=True)


def diloco(outer_lr, outer_momentum):
    return OuterMomentum(outer_lr, outer_momentum, nesterov=True, per_rate=False)


def test_replacing_makes_every_row_the_mean():
    x = rows([1.0, 2.0], [3.0, 4.0])
    merge.replace.apply(x, torch.tensor([5.0, 6.0], dtype=torch.float64), merge.replace.init(x), 0.1)
    assert x.tolist() == [[5.0, 6.0]] * 2


def test_a_blend_keeps_its_share_of_every_row():
    """DaSGD's worked example: 0.25 (3, 9) + 0.75 * 4."""
    x = rows(3.0, 9.0)
    Blend(0.25).apply(x, rows(4.0)[0], Blend(0.25).init(x), 0.1)
    assert x.tolist() == [[3.75], [5.25]]


def test_slow_momentum_at_a_constant_rate():
    """beta = 0.5, outer rate 0.5, gamma = 0.5: u = beta u + (x - mean)/gamma, x = x - 0.5 gamma u.

    Mean 8: u = 4, x = 10 - 1 = 9. Mean 7: u = 2 + 4 = 6, x = 9 - 1.5 = 7.5. Mean 7.5: u = 3, x = 7.5 - 0.75.
    """
    assert follow(slowmo(0.5, 0.5), 10.0, [8.0, 7.0, 7.5], [0.5] * 3) == [9.0, 7.5, 6.75]


def test_slow_momentum_is_kept_per_unit_of_the_rate():
    """The same, with gamma = 0.5, 0.25, 1.

    Mean 8: u = 4, x = 9. Mean 8: u = 2 + 1/0.25 = 6, x = 9 - 0.125 * 6 = 8.25. Mean 8: u = 3 + 0.25, x = 8.25 - 1.625.
    """
    assert follow(slowmo(0.5, 0.5), 10.0, [8.0, 8.0, 8.0], [0.5, 0.25, 1.0]) == [9.0, 8.25, 6.625]


def test_slow_momentum_hardly_moves_at_a_rate_of_hardly_anything():
    assert follow(slowmo(0.5, 0.5), 10.0, [8.0, 9.0, 8.0], [0.5, 1e-200, 1e-200]) == [9.0, 9.0, 8.5]


def test_slow_momentum_starts_at_a_rate_of_0_as_if_it_had_not_begun():
    """The first rate of a warm-up may be 0: nobody moves, the mean is the anchor, u stays 0."""
    assert follow(slowmo(0.5, 0.5), 10.0, [10.0, 8.0, 8.0], [0.0, 0.5, 0.25]) == [10.0, 9.0, 8.25]


def test_slow_momentum_does_not_move_at_a_rate_of_0():
    """x = anchor - outer_lr gamma u with gamma = 0; learners that did not move have their anchor as the mean."""
    assert follow(slowmo(0.5, 0.5), 10.0, [8.0, 9.0], [0.5, 0.0]) == [9.0, 9.0]


@pytest.mark.parametrize(("outer_lr", "outer_momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
def test_diloco_is_torchs_nesterov_sgd_on_the_way_of_the_mean(outer_lr, outer_momentum):
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(start.clone())
    nesterov = outer_momentum > 0
    outer = torch.optim.SGD([theirs], lr=outer_lr, momentum=outer_momentum, nesterov=nesterov)
    ours, how = start.repeat(3, 1), diloco(outer_lr, outer_momentum)
    state = how.init(ours)
    for rate in (0.1, 0.1, 0.01, 0.0, 0.1, 0.2):  # the local rate is no concern of it
        mean = theirs.detach() - 0.2 * torch.randn(6, generator=generator, dtype=torch.float64)
        theirs.grad = theirs.detach() - mean
        outer.step()
        how.apply(ours, mean, state, rate)
        assert torch.allclose(ours, theirs.detach().expand(3, -1), rtol=1e-13, atol=1e-13)


def test_diloco_by_hand():
    """Outer rate 0.5, momentum 0.5. Mean 8: D = 2, v = 2, x = 10 - 0.5 (2 + 1) = 8.5. Mean 8: D = 0.5, v = 1.5."""
    assert follow(diloco(0.5, 0.5), 10.0, [8.0, 8.0], [0.1, 0.1]) == [8.5, 8.5 - 0.5 * (0.5 + 0.75)]


numbers = st.floats(-(2.0**99), 2.0**99, width=32)


@given(start=numbers, means=st.lists(numbers, min_size=1, max_size=4), dtype=st.sampled_from(["float32", "float64"]))
def test_outer_rate_1_without_momentum_takes_the_mean_bit_for_bit(start, means, dtype):
    for how in (slowmo(0.0), diloco(1.0, 0.0)):
        x = torch.linspace(start, -start, 19, dtype=getattr(torch, dtype)).repeat(2, 1)
        state = how.init(x)
        for value in means:
            mean = torch.linspace(value / 3, start / 7, 19, dtype=x.dtype)
            x.add_(1)
            how.apply(x, mean, state, 0.1)
            assert torch.equal(x, mean.expand_as(x))


def test_an_outer_optimizer_carries_no_more_state_than_it_needs():
    x = rows([1.0, 2.0])
    assert merge.replace.init(x) == Blend(0.5).init(x) == {}
    assert sorted(slowmo(0.0).init(x)) == ["anchor"]
    assert sorted(slowmo(0.5).init(x)) == ["anchor", "momentum", "rate"]
    state = slowmo(0.5).init(x)
    x.zero_()
    assert state["anchor"].tolist() == [1.0, 2.0]
