"""The model's tensors given to another process."""

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process


def test_a_state_given_to_another_process_changes_no_mean():
    result = run(2, [], timeout=120, module="tests.process.sharing")
    assert result.status == 0, result.err
    lines = sorted(result.out.splitlines())
    assert lines == ["rank 0 has 1.5 1.5", "rank 1 has 1.5 1.5", f"seen {0.5 * 300 * 300}"]
