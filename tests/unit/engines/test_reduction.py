"""What rounding does to a mean: how far it may be off, and where it is exact."""

import numpy as np
import pytest
import torch

from hpcavg.engines.reduction import as_array, average

NUMBERS = [1, 2, 3, 4, 5, 6, 8, 96]
HALF_ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def mean_of(rows, count=None):
    out = torch.empty_like(rows[0])
    average([as_array(row) for row in rows], [as_array(out)], 0, len(out), count or len(rows))
    return out


def values_of(number, numel, dtype):
    generator = torch.Generator().manual_seed(number)
    return (1 + torch.rand(number, numel, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_mean_is_off_by_no_more_than_a_rounding_for_each_row(number, dtype):
    """P - 1 additions and a division, each by half an ulp at most; a division by a power of two is exact."""
    rows = values_of(number, 40_000, dtype)
    exact = rows.numpy().astype(np.longdouble).sum(axis=0) / number
    error = np.abs(mean_of(rows).numpy() - exact) / exact
    assert error.max() <= (number - (number & (number - 1) == 0)) * HALF_ULP[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("number", "most_ulp"), [(1, 0), (2, 0), (4, 0), (3, 1), (5, 1), (6, 1), (96, 24)])
def test_of_equal_values(number, most_ulp, dtype):
    row = values_of(number, 40_000, dtype)[0]
    error = (mean_of([row] * number) - row).abs() / torch.from_numpy(np.spacing(row.numpy()))
    assert error.max() <= most_ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", NUMBERS)
def test_in_half_precision_equal_values_are_their_own_mean(number, dtype):
    """The sum is in float32, whose roundings are lost in the last."""
    row = values_of(number, 40_000, dtype)[0]
    assert torch.equal(mean_of([row] * number), row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", NUMBERS)
def test_in_half_precision_a_mean_is_rounded_once_whoever_is_left_out(number, dtype):
    rows = values_of(number + 1, 40_000, dtype)
    rows[number // 2] = 0
    exact = rows.double().sum(dim=0) / number
    error = (mean_of(rows, number).double() - exact).abs() / exact
    assert error.max() <= 1.01 * HALF_ULP[dtype]
