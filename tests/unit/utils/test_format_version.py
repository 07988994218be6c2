"""Formats of files: newer ones are named, and what is no format is refused."""

import pytest

from hpcavg.utils.format_version import NewerFormatError, check


@pytest.mark.parametrize("found", [1, 2])
def test_formats_that_are_known(found):
    check(found, 2)


def test_a_newer_one_is_named():
    with pytest.raises(NewerFormatError, match=r"^it is of format 3; this hpcavg reads up to 2$"):
        check(3, 2)


@pytest.mark.parametrize("found", [0, -1, "1", 1.0, True, None, [1]])
def test_what_is_no_format(found):
    with pytest.raises(ValueError, match="is no format") as caught:
        check(found, 2)
    assert type(caught.value) is ValueError
