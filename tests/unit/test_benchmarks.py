"""The benchmarks' formulas against numbers worked by hand."""

import math

import pytest

from benchmarks.common import interval
from benchmarks.learners import build_rule, first_period, mlp, mlp_workload
from benchmarks.mean import auto_against_best, memory_needed, wire_s
from benchmarks.memory import memory_of
from benchmarks.overlap import overlap_percent
from benchmarks.scaling import batch_of, rank_counts
from hpcavg import InputError, algorithms


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [
        (1, 1, 1),
        (5, 1, 5),  # 2/2^5 is more than 5 %: the whole range is the best there is
        (6, 1, 6),  # 2/2^6 = 3.1 %
        (9, 2, 8),  # 2 (1 + 9)/2^9 = 3.9 %; with 36 more it would be 18 %
        (15, 4, 12),  # 2 (1 + 15 + 105 + 455)/2^15 = 3.5 %; with 1365 more it would be 12 %
        (100, 40, 61),  # 3.5 %, as in the tables
    ],
)
def test_the_interval_of_a_median_is_the_binomial_one(count, low, high):
    values = list(range(count, 0, -1))
    assert interval(values) == ((count + 1) / 2, low, high)


def test_a_median_of_infinite_times_is_infinite():
    assert interval([1.0, math.inf, math.inf])[0] == math.inf


@pytest.mark.parametrize(
    ("total_s", "compute_s", "pure_s", "percent"),
    [
        (1.3, 1.3, 1.0, 100.0),  # nothing of the mean is left to wait for
        (2.3, 1.3, 1.0, 0.0),  # one after the other
        (1.55, 1.3, 1.0, 75.0),
        (3.0, 1.3, 1.0, 0.0),  # slower than one after the other
    ],
)
def test_overlap_follows_the_formula(total_s, compute_s, pure_s, percent):
    assert overlap_percent(total_s, compute_s, pure_s) == pytest.approx(percent)


def test_the_wire_limit_of_a_mean_over_nodes():
    """44.7 MB between 2 nodes at 1 Gbit/s: 2 (1/2) x 44.7e6 x 8 bits; at 4 nodes 1.5 times that."""
    assert wire_s(44_700_000, 2, 1.0) == pytest.approx(0.3576)
    assert wire_s(44_700_000, 4, 1.0) == pytest.approx(0.5364)


def test_memory_of_a_size_counts_every_rank_of_the_node():
    assert memory_needed(100, num_engines=2, ranks_on_node=4) == (3 + 4) * 100 * 4


def test_auto_is_compared_with_the_best_engine():
    medians = {"hpcavg auto": 3.0, "hpcavg mpi": 4.0, "hpcavg shared": 2.0, "MPI Allreduce": 1.0}
    assert auto_against_best(medians) == "best engine: shared; auto takes +50.0% over it"
    assert auto_against_best({"hpcavg auto": 3.0, "MPI Allreduce": 1.0}) is None


def test_memory_counts_shared_pages_once_among_the_ranks():
    """1000 kB of Pss without its 300 kB of shared memory, and a quarter of the 2 MiB that four ranks map."""
    rollup = "0-1 ---p 00000000 00:00 0 [rollup]\nPss: 1000 kB\nPss_Shmem: 300 kB\n"
    maps = "200000-400000 rw-s 00000000 00:19 7 /dev/shm/hpcavg-x (deleted)\n400000-500000 r--p 0 fd:00 8 /lib/x.so\n"
    assert memory_of(rollup, maps, 4) == 700 * 1024 + 2 * 1024 * 1024 // 4


def test_ranks_double_up_to_all_of_them():
    assert [rank_counts(number) for number in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_strong_scaling_shares_one_batch():
    assert [batch_of("strong", 32, 4, count) for count in (1, 2, 4)] == [128, 64, 32]
    assert [batch_of("weak", 32, 4, count) for count in (1, 2, 4)] == [32, 32, 32]


def test_the_first_period_is_that_of_the_schedule():
    rules = [algorithms.sgd(), algorithms.sync_sgd(), algorithms.hier_avg(4, 32), algorithms.dasgd(6, 5), "ddp", None]
    assert [first_period(rule, 4) for rule in rules] == [1, 1, 32, 6, 1, 1]


def test_rules_take_the_options_that_are_theirs():
    assert build_rule("hier_avg", {"k": 3, "k1": 2, "k2": 6, "tau": None}).options == {"k1": 2, "k2": 6}
    with pytest.raises(InputError, match="downpour"):
        build_rule("downpour", {})


def test_the_perceptron_has_the_parameters_asked_for():
    assert sum(p.numel() for p in mlp(50).parameters()) == 4 * 50**2
    inputs, targets = next(mlp_workload(1e4).batches(2, 1, 8))
    assert inputs.shape == (8, 50)
    assert targets.shape == (8,)
