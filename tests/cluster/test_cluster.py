"""What programs see on an emulated cluster, and what its command line says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcavg.errors import InputError

ROOT = Path(__file__).parents[2]

NODES = """
import json, os
from hpcavg import Topology
topology = Topology()
mine = (os.uname().nodename, os.getcwd(), os.environ["MARK"], len(os.environ["PATH"]), len(os.listdir("/dev/shm")))
all = topology.learner_ranks.gather((mine, topology.node_rank, topology.group))
if topology.rank == 0:
    print(json.dumps([topology.num_nodes, list(topology.group_sizes.values()), all]))
"""

TRANSFER = """
import sys, time
import numpy as np
from mpi4py import MPI
world, num_bytes = MPI.COMM_WORLD, int(sys.argv[1])
data = np.zeros(num_bytes, dtype=np.uint8)
for _ in range(3):
    world.Barrier()
    started = time.perf_counter()
    if world.rank == 0:
        parts = [np.empty_like(data) for _ in range(1, world.size)]
        MPI.Request.Waitall([world.Irecv(part, rank) for rank, part in enumerate(parts, 1)])
        print(time.perf_counter() - started)
    else:
        world.Send(data, 0)
"""


def seconds_to_rank_0(cluster, num_bytes):
    """Return how long rank 0 waited for `num_bytes` from each other rank: the best of three."""
    result = cluster.run(["python", "-c", TRANSFER, str(num_bytes)], timeout_s=60)
    assert result.returncode == 0, result.stderr
    return min(float(line) for line in result.stdout.split())


@pytest.mark.parametrize("slots", [(2, 2), (3, 1), (1, 1, 1)])
def test_mpi_sees_the_nodes(make_cluster, slots):
    result = make_cluster(slots).run(["python", "-c", NODES], timeout_s=60, variables={"MARK": "a b"})
    assert result.returncode == 0, result.stderr
    num_nodes, group_sizes, ranks = json.loads(result.stdout)
    assert num_nodes == len(slots)
    assert tuple(group_sizes) == slots
    places = [(node, rank) for node, size in enumerate(slots) for rank in range(size)]
    for (node, node_rank), ((host, folder, mark, path_length, _), seen_node_rank, group) in zip(
        places, ranks, strict=True
    ):
        assert (host, group, seen_node_rank) == (f"node{node}", node, node_rank)
        assert (folder, mark, path_length) == (os.getcwd(), "a b", len(os.environ["PATH"]))


def test_a_cable_carries_what_was_asked(make_cluster):
    cluster = make_cluster((1, 1), rate="100mbit")
    assert cluster.bytes_per_s == 12.5e6
    num_bytes = 4_000_000
    least = (num_bytes - 2 * cluster.burst_bytes) / cluster.bytes_per_s  # both ends of the path let a burst through
    assert least < seconds_to_rank_0(cluster, num_bytes) < 3 * num_bytes / cluster.bytes_per_s


def test_two_senders_share_the_cable_of_the_receiver(make_cluster):
    cluster = make_cluster((1, 1, 1), rate="100mbit")
    num_bytes = 2_000_000
    least = (2 * num_bytes - 3 * cluster.burst_bytes) / cluster.bytes_per_s
    assert least < seconds_to_rank_0(cluster, num_bytes) < 6 * num_bytes / cluster.bytes_per_s


def test_a_rate_is_no_limit_within_a_node(make_cluster):
    assert seconds_to_rank_0(make_cluster((2,), rate="1mbit"), 4_000_000) < 4


def test_training_over_two_nodes(two_nodes, tmp_path):
    folder = tmp_path / "run"
    program = ["python", "-m", "hpcavg", "--epochs", "1", "--algorithm", "hier-avg", "--output", str(folder)]
    result = two_nodes.run(program, timeout_s=90)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["completed"], summary["num_nodes"], summary["num_ranks"]) == (True, 2, 4)
    assert "2 local groups" in result.stdout


def test_a_program_that_takes_too_long_is_ended(two_nodes):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        two_nodes.run(["sh", "-c", "echo here; sleep 60"], timeout_s=3)
    assert caught.value.stdout.count("here") == 4


def command_line(*arguments, **options):
    command = [sys.executable, "-m", "benchmarks.cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **options)


@pytest.mark.usefixtures("make_cluster")
def test_output_and_status_pass_through():
    result = command_line("--slots", "2,1", "--np", "1", "--", "sh", "-c", "echo $OMPI_COMM_WORLD_SIZE; exit 7")
    assert result.returncode == 7
    assert result.stdout == "1\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--slots 3,1 --nodes 3", "--slots 3,1: must be one number or 3, one for every node"),
        ("--slots two", "--slots two: must be one number or 2, one for every node"),
        ("--slots 0", "--slots 0: must be an integer of at least 1"),
        ("--nodes 0", "--nodes 0: must be an integer of at least 1 and at most 250"),
        ("--rate 1gb", "--rate 1gb: must be a positive number with bit, kbit, mbit or gbit"),
        ("--rate 0mbit", "--rate 0mbit: must be a positive number with bit, kbit, mbit or gbit"),
        ("--delay 1", "--delay 1: must be a number with us, ms or s"),
        ("--mtu 100", "--mtu 100: must be an integer of at least 576 and at most 65535"),
        ("--np 5", "--np 5: must be an integer of at least 1 and at most 4"),
        ("--nods 3", "unrecognized arguments: --nods"),
    ],
)
@pytest.mark.usefixtures("make_cluster")
def test_bad_input_is_one_line_and_status_2(arguments, line):
    result = command_line(*arguments.split(), "--", "true")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith(f"benchmarks.cluster: error: {line}")


def test_a_delay_is_kept_or_refused(make_cluster):
    """Not every kernel has netem."""
    result = make_cluster((1, 1), rate="1gbit", delay="20ms").run(["python", "-c", TRANSFER, "1"], timeout_s=60)
    if result.returncode == 2:
        assert re.fullmatch(r"benchmarks.cluster: error: --delay 20ms: must be left out.*netem.*\n", result.stderr)
    else:
        assert result.returncode == 0, result.stderr
        assert min(float(line) for line in result.stdout.split()) > 0.01


@pytest.mark.usefixtures("make_cluster")
def test_others_than_root_are_told_so(tmp_path):
    """As another user, who may read no folder of root's: the file is run from a copy."""
    for part in ("benchmarks", "hpcavg"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", sys.executable]
    for folder in [tmp_path, *tmp_path.parents[:3]]:
        if not folder.stat().st_mode & 0o001:  # others may pass through /tmp, and must go on writing there
            folder.chmod(0o755)
    result = subprocess.run(
        [*command, "-m", "benchmarks.cluster", "--", "true"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr == "benchmarks.cluster: error: needs root: it makes network namespaces\n"


def test_a_missing_tool_is_named(tmp_path, monkeypatch, make_cluster):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = command_line("--", "true")
    assert result.returncode == 2
    assert result.stderr.startswith("benchmarks.cluster: error: needs ip, tc, unshare, setpriv, mount on the PATH")


def test_impossible_clusters_are_refused_where_they_are_described(make_cluster):
    for wrong in ({"slots": ()}, {"slots": (2, 0)}, {"rate": "fast"}, {"delay": "1"}, {"mtu": 10}):
        with pytest.raises(InputError):
            make_cluster(**wrong)
