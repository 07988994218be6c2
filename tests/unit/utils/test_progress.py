"""What is shown while something long goes on: a bar on a terminal, lines elsewhere, nothing on ranks other than 0."""

import pytest

from hpcavg.utils import progress


def test_bytes_are_told_of_every_tenth_where_there_is_no_terminal(capsys):
    shown = progress.display(0, 200_000_000, what="text.bz2", in_bytes=True)
    for _ in range(40):
        shown.advance(5_000_000)
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in lines] == [f"text.bz2: {10 * n} % of 200.0 MB" for n in range(1, 11)]
    assert all(line.endswith(" MB/s") for line in lines)


@pytest.mark.parametrize(("in_bytes", "amount"), [(False, "3/4"), (True, "3/4 bytes")])
def test_a_bar_moves_on_a_terminal(capsys, monkeypatch, in_bytes, amount):
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    shown = progress.display(0, 4, 1, "reading", in_bytes)
    shown.advance(2)
    shown.line("a line that stays")
    shown.close()
    out = capsys.readouterr().out
    assert "a line that stays\n" in out
    assert "reading" in out
    assert amount in out


def test_lines_are_all_there_is_of_steps_elsewhere_and_nothing_on_other_ranks(capsys):
    for rank in 0, 1:
        shown = progress.display(rank, 4)
        shown.advance()
        shown.line(f"of rank {rank}")
        shown.close()
    assert capsys.readouterr().out == "of rank 0\n"
