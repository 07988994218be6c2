"""How `python -m hpcavg` ends where it is not let to begin."""

import signal
import subprocess
import sys

import pytest
from mpi4py import MPI

from hpcavg.cli import main


def test_an_interrupt_while_a_run_starts_is_one_line():
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background would ignore
        "from hpcavg.cli import main, parsers\n"
        "parsers.parse_train = lambda arguments: os.kill(os.getpid(), signal.SIGINT)\n"
        "main.main([])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr == "hpcavg: interrupted\n"


@pytest.mark.parametrize(("rank", "speaks"), [(0, True), (1, False), (7, False)])
@pytest.mark.parametrize("command", ["train", "info", "data"])
def test_lone_ranks_stay_until_the_first_has_spoken(monkeypatch, capsys, command, rank, speaks):
    """Else the launcher, which ends all when one has left, may end it before."""
    for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    slept = []
    monkeypatch.setattr(main.time, "sleep", slept.append)
    for place, name in ((main, "remember_early_signals"), (main.gc, "disable")):
        monkeypatch.setattr(place, name, lambda: None)
    monkeypatch.setattr(main, "_connect", lambda: MPI.COMM_WORLD)
    if command == "data":
        assert main._without_mpi("data", ["check"]) == 2
    else:
        assert main._with_mpi(command, []) == 2
    assert capsys.readouterr().err.count("\n") == speaks
    assert slept == [main._LONE_S] * (not speaks)
