"""Forward and backward passes of a run, by hand and against plain torch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hpcavg import models, stack
from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.tasks import Task
from hpcavg.training.forward_backward import ForwardBackward


def make(model, loss=cross_entropy, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    task = Task("test", lambda: model, lambda: None, loss)
    return ForwardBackward(Config(**options), task, model, optimizer), optimizer


def squares(output, target):
    return (output - target).pow(2).sum() / 2


def line(*weights):
    """Return a model whose output for the unit inputs is its weights."""
    model = nn.Linear(len(weights), 1, bias=False)
    model.weight.data[:] = torch.tensor(weights)
    return model


def test_gradients_above_the_norm_are_scaled_down_to_it_when_the_step_is_taken():
    model = line(3.0, 4.0)
    passes, optimizer = make(model, squares, clip_norm=1.0)
    passes.gradients(torch.eye(2), torch.zeros(2, 1))
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    optimizer.step()
    assert model.weight.detach() == pytest.approx(torch.tensor([[2.4, 3.2]]), abs=1e-5)


def test_gradients_below_the_norm_are_left_alone():
    model = line(3.0, 4.0)
    passes, optimizer = make(model, squares, clip_norm=5.1)
    passes.gradients(torch.eye(2), torch.zeros(2, 1))
    optimizer.step()
    assert model.weight.tolist() == [[0.0, 0.0]]


def test_each_learner_of_a_rank_is_clipped_by_its_own_norm():
    stacked = stack(line(3.0, 4.0), learners=3)
    passes, optimizer = make(stacked, squares, clip_norm=1.0)
    weights = stacked.module.weight
    weights.data[1] = torch.tensor([[0.3, 0.4]])  # below the norm
    weights.data[2] = torch.tensor([[0.0, 2.0]])
    losses = passes.gradients(torch.eye(2).expand(3, 2, 2), torch.zeros(3, 2, 1))
    assert losses.tolist() == pytest.approx([12.5, 0.125, 2.0])  # half of the squared norms
    optimizer.step()
    wanted = torch.tensor([[[2.4, 3.2]], [[0.0, 0.0]], [[0.0, 1.0]]])
    assert weights.detach() == pytest.approx(wanted, abs=1e-5)


def test_an_optimizer_of_one_learner_of_several_is_clipped_by_its_norm():
    """An optimizer that cannot step for all at once is split; its parts have the whole one's hooks."""
    stacked = stack(line(3.0, 4.0), learners=2)
    passes, optimizer = make(stacked, squares, clip_norm=1.0)
    passes.gradients(torch.eye(2).expand(2, 2, 2), torch.zeros(2, 2, 1))
    weights = stacked.module.weight
    (hook,) = optimizer._optimizer_step_pre_hooks.values()
    part = SimpleNamespace(param_groups=[{"params": [SimpleNamespace(grad=weights.grad[1])]}])
    hook(part)
    assert weights.grad.tolist() == [[[3.0, 4.0]], [pytest.approx([0.6, 0.8], abs=1e-5)]]


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_learners_of_a_rank_compute_what_each_would_alone(precision):
    torch.manual_seed(0)
    model = nn.Linear(4, 10)
    inputs, targets = torch.randn(2, 6, 4), torch.randint(10, (2, 6))
    alone = [make(copy.deepcopy(model), precision=precision)[0] for _ in range(2)]
    stacked = stack(copy.deepcopy(model), learners=2)
    together, _ = make(stacked, precision=precision)
    losses = together.gradients(inputs, targets)
    for row, passes in enumerate(alone):
        loss = passes.gradients(inputs[row], targets[row])
        close = {"rtol": 1e-5, "atol": 1e-6} if precision == "full" else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(losses[row], loss, **close)
        torch.testing.assert_close(stacked.module.weight.grad[row], passes._network.weight.grad, **close)
        outputs = together.predict_of(slice(row, row + 1), inputs[row : row + 1])
        torch.testing.assert_close(outputs[0], passes.predict(inputs[row]), **close)
        assert outputs.dtype == torch.float32


def test_gradients_are_clipped_after_they_were_scaled_back():
    model = line(0.03, 0.04)
    passes, optimizer = make(model, squares, clip_norm=0.01, precision="fp16")
    passes.gradients(torch.eye(2), torch.zeros(2, 1))
    assert model.weight.grad[0, 1] > 1000
    passes.scaler.step(optimizer)
    assert model.weight.detach() == pytest.approx(torch.tensor([[0.024, 0.032]]), abs=1e-5)


