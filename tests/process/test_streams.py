"""Commands whose output cannot be written: a training goes on, what was run for its output fails in one line."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.process.launch import environment

pytestmark = pytest.mark.process

LOST = "standard output cannot be written (No space left on device)"


def shell(words, arguments):
    """Run hpcavg as a shell does with `words` behind it; return its status and what it said on standard error."""
    command = f"{shlex.join([sys.executable, '-m', 'hpcavg', *map(str, arguments)])} {words}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), timeout=60)
    return result.returncode, result.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (">/dev/full", [f"hpcavg: warning: {LOST}; what it would show is lost"]),
        ("<&- >&- 2>&-", []),
        ("| head -1 >/dev/null", []),
    ],
)
def test_a_training_goes_on_to_its_end(tmp_path, words, said):
    assert shell(words, ["--steps", 3, "--output", tmp_path / "run"]) == (0, said)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["completed"]


def test_what_was_asked_for_and_cannot_be_written_is_an_error(tmp_path):
    said = (1, [f"hpcavg: error: {LOST}"])
    assert shell(">/dev/full", ["info"]) == said
    assert shell(">/dev/full", ["job", "slurm"]) == said
    assert shell(">/dev/full", ["--help"]) == said
    assert shell("| :", ["--help"]) in [(141, []), (0, [])]  # 0: it had written all before its reader left
    assert shell("2>&-", ["report", tmp_path])[0] == 2
