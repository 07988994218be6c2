"""Where /dev/shm is short, and becomes so in the middle, means go the way of engine='mpi' on all ranks alike.

python -m tests.cluster.test_short_memory tries more sizes of both.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.cluster.failures import SURVIVING
from tests.process.launch import FLAGS, environment, mpirun

# A mount that only the program sees.
WITH_SHM = 'mount --make-rprivate / && mount -t tmpfs -o "size=$0" tmpfs /dev/shm && exec "$@"'
ALL_SIZES, ALL_MODELS = ("1m", "8m", "24m", "64m", "100m"), (8, 40)


def cases(size, ranks, arguments, flags=(), timeout_s=300):
    """Return what the program says with a /dev/shm of `size`, by case."""
    program = [mpirun(), "-np", str(ranks), *flags, *FLAGS, sys.executable, "-m", "tests.cluster.short_memory"]
    command = ["unshare", "-m", "bash", "-c", WITH_SHM, size, *program, *map(str, arguments)]
    # MPI's own memory is elsewhere: what it does where it has no room is not ours.
    elsewhere = {"OMPI_MCA_btl_sm_backing_directory": "/tmp", "PYTHONHASHSEED": "0"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment(**elsewhere, PYTHONPATH=os.getcwd())
    )
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert found, result.stdout + result.stderr
    # mpirun counts a rank that was killed as a failure, whatever becomes of the others.
    assert result.returncode == 0 or "shrink" in str(arguments), result.stderr
    return {each.pop("case"): each for each in found}


def check_rules(size, megabytes):
    """Compare all rules bit for bit, and return how often each warned."""
    found = cases(size, 2, [megabytes, "rules"])
    for name, of_engines in found.items():
        assert of_engines["auto"] == of_engines["mpi"], (size, megabytes, name)
        assert None not in [bits for _, _, bits in of_engines["auto"]], (size, megabytes, name)
    return {name: of_engines["warnings"] for name, of_engines in found.items()}


def check_shrink(size, megabytes):
    """Compare what two of three ranks end with, whose means are not added up in the same order."""
    auto, mpi = (
        cases(size, 3, [megabytes, f"shrink-{engine}"], flags=SURVIVING)["shrink"][engine] for engine in ("auto", "mpi")
    )
    for (loss, distance, bits), (expected_loss, expected_distance, _) in zip(auto, mpi, strict=True):
        assert bits is not None, (size, megabytes)
        assert (loss, distance) == pytest.approx((expected_loss, expected_distance), rel=1e-6), (size, megabytes)


@pytest.mark.parametrize(
    ("size", "fall_back"),
    [
        ("1m", ["sync_sgd", "k_avg", "k_avg measured", "dasgd"]),  # nothing has room
        ("5m", ["k_avg measured", "dasgd"]),  # two models have, and not a mean beside them
        ("7m", ["dasgd"]),  # nor copies of both
        ("16m", []),
    ],
)
def test_every_rule_ends_as_with_engine_mpi(size, fall_back):
    warned = check_rules(size, 2)
    names = {
        "sync_sgd": "sync_sgd {} {}",
        "k_avg": "k_avg {'k': 2} {}",
        "k_avg measured": "k_avg {'k': 2} {'measure_distance': True}",
        "dasgd": "dasgd {'tau': 3, 'delay': 1, 'xi': 0.25} {}",
    }
    assert [name for name, full in names.items() if warned[full]] == fall_back
    assert max(warned[full] for full in names.values()) <= 1


@pytest.mark.parametrize("size", ["7m", "10m"])
def test_survivors_go_on_with_what_room_there_is(size):
    check_shrink(size, 2)


if __name__ == "__main__":
    for one_size in ALL_SIZES:
        for one_model in ALL_MODELS:
            counts = check_rules(one_size, one_model)
            check_shrink(one_size, one_model)
            print(
                f"{one_size} {one_model} MB: {len(counts)} cases, {sum(map(bool, counts.values()))} fell back",
                flush=True,
            )
