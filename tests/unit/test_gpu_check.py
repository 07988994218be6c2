"""tests/gpu/check.sh refuses in one line what it cannot do; what it does otherwise takes a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "check.sh"
USAGE = "usage: tests/gpu/check.sh --wheels FOLDER --output FOLDER [--device cpu]"


def check(*arguments):
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def wheels(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some-1.0-py3-none-any.whl").touch()
    return tmp_path / "wheels"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], USAGE),
        (["--wheels"], f"--wheels needs a value; {USAGE}"),
        (["--output", "out"], USAGE),
        (["--ranks", "4"], f"unknown option --ranks; {USAGE}"),
        (["--wheels", "nowhere", "--output", "out"], "--wheels nowhere: no wheels there"),
        (["--wheels", "nowhere", "--output", "out", "--device", "tpu"], "--device tpu: must be cuda or cpu"),
    ],
)
def test_arguments_are_refused_in_one_line(arguments, why):
    result = check(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"check.sh: {why}\n")


def test_a_machine_without_a_gpu_is_told(tmp_path, wheels):
    result = check("--wheels", wheels, "--output", tmp_path / "out")
    assert (result.returncode, result.stderr) == (2, "check.sh: no GPU: torch sees no CUDA device\n")


def test_wheels_that_cannot_be_installed_fail_the_first_part(tmp_path, wheels):
    """With its seconds, a log that says why, and status 1."""
    result = check("--wheels", wheels, "--output", tmp_path / "out", "--device", "cpu")
    assert result.returncode == 1
    assert result.stdout.split()[0::3] == ["FAIL", "install"]
    assert (tmp_path / "out" / "summary.txt").read_text() == result.stdout
    assert "some-1.0-py3-none-any.whl" in (tmp_path / "out" / "install.txt").read_text()


def test_the_deadlines_of_all_parts_are_8_minutes_at_most():
    lines = [line.split() for line in SCRIPT.read_text().splitlines()]
    limits = {words[1].strip('"'): int(words[2]) for words in lines if words[:1] == ["part"]}
    times = {name: 3 if name.endswith("$ranks") else 1 for name in limits}
    assert {"install", "info", "resume", "tests-on-$ranks", "mean-on-$ranks"} == limits.keys()
    assert sum(limits[name] * times[name] for name in limits) <= 480
