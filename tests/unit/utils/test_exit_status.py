"""The exit statuses: the numbers that scripts rely on, and their table."""

from hpcavg.utils.exit_status import ExitStatus, markdown_table
from hpcavg.utils.markdown import table


def test_the_numbers_stay():
    assert {status.name: int(status) for status in ExitStatus} == {
        **{"DONE": 0, "FAILED": 1, "BAD_INPUT": 2, "RECORDS_LOST": 3, "REQUEUE": 75},
        **{"INTERRUPTED": 130, "READER_LEFT": 141},
    }
    assert f"{ExitStatus.REQUEUE}" == "75"


def test_every_status_has_its_row():
    rows = [line.split(" | ") for line in markdown_table().splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [*(str(int(status)) for status in ExitStatus), "above 128"]
    assert all(row[1] for row in rows)


def test_bars_in_a_cell_do_not_end_it():
    assert table(("a", "b"), [("x | y", "z")]) == "| a | b |\n|---|---|\n| x \\| y | z |"
