"""Parameters as views of one array per dtype."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.errors import InputError


def named(*tensors):
    return [(f"t{index}", tensor) for index, tensor in enumerate(tensors)]


def test_values_shapes_and_identity_survive():
    model = nn.Linear(3, 5)
    before = [p.detach().clone() for p in model.parameters()]
    parameters = list(model.parameters())
    FlatBuffer(model.named_parameters())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_array_is_the_parameters():
    model = nn.Linear(2, 2)
    flat = FlatBuffer(model.named_parameters())
    assert len(flat.arrays) == 1
    flat.arrays[0].fill_(7.0)
    assert all((p == 7).all() for p in model.parameters())
    model.bias.data.zero_()
    assert (flat.arrays[0] == 0).any()


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=8))
def test_any_shapes_lie_one_after_another_on_cache_lines(shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    values = [t.clone() for t in tensors]
    flat = FlatBuffer(named(*tensors))
    assert all(torch.equal(t, v) and t.shape == v.shape for t, v in zip(tensors, values, strict=True))
    occupied = sorted((t.data_ptr(), t.numel() * 4) for t in tensors if t.numel())
    for (start, size), (following, _) in itertools.pairwise(occupied):
        assert start + size <= following
    for start, _ in occupied:
        assert (start - flat.arrays[0].data_ptr()) % 64 == 0


def test_one_array_per_dtype():
    flat = FlatBuffer(named(torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(4), torch.ones(1).half()))
    assert [array.dtype for array in flat.arrays] == [torch.float32, torch.float64, torch.float16]
    assert flat.num_bytes == 2 * 64 + 64 + 64


def test_tied_weights_take_one_slot_and_stay_tied():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    flat = FlatBuffer([("first", first.weight), ("second", second.weight)])
    assert [slot.name for slot in flat] == ["first"]


def test_two_parameters_over_the_same_memory_stay_tied():
    weight = torch.randn(4, 4)
    one, two = nn.Parameter(weight), nn.Parameter(weight)
    flat = FlatBuffer(named(one, two))
    assert len(flat.slots) == 1
    one.data[0, 0] = 42.0
    assert two[0, 0] == 42.0


def test_partly_overlapping_parameters_are_refused_by_name():
    memory = torch.zeros(10)
    with pytest.raises(InputError, match="t0 over t1"):
        FlatBuffer(named(memory[:6], memory[4:]))


def test_neighbours_in_one_memory_are_not_overlapping():
    memory = torch.arange(10.0)
    a, b = memory[:5], memory[5:]
    FlatBuffer(named(a, b))
    assert a.tolist() == [0, 1, 2, 3, 4]
    assert b.tolist() == [5, 6, 7, 8, 9]


def test_dense_strides_are_kept_and_others_made_contiguous():
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    transposed, sparse_rows = torch.randn(3, 5).t(), torch.randn(6, 4)[::2]
    values = [channels_last.clone(), transposed.clone(), sparse_rows.clone()]
    FlatBuffer(named(channels_last, transposed, sparse_rows))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert transposed.stride() == (1, 5)
    assert sparse_rows.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip((channels_last, transposed, sparse_rows), values, strict=True))


def test_no_tensors_make_no_arrays():
    flat = FlatBuffer([])
    assert flat.arrays == []
    assert flat.num_bytes == 0


def test_new_memory_is_taken_back_with_its_values():
    parameter = nn.Parameter(torch.zeros(4))
    flat = FlatBuffer(named(parameter))
    parameter.data = torch.arange(4.0)
    flat.refresh()
    assert parameter.tolist() == [0, 1, 2, 3]
    flat.arrays[0].zero_()
    assert parameter.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("changed", [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)])
def test_another_shape_or_dtype_is_an_error_that_names_the_tensor(changed):
    parameter = nn.Parameter(torch.zeros(4))
    flat = FlatBuffer([("layer.weight", parameter)])
    parameter.data = changed
    with pytest.raises(InputError, match=r"layer\.weight"):
        flat.refresh()


def test_lazy_modules_are_refused():
    with pytest.raises(InputError, match="lazy"):
        FlatBuffer(nn.LazyLinear(3).named_parameters())


def test_every_learner_has_a_row():
    one, other = torch.arange(6.0).view(3, 2), torch.arange(10.0, 16.0).view(3, 2, 1)
    flat = FlatBuffer(named(one, other), learners=3)
    (array,) = flat.arrays
    assert array.shape == (3, 32)
    assert array[:, :2].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert array[:, 16:18].tolist() == [[10, 11], [12, 13], [14, 15]]
    array[1] = 7
    assert one.tolist() == [[0, 1], [7, 7], [4, 5]]
    assert other.shape == (3, 2, 1)
    FlatBuffer(named(one, other), learners=3)  # the rows alternate in memory, and do not overlap


def test_a_part_of_a_tensor_in_its_place_is_named():
    """As pruning leaves it: the address is what it was."""
    weight = torch.nn.Parameter(torch.arange(6.0))
    flat = FlatBuffer([("weight", weight)])
    weight.data = weight.data[:4]
    with pytest.raises(InputError, match=r"weight as \(4,\)"):
        flat.refresh()
