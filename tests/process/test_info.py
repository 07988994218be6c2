"""`info` on ranks of its own: one table, what it found, and what it warns of."""

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process


def test_one_table_says_where_the_ranks_are_and_what_will_hurt():
    arguments = ["info", "--group-size", 2, "--on-failure", "shrink", "--threads", 99, "--device", "cpu"]
    result = run(3, arguments, is_warm=False, UCX_LOG_LEVEL="error")
    assert (result.status, result.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line]
    assert len(rows) == 1
    assert rows[0][1:3] == ["0-2", "0-1"]
    assert rows[0][5:7] == ["99", "cpu"]
    for text in (
        "hpcavg 0.",
        ", thread level multiple",
        "messages go by: ob1 (the library's choice, by its control variables)",
        "CUDA-aware: no (MPIX_Query_cuda_support says 0)",
        "fault tolerance: the library has it; not switched on",
        " UCX_LOG_LEVEL=error",
        "launcher: mpirun",
        "3 learners, 0 servers, 1 node, 2 local groups; model of 0.0403 MB",
        "engine shared",
        "warning: --on-failure shrink will be refused",
    ):
        assert result.out.count(text) == 1, (text, result.out)
    assert "torch threads on" in result.out or "ranks share" in result.out
