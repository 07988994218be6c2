"""Signals that come before there is anybody to heed them."""

import signal
import subprocess
import sys

import pytest

BEGIN = """
import os, signal, time
from hpcavg.distributed.signals import early_signals, remember_early_signals
remember_early_signals()
"""


def run(program):
    return subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_they_are_remembered(name):
    result = run(f"os.kill(os.getpid(), signal.{name}); print([each.name for each in early_signals()])")
    assert (result.returncode, result.stdout) == (0, f"['{name}']\n")


def test_launcher_and_scheduler_may_both_pass_one_on_and_a_later_one_is_an_order():
    kill = "os.kill(os.getpid(), signal.SIGTERM);"
    result = run(f"{kill} {kill} print('here', flush=True); time.sleep(1.1); {kill} time.sleep(60)")
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "here\n")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_process_forked_off_dies_of_them(name):
    """A pool of workers that a task keeps is ended so."""
    result = run(f"""
child = os.fork()
if not child:
    time.sleep(60)
os.kill(child, signal.{name})
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.{name}, early_signals())
""")
    assert result.stdout == "True []\n", result.stderr
