"""How `python -m hpcavg` ends where it is not let to begin."""

import signal
import subprocess
import sys


def test_an_interrupt_while_a_run_starts_is_one_line():
    program = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background would ignore
        "from hpcavg import __main__, cli\n"
        "cli.parse_train = lambda arguments: os.kill(os.getpid(), signal.SIGINT)\n"
        "__main__.main([])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr == "hpcavg: interrupted\n"
