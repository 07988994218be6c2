"""What a checkpoint restores is on the learner's device, where training goes on with it.

Checkpoints hold everything in host memory. Tensors without values, on torch's device "meta", stand for those on a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI

from hpcavg import Topology, algorithms
from hpcavg.averaging.delayed import Delayed
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.outer_state import OuterState
from hpcavg.checkpoints import random_state
from hpcavg.engines.mpi import MpiEngine
from hpcavg.training.loop_state import _LOOP

META = torch.device("meta")


@pytest.fixture
def topology():
    made = Topology(MPI.COMM_SELF)
    yield made
    made.free()


def parameters(device):
    return FlatBuffer([("weight", torch.ones(5, device=device))])


def test_losses_of_the_epoch():
    state = SimpleNamespace(device=META)
    _LOOP["losses"].load(state, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    for losses, number in zip(state.losses, (2, 1), strict=True):
        losses.append(torch.empty((), device=META))
        assert torch.stack(losses).device == META
        assert len(losses) == number + 1


def test_a_mean_in_flight(topology):
    made = {device: Delayed([parameters(device)], MpiEngine(topology), topology) for device in ("cpu", "meta")}
    means = [torch.full_like(array[0], 2.0) for array in parameters("cpu").arrays]
    about = {"step": 3, "period_steps": 3, "num_bytes": 1, "num_members": 1, "is_sick": False}
    for device, delayed in made.items():
        delayed.load_state_dicts([{**about, "means": [*means, torch.zeros(16)]}])
        found = delayed.flight.pending.wait()
        assert {mean.device.type for mean in found} == {device}
        assert [mean.shape for mean in found] == [(16,), *(mean.shape for mean in means)]
    assert not any(mean is own for mean, own in zip(made["cpu"].flight.pending.wait()[1:], means, strict=True))


@pytest.mark.parametrize("rule", [algorithms.slowmo(3), algorithms.diloco(3)], ids=lambda rule: rule.name)
def test_anchor_and_outer_momentum(rule):
    saved = OuterState(rule.how, parameters("cpu")).state_dict()
    state = OuterState(rule.how, parameters(META))
    state.load_state_dict(saved)
    on_device = {"anchor", "momentum"}  # the rate is a number that the host reads at every merge
    assert {name: tensor.device == META for name, tensor in state.states[0].items()} == {
        name: name in on_device for name in saved[0]
    }


def test_the_optimizers_state():
    def optimizer(device):
        parameter = torch.ones(3, device=device, requires_grad=True)
        parameter.grad = torch.ones(3, device=device)
        return torch.optim.Adam([parameter])

    saved = optimizer("cpu")
    saved.step()
    restored = optimizer(META)
    restored.load_state_dict(saved.state_dict())
    (state,) = restored.state.values()
    assert (state["exp_avg"].device, state["exp_avg_sq"].device) == (META, META)
    restored.step()


def test_the_generator_of_a_gpu(monkeypatch):
    """Its state stays in host memory, as torch wants it. Runs without a GPU leave it alone."""
    given = []
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr("torch.cuda.set_rng_state", given.append)
    without = random_state.save()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    saved = random_state.save()
    random_state.load(without)
    assert given == []
    random_state.load(saved)
    (state,) = given
    assert state.device.type == "cpu"
    assert state.tolist() == list(range(16))
