"""Ranks, nodes and daemons that die on an emulated cluster."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from tests.cluster.failures import check, train
from tests.process.launch import mpirun, pid_of_rank, run, wait_for

SCRIPT = Path(__file__).parents[2] / "jobs" / "restart.sh"
SLOTS_FLAGS = ["--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
KEEPALIVE = {"time": "5", "intvl": "2", "probes": "3"}
IN_A_HURRY = {f"PRTE_MCA_oob_tcp_keepalive_{name}": value for name, value in KEEPALIVE.items()}


def kill_daemon(pid):
    """Kill the process that started the rank `pid`."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)


def cut_cable(pid):
    """Take the node of the rank `pid` from the network."""
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", "link", "set", "eth0", "down"], check=True)


LOSE = {"daemon": kill_daemon, "cable": cut_cable}


@pytest.mark.parametrize(
    ("algorithm", "slots", "deaths"),
    [
        ("hier-avg", (2, 2), [[3], [0, 1]]),
        ("dasgd", (2, 2, 2), [[2, 3], [0, 1], [5]]),
    ],
)
def test_the_others_go_on_without_ranks_and_nodes(make_cluster, tmp_path, algorithm, slots, deaths):
    """Node 0 holds rank 0 and the launcher, of which only the ranks die."""
    outcome = train(make_cluster(slots, yields=True), algorithm, tmp_path / "run", deaths, seed=0)
    check(outcome)
    assert outcome.lost == deaths
    assert median(outcome.recovery_s) <= 1


@pytest.mark.parametrize("lose", ["daemon", "cable"])
def test_a_run_that_loses_a_node_goes_on_where_nodes_are_left(make_cluster, tmp_path, lose):
    """mpirun ends with status 0 then, complete or not; `restart.sh` must see that it is not.

    A node that goes without a word is missed by the keepalive of TCP, after eight minutes unless it is told to hurry.
    """
    folder, hosts = tmp_path / "run", tmp_path / "hosts"
    training = ["--algorithm", "hier-avg", "--k1", "4", "--k2", "16", "--epochs", "8", "--on-failure", "restart"]
    training += ["--checkpoint-steps", "20", "--keep-checkpoints", "100"]
    resumed = [*training, "--resume", "auto", "--output", str(folder)]
    words = [str(SCRIPT), mpirun(), "--hostfile", str(hosts), *SLOTS_FLAGS, sys.executable, "-m", "hpcavg", *resumed]
    hosts.write_text("node0 slots=2\nnode1 slots=2\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with make_cluster((2, 2), yields=True).start(words, is_plain=True, variables=IN_A_HURRY, **pipes) as process:
        wait_for((folder / "checkpoints" / "latest").exists, seconds=120)
        hosts.write_text("node0 slots=2\n")
        LOSE[lose](pid_of_rank(folder, 2))
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "restart.sh: status 0, not complete: restart 1" in err
    assert err.splitlines()[-1] == "restart.sh: done, after 1 restarts"
    assert "it is of 4 learners; 2 start from their mean" in out
    (start,) = re.findall(r"going on from step \d+: (.*)", out)
    by_hand = run(2, [*training, "--resume", start, "--output", tmp_path / "by-hand"], timeout=200)
    assert by_hand.status == 0, by_hand.err
    summaries = [json.loads((at / "summary.json").read_text()) for at in (folder, tmp_path / "by-hand")]
    assert summaries[0]["parameters_sha256"] == summaries[1]["parameters_sha256"]