def test_a_step_that_overflows_is_left_out_and_the_scale_goes_with_the_checkpoint():
    model = line(3.0, 4.0)
    passes, optimizer = make(model, squares, precision="fp16")
    scale = passes.scaler.get_scale()
    passes.gradients(torch.eye(2) * 60_000, torch.zeros(2, 1))
    passes.scaler.step(optimizer)
    passes.end_step()
    assert model.weight.tolist() == [[3.0, 4.0]]
    assert passes.scaler.get_scale() == scale / 2
    other, _ = make(line(0.0, 0.0), squares, precision="fp16")
    other.load_state_dict(passes.state_dict())
    assert other.scaler.get_scale() == scale / 2


@pytest.mark.parametrize(("precision", "error"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_mixed_precision_rounds_what_layers_compute_and_nothing_else(precision, error):
    torch.manual_seed(0)
    model = models.build("cnn", (3, 8, 8), 10)
    inputs = torch.randn(4, 3, 8, 8)
    exact = make(model)[0].predict(inputs)
    output = make(model, precision=precision)[0].predict(inputs)
    assert output.dtype == torch.float32
    assert not torch.equal(output, exact)
    assert (output - exact).abs().max() < 4 * error
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_channels_last_changes_the_order_in_memory_and_not_the_numbers():
    torch.manual_seed(0)
    model = models.build("cnn", (3, 8, 8), 10)
    inputs = torch.randn(4, 3, 8, 8)
    exact = make(model)[0].predict(inputs)
    passes, _ = make(model, channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(passes.predict(inputs), exact, atol=1e-5)
    flat = models.build("mlp", (3, 8, 8), 10)
    assert make(flat, channels_last=True)[0].predict(inputs).shape == (4, 10)


ALONE = SimpleNamespace(rank=0, is_server=False, run_on_all_ranks=lambda action: action())


@pytest.mark.filterwarnings("default")  # of torch's own, about itself
def test_a_compiled_model_computes_the_same_with_the_same_parameters(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(models.build("mlp", (1, 2, 2), 3), nn.BatchNorm1d(3))
    inputs, targets = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    plain = make(model)[0].gradients(inputs, targets)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    passes, _ = make(model, compile=True)
    passes.compile(lambda: (inputs, targets), ALONE)
    assert capsys.readouterr().out == "compiling the model (minutes for a deep network)\n"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True):  # it has been done
        assert passes.gradients(inputs, targets).item() == pytest.approx(plain.item(), abs=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


@pytest.mark.filterwarnings("default")
def test_a_model_that_cannot_be_compiled_is_told_in_one_line(monkeypatch):
    passes, _ = make(nn.Sequential(line(3.0, 4.0), nn.ReLU()), squares, compile=True)
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(InputError) as caught:
        passes.compile(lambda: (torch.eye(2), torch.zeros(2, 1)), ALONE)
    text = caught.value.as_option()
    assert text.startswith("--compile True: must be left out where torch cannot compile: InvalidCxxCompiler: ")
    assert text.endswith("'no-such-compiler'); CPUs need a C++ compiler, which CXX may name")
    assert "\n" not in text


@pytest.mark.filterwarnings("default")
def test_an_error_of_the_model_is_no_fault_of_the_compiler():
    passes, _ = make(line(3.0, 4.0), squares, compile=True)
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        passes.compile(lambda: (torch.eye(3), torch.zeros(3, 1)), ALONE)


def test_label_smoothing_by_hand():
    """Two classes at equal odds lose log 2 whatever the target; at log-odds 2 a tenth of it goes to the wrong one."""
    model = line(0.0, 2.0)
    passes, _ = make(nn.Sequential(model, nn.ZeroPad1d((1, 0))), label_smoothing=0.2)
    loss = passes.gradients(torch.eye(2), torch.tensor([0, 1]))
    right = torch.log1p(torch.exp(torch.tensor(-2.0)))
    assert loss.item() == pytest.approx((torch.log(torch.tensor(2.0)) + 0.9 * right + 0.1 * (right + 2)).item() / 2)


def test_label_smoothing_is_refused_where_the_loss_has_no_labels():
    with pytest.raises(InputError, match="label_smoothing"):
        make(line(1.0), squares, label_smoothing=0.1)
