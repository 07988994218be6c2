"""Output that cannot be written: it is reported or not, and never ends the work."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.launch import environment

PROGRAM = """
import os, sys
from hpcavg.utils import streams
if "WITHOUT_BLOCKING" in os.environ:
    os.set_blocking(1, False)
only_prints = sys.argv[1] != "training"
streams.guard(only_prints)
for number in range(int(sys.argv[2])):
    print(number, "\\u251c caf\\u00e9 \\udcff", flush=True)
streams.print_error("told")
sys.stderr.write("the end\\n")
sys.exit(streams.final_status(0, only_prints))
"""
LOST = "standard output cannot be written"


@pytest.fixture
def shell(tmp_path):
    """Return a function that runs the program with what a shell makes of `words` behind it: (status, out, err)."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def shell(words, purpose, num_lines=1, **variables):
        command = f'"$1" "$2" {purpose} {num_lines} {words}; exit ${{PIPESTATUS[0]}}'
        arguments = ["bash", "-c", command, "bash", sys.executable, str(tmp_path / "program.py")]
        folder = str(Path(__file__).parents[3])
        variables = environment(PYTHONPATH=folder, **variables)
        result = subprocess.run(arguments, capture_output=True, env=variables, timeout=60)
        return result.returncode, result.stdout, result.stderr.decode().splitlines()

    return shell


@pytest.mark.parametrize(
    ("words", "reason", "status"),
    [
        (">/dev/full", "No space left on device", 1),
        (">&-", "Bad file descriptor", 1),
        (">&- <&-", "Bad file descriptor", 1),
        ("1</dev/null", "Bad file descriptor", 1),
        ("| head -c1 >/dev/null", None, 141),
    ],
)
def test_what_only_prints_fails_and_says_so_unless_its_reader_left(shell, words, reason, status):
    said = [] if reason is None else [f"hpcavg: error: {LOST} ({reason})"]
    num_lines = 1 if reason else 20_000  # more than a pipe holds
    assert shell(words, "printing", num_lines) == (status, b"", ["told", "the end", *said])


@pytest.mark.parametrize(
    ("words", "warns"),
    [(">/dev/full", True), (">&-", False), ("| head -c1 >/dev/null", False)],
)
def test_a_training_goes_on_and_warns_of_a_loss_once(shell, words, warns):
    said = [f"hpcavg: warning: {LOST} (No space left on device); what it would show is lost"] if warns else []
    assert shell(words, "training", 20_000) == (0, b"", [*said, "told", "the end"])


@pytest.mark.parametrize("words", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_standard_error_may_be_lost_without_a_word(shell, words):
    status, out, err = shell(words, "printing")
    assert (status, err) == (0, [])
    assert out.startswith(b"0 ")


def test_a_file_that_is_opened_later_is_not_taken_for_a_closed_stream(tmp_path):
    program = (
        "import os, sys\nfrom hpcavg.utils import streams\nstreams.guard(False)\n"
        f"file = os.open({str(tmp_path / 'metrics')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os.write(1, b'of a library'); os.write(2, b'of a library'); sys.exit(file < 3)\n"
    )
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", program]
    assert subprocess.run(command, timeout=60).returncode == 0
    assert (tmp_path / "metrics").read_bytes() == b""


def test_what_the_encoding_lacks_is_shown_as_it_can_be(shell):
    assert shell("", "printing") == (0, "0 ├ café ".encode() + b"\xff\n", ["told", "the end"])
    latin = shell("", "printing", PYTHONIOENCODING="latin-1")
    assert latin == (0, b"0 \\u251c caf\xe9 \\udcff\n", ["told", "the end"])


def test_a_pipe_that_does_not_block_is_waited_for(shell):
    slow = "| { sleep 0.5; wc -l; }"
    assert shell(slow, "printing", 20_000, WITHOUT_BLOCKING="1") == (0, b"20000\n", ["told", "the end"])


@pytest.mark.parametrize(("flags", "out"), [([], b""), (["-u"], b"shown\n")])
def test_what_python_does_not_hold_back_is_not_held_back(flags, out):
    program = "import os\nfrom hpcavg.utils import streams\nstreams.guard(False)\nprint('shown')\nos._exit(0)"
    folder = str(Path(__file__).parents[3])
    variables = {name: value for name, value in environment(PYTHONPATH=folder).items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *flags, "-c", program]
    assert subprocess.run(command, stdout=subprocess.PIPE, env=variables, timeout=60).stdout == out
