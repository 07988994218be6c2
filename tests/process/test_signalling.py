"""A few of the jobs of `tests.process.signalling`, chosen so that every role and every kind of rule is among them."""

import pytest

from tests.process.signalling import run_case, start_up

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("algorithm", "ranks", "servers", "target", "seed"),
    [
        ("dasgd", 2, 0, 1, 1),
        ("pr-sgd-hetero", 2, 0, 0, 2),
        ("downpour", 3, 1, 2, 4),
        ("eamsgd", 3, 1, 1, 5),
    ],
)
def test_signals_at_random_moments(algorithm, ranks, servers, target, seed):
    runs = run_case(algorithm, "", ranks, servers, target, seed)
    assert [what for what, _ in runs] == ["SIGTERM", "SIGUSR1", "SIGSTOP"], runs
    for _, how in runs:
        assert how.split()[0] in ("stopped", "told", "complete"), how


def test_a_signal_while_a_run_is_starting():
    what, how = start_up(1)
    assert how.split()[0] in ("stopped", "before"), f"{what}: {how}"
