"""What is finite, at any place of any dtype; digests of whatever memory; what the errors say."""

import math

import numpy as np
import pytest
import torch

from hpcavg.averaging.health import Excluded, digest, examine, is_finite, sample_of, squared_distances
from hpcavg.engines.reduction import as_array
from hpcavg.errors import CorruptionError, SickLearnersError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_is_enough_wherever_it_is(dtype, value):
    generator = torch.Generator().manual_seed(1)
    for numel in (1, 2, 33, 1000, 2**18 + 1):
        array = torch.randn(1, numel, generator=generator).to(dtype)
        assert is_finite([array])
        for index in {0, numel // 2, numel - 1}:
            damaged = array.clone()
            damaged[0, index] = complex(0, value) if dtype.is_complex else value
            assert not is_finite([array, damaged])


def test_opposite_infinities_do_not_cancel():
    assert not is_finite([torch.tensor([[math.inf, -math.inf, 1.0]])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_that_overflows_is_looked_at_again(dtype):
    largest = torch.finfo(dtype).max
    array = torch.full((1, 2**18 + 5), largest, dtype=dtype)
    assert is_finite([array])
    array[0, -1] = math.nan
    assert not is_finite([array])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("numel", [3, 10_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_numpy_arrays_of_any_size_are_examined_alike(dtype, numel):
    array = np.full((1, numel), np.finfo(dtype).max, dtype=dtype)
    assert examine([array], 2) == (True, True)
    assert examine([array / 4], 2) == (True, False)
    array[0, -1] = np.inf
    assert examine([array], 2) == (False, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_distance_of_every_learner(dtype):
    x = torch.zeros(2, 70_000, dtype=dtype)
    x[1] = 3
    mean = torch.ones(70_000, dtype=dtype)
    for values in (as_array(x), sample_of(as_array(x))):
        assert squared_distances(values, as_array(mean)) == pytest.approx([70_000, 280_000])


def test_the_sample_of_normal_numbers_is_off_by_its_error():
    values = np.random.default_rng(1).standard_normal((100, 70_000))
    none = np.zeros(70_000)
    ratios = np.divide(squared_distances(sample_of(values), none), squared_distances(values, none)) - 1
    assert abs(np.mean(ratios)) < 0.01
    assert 0.01 < np.std(ratios) < 0.03


def test_nothing_is_finite():
    assert is_finite([])
    assert is_finite([torch.zeros(1, 0)])


def test_rows_of_strided_memory():
    memory = torch.full((2, 8), math.nan)
    memory[:, :5] = 1
    assert is_finite([memory[:, :5]])


def test_a_sick_learner_adds_nothing_and_is_not_counted():
    sick = Excluded((2,), 3, (0,))
    own = torch.full((1, 2), math.nan)
    sick.zero_contribution([own])
    assert own.tolist() == [[0, 0]]
    assert sick.num_well == 2
    assert Excluded((), 3, ()).num_well is None


def test_digests_tell_bits_apart_and_not_where_they_lie():
    values = torch.randn(6, 4)
    assert digest([values.t().contiguous().t()]) == digest([values])
    assert digest([torch.tensor([0.0])]) != digest([torch.tensor([-0.0])])
    assert digest([torch.ones(3, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(0)]) != digest([])


def test_errors_are_one_line_that_says_who_what_and_when():
    sick = SickLearnersError([1, 3], "global average of step 40", 4)
    assert str(sick) == "learners 1, 3 (2 of 4) with parameters that are not finite, at the global average of step 40"
    assert sick.learners == [1, 3]
    odd = CorruptionError([2], True, ["parameters", "outer state"], "at step 8")
    assert str(odd) == "learner 2 with other parameters and outer state at step 8"
    assert odd.ranks == [2]
