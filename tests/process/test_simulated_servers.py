"""Whole runs with simulated servers, and their staleness beside that of real ranks."""

import json

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcavg import Averager, Topology, algorithms, stack
from hpcavg.results.view import read_view
from tests.process.launch import run, trained

pytestmark = pytest.mark.process

RUN = ["--algorithm", "downpour", "--n-push", 1, "--n-fetch", 1, "--task", "digits", "--model", "mlp", "--drop-last"]


def test_a_run_records_every_update(tmp_path):
    options = ["--learners-per-rank", 8, "--steps", 30, "--learning-rate", 0.01, "--step-times", "slow:3"]
    summary, result = trained(tmp_path / "run", 1, [*RUN, *options])
    assert "simulated servers (step times: slow:3)" in result.out
    arrivals = read_view(tmp_path / "run" / "metrics", "arrival")
    is_there = arrivals["learner"] >= 0
    assert is_there.sum(axis=1).tolist() == [30] * 8
    assert (arrivals["learner"] == np.where(is_there, np.arange(8)[:, None], -1)).all()
    assert (summary["num_servers"], summary["exchanges"], summary["completed"]) == (0, 30, True)
    assert summary["staleness_mean"] == pytest.approx(arrivals["staleness"][is_there].mean())
    assert summary["staleness_max"] == arrivals["staleness"].max() > 7 * 2
    assert np.nanmax(arrivals["arrived_s"][:7]) == 30
    assert np.nanmax(arrivals["arrived_s"][7]) == 90
    exchanges = read_view(tmp_path / "run" / "metrics", "averaging")
    assert (exchanges["scope"] == b"server").sum(axis=1).tolist() == [30] * 8
    assert exchanges["bytes"][0][exchanges["bytes"][0] > 0].sum() == summary["bytes_averaged"]
    assert read_view(tmp_path / "run" / "metrics", "step")["step"].max(axis=1).tolist() == [30] * 8
    assert summary["test_accuracy"] > 0.5


def test_128_learners_repeat_bit_for_bit(tmp_path):
    options = ["--learners", 128, "--batch-size", 8, "--steps", 4, "--step-times", "lognormal:0.5"]
    found = [trained(tmp_path / name, 1, [*RUN, *options])[0] for name in ("one", "two")]
    names = ("parameters_sha256", "staleness_mean", "staleness_max", "samples")
    one, two = ([summary[name] for name in names] for summary in found)
    assert one == two
    assert found[0]["staleness_max"] > 127


def test_the_staleness_is_that_of_real_ranks():
    """Three learners, and a server on a rank of its own; the first and last steps are left out."""
    result = run(4, [], timeout=100, module="tests.process.staleness", is_warm=False)
    assert result.status == 0, result.err
    real = json.loads(result.out)
    topology = Topology(MPI.COMM_SELF, learners_per_rank=3)
    model = stack(torch.nn.Linear(3, 1), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, algorithms.downpour(1, 1), topology, total_steps=60)
    while not averager.done:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        averager.step()
    averager.finish()
    simulated = [arrival.staleness for arrival in averager.serve()]
    topology.free()
    assert len(real) == len(simulated) == 3 * 60
    assert np.mean(simulated[30:-30]) == pytest.approx(2, abs=0.05)
    assert np.mean(real[30:-30]) == pytest.approx(np.mean(simulated[30:-30]), abs=0.3)


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (1, "--algorithm k-avg --step-times slow:2", "--step-times slow:2: must be constant, unless"),
        (1, "--algorithm downpour --learners 4 --step-times slow", "--step-times slow: must be constant, lognormal"),
        (2, "--algorithm downpour --step-times slow:2", "--step-times slow:2: must be constant, unless"),
        (2, "--algorithm downpour --learners-per-rank 2", "--learners-per-rank 2: must be 1 with downpour on 2 ranks"),
        (1, "--algorithm eamsgd --learners 4 --num-servers 1", "--num-servers 1: must be below the number of ranks"),
        (1, "--algorithm eamsgd --learners 4 --step-times slow:2 --batch-size 50", "--drop-last False: must be true"),
    ],
)
def test_what_does_not_go_together_is_refused(ranks, arguments, message):
    result = run(ranks, arguments.split())
    assert result.status == 2, result.err
    assert message in result.err
