"""Two jobs that are given one folder at once; `tests.process.racing` runs any number of such races."""

import random

import pytest

from tests.process.racing import race

pytestmark = pytest.mark.process


def test_one_trains_and_the_other_is_refused(tmp_path):
    """Where nothing is yet, and where a run was stopped."""
    for arguments in ([], ["--resume", "auto"]):
        race(tmp_path / "run", random.Random(), arguments)
