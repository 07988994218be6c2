"""What the averager remembers of a model: tensors by name, whatever they are, the same on all ranks."""

import io
import re

import numpy as np
import pytest
import torch
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.averaging.replica import Replica
from hpcavg.engines.select import select_engine
from tests.mpi.problems import Vector

pytestmark = pytest.mark.mpi


class Holder(nn.Module):
    """A parameter, and the buffers that are given."""

    def __init__(self, persistent=True, **buffers):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2))
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent)


def make(model, topology, rule=None, optimizer=None, **policies):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    return Averager(model, optimizer, rule or algorithms.k_avg(1), topology, **policies)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


# -- looked up by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [algorithms.k_avg(1), algorithms.sync_sgd("gradients")], ids=["k_avg", "gradients"])
def test_a_buffer_that_was_reassigned_is_averaged(topology, rule):
    model = Holder(running=torch.zeros(3))
    averager = make(model, topology, rule)
    for _ in range(2):
        model.running = torch.full((3,), float(topology.rank))
        averager.step()
    averager.finish()
    assert model.running.tolist() == pytest.approx([(topology.num_learners - 1) / 2] * 3)
    model.running.fill_(7.0)
    assert (averager._replica.buffers.arrays[0] == 7).any()


def test_a_buffer_that_was_reassigned_in_the_mean_model_is_put_back(topology):
    model = Holder(running=torch.zeros(3), count=torch.tensor(1))
    averager = make(model, topology, algorithms.one_shot())
    model.running = torch.full((3,), 5.0 + topology.rank)
    with averager.mean_model():
        model.running = torch.zeros(3)
        model.count = torch.tensor(9)
    assert model.running.tolist() == [5.0 + topology.rank] * 3
    assert model.count == 1


def test_memory_that_was_exchanged_before_the_mean_model_is_put_back(topology):
    model = Vector(np.zeros(3))
    averager = make(model, topology, algorithms.one_shot())
    model.x.data = torch.full((3,), float(topology.rank), dtype=torch.float64)
    with averager.mean_model() as mean:
        assert mean.x.tolist() == pytest.approx([(topology.num_learners - 1) / 2] * 3)
    assert model.x.tolist() == [topology.rank] * 3


def replace_the_head(model, optimizer):
    model[1] = nn.Linear(3, 2)
    optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())


def assign_a_state(model, optimizer):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def remove_a_bias(model, optimizer):
    model[1].bias = None


def add_a_layer(model, optimizer):
    model.append(nn.Linear(2, 2))


def add_a_group(model, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def add_a_buffer(model, optimizer):
    model[0].register_buffer("mean", torch.zeros(3))


def grow_a_buffer(model, optimizer):
    model[0].scale = torch.ones(9)


def replace_a_frozen_layer(model, optimizer):
    model[0] = nn.Linear(3, 3).requires_grad_(False)


CHANGES = {
    replace_the_head: "model='1.weight'",
    assign_a_state: "model='0.weight'",
    remove_a_bias: "model='1.bias'",
    add_a_layer: "model='2.weight'",
    add_a_group: "optimizer='optimizer.1.0'",
    add_a_buffer: "model='0.mean'",
    grow_a_buffer: "model='0.scale'",
    replace_a_frozen_layer: "model='0.weight'",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_another_one_is_refused_by_name(topology, change):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].register_buffer("scale", torch.ones(2))
    if change is replace_a_frozen_layer:
        model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = make(model, topology, optimizer=optimizer)
    averager.step()
    change(model, optimizer)
    with pytest.raises(InputError, match=f"^{re.escape(CHANGES[change])}.*make a new Averager$"):
        averager.step()


def test_a_buffer_outside_the_state_may_grow_and_is_then_left_alone(topology):
    model = Holder(persistent=False, angles=torch.arange(4.0))
    averager = make(model, topology)
    model.angles = torch.arange(8.0) + topology.rank
    averager.step()
    averager.step()
    assert model.angles.tolist() == (torch.arange(8.0) + topology.rank).tolist()


def test_layers_without_tensors_may_be_replaced(topology):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    averager = make(model, topology)
    model[1] = nn.Tanh()
    averager.step()
    model[1] = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"1\.weight"):
        averager.step()


def test_a_tie_that_is_broken_later_is_refused(topology):
    shared = torch.zeros(2)
    model = nn.ModuleList([Holder(b=shared), Holder(b=shared)])
    averager = make(model, topology)
    model[0].b = torch.ones(2)
    with pytest.raises(InputError, match=r"1\.b.*all its names"):
        averager.step()


# -- savers and sharers -------------------------------------------------------------------------------------------


def saved_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue())


@pytest.mark.parametrize("engine", ["auto", "mpi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_every_tensor_has_a_storage_of_its_own_size(topology, engine, dtype):
    shapes = ((100, 100), (4, 4), (0, 3), ())
    model = nn.ParameterList([torch.zeros(shape, dtype=dtype) for shape in shapes])
    averager = make(model, topology, engine=engine, optimizer_state="average")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    averager.step()
    for tensor in model.parameters():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert saved_bytes(model[1]) < 4000


def test_tensors_in_shared_memory_are_taken_back_and_the_next_mean_is_right(topology):
    """As when a state is sent to another process, on one rank alone."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    averager = make(model, topology)
    if topology.rank == 0:
        for tensor in model.state_dict().values():
            tensor.share_memory_()
    with torch.no_grad():
        model[0].weight.fill_(topology.rank)
    averager.step()
    assert model[0].weight.flatten().tolist() == pytest.approx([(topology.num_learners - 1) / 2] * 9)
    array = averager._replica.parameters.arrays[0]
    assert array.data_ptr() <= model[0].weight.data_ptr() < array.data_ptr() + array.nbytes


def test_a_copy_of_the_state_has_memory_of_its_own(topology):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    model[2].to(memory_format=torch.channels_last)
    state = make(model, topology).model_state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(value.is_contiguous() for value in state.values())
    tensors = [*state.values(), *model.parameters()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


# -- which buffers are averaged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["average", "keep", "recompute"])
def test_what_is_not_finite_from_the_start_makes_nobody_sick(topology, buffers):
    mask = torch.full((4, 4), -torch.inf).triu(1)
    low = torch.tensor(torch.inf if topology.rank == topology.num_learners - 1 else 0.0)  # on one rank alone
    model = Holder(mask=mask.clone(), low=low, odd=torch.tensor(torch.nan))
    averager = make(model, topology, buffers=buffers, non_finite="stop")
    averager.step()
    averager.finish([torch.zeros(1)] if buffers != "recompute" else [])
    assert torch.equal(model.mask, mask)
    assert averager.totals.excluded == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", [algorithms.k_avg(1), algorithms.dasgd(2, delay=1, xi=0.25)], ids=["k_avg", "dasgd"])
def test_constants_keep_their_bits_and_what_one_learner_changes_is_averaged(topology, dtype, rule):
    values = torch.tensor([0.1, 1 / 3, -30000.0, 0.7], dtype=dtype)
    mask = torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype).triu(1)  # its sum over learners is not finite
    model = Holder(before=values.clone(), running=torch.zeros(4, dtype=dtype), after=values.clone(), mask=mask.clone())
    averager = make(model, topology, rule, non_finite="stop")
    for step in range(4):
        if step == 1 and topology.rank == topology.num_learners - 1:
            model.running += topology.num_learners
        averager.step()
    averager.finish()
    assert bits(model.before) == bits(model.after) == bits(values)
    assert bits(model.mask) == bits(mask)
    assert model.running.tolist() == pytest.approx([1.0] * 4, rel=0.01)


def test_buffers_that_differ_from_the_start_are_no_constants(topology):
    model = Holder(running=torch.full((2,), float(topology.rank)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    replica = Replica(model, optimizer, topology, select_engine("mpi", topology), start="own")
    assert model.running.tolist() == [topology.rank] * 2
    replica.refresh()
    assert replica.buffers.view(replica.buffers.slots[-1]).tolist() == [float(topology.rank > 0)]


def test_the_first_tensor_that_is_not_finite_is_named(topology):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    replica = make(model, topology)._replica
    assert replica.name_non_finite() == ""
    model[1].running_var.fill_(torch.nan)
    assert replica.name_non_finite() == "1.running_var"
    model[0].bias.data[1] = torch.inf
    assert replica.name_non_finite() == "0.bias"


# -- odd tensors --------------------------------------------------------------------------------------------------

ODD = {
    "sparse": lambda rank: torch.eye(3).to_sparse(),
    "csr": lambda rank: torch.eye(3).to_sparse_csr(),
    "csc": lambda rank: torch.eye(3).to_sparse_csc(),
    "quantized": lambda rank: torch.quantize_per_tensor(torch.arange(3.0), 0.1, 0, torch.qint8),
    "expanded": lambda rank: (torch.arange(4) + rank).expand(3, 4),
    "expanded float": lambda rank: (torch.arange(4.0) + rank).expand(3, 4),
    "windows": lambda rank: (torch.arange(4) + rank).as_strided((3, 2), (1, 1)),
    "float8": lambda rank: torch.full((3,), float(rank)).to(torch.float8_e4m3fn),
    "bool": lambda rank: torch.tensor([True, rank == 0]),
    "complex": lambda rank: torch.polar(torch.ones(3), torch.full((3,), float(rank))),
    "conjugate": lambda rank: torch.polar(torch.ones(3), torch.full((3,), 1.0 + rank)).conj(),
    "transposed": lambda rank: (torch.arange(6) + rank).reshape(2, 3).t(),
    "no elements": lambda rank: torch.zeros(0, 3, dtype=torch.int32),
    "rows": lambda rank: (torch.arange(12) + rank).reshape(6, 2)[::2],
}


@pytest.mark.filterwarnings("ignore")  # of torch: that sparse and quantized tensors may change
@pytest.mark.parametrize("is_frozen", [False, True], ids=["buffer", "frozen"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_start_as_rank_0s_and_are_left_alone(topology, kind, is_frozen):
    tensor = ODD[kind](topology.rank)
    model = Holder() if is_frozen else Holder(odd=tensor)
    if is_frozen:
        model.odd = nn.Parameter(tensor, requires_grad=False)
    averager = make(model, topology, check_rounds=1)
    with averager.mean_model():
        averager.model_state_dict()
    averager.step()
    averager.finish()
    now, expected = (t.dequantize() if t.is_quantized else t.to_dense() for t in (model.odd.detach(), ODD[kind](0)))
    assert torch.equal(now.float() if kind == "float8" else now, expected.float() if kind == "float8" else expected)


def test_tensors_of_many_types_travel_together(topology):
    flags, count = torch.tensor([True, False, True]), torch.tensor(5)
    low, pair = torch.tensor([-torch.inf]).half(), torch.tensor([1 + 2j])
    model = Holder(flags=flags, count=count, empty=torch.zeros(0, dtype=torch.int8), low=low, pair=pair)
    if topology.rank:
        for buffer in model.buffers():
            buffer.zero_()
    make(model, topology)
    assert model.flags.tolist() == [True, False, True]
    assert (model.count.item(), model.low.item(), model.pair.item()) == (5, -torch.inf, 1 + 2j)


def sparse_parameter(rank):
    return {"p": nn.Parameter(torch.eye(2).to_sparse())}


def meta_parameter(rank):
    return {"p": nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)}


def differing_sparse(rank):
    return {"p": nn.Parameter((torch.eye(2) * (1 + rank)).to_sparse(), requires_grad=False)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sparse_parameter, r"p of layout torch\.sparse_coo.*dense, or frozen"),
        (meta_parameter, "p on the meta device"),
        (differing_sparse, r"p .* on rank 1.*the same as on rank 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_kept_the_same_is_refused_by_name_on_every_rank(topology, given, message):
    model = Holder()
    for name, parameter in given(topology.rank).items():
        model.register_parameter(name, parameter)
    optimizer = torch.optim.SGD([model.x], lr=0.1)
    if given is differing_sparse and topology.num_learners == 1:
        make(model, topology, optimizer=optimizer)
        return
    with pytest.raises(InputError, match=message):
        make(model, topology, optimizer=optimizer)


def test_sparse_gradients_are_refused_by_name_where_gradients_are_averaged(topology):
    model = nn.Embedding(5, 2, sparse=True)
    averager = make(model, topology, algorithms.sync_sgd("gradients"))
    if topology.rank == topology.num_learners - 1:  # the others have none at all
        model(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"^model='weight'.*dense"):
        averager.step()


def test_a_sick_learner_forgets_its_sparse_gradients(topology):
    model = nn.Embedding(5, 2, sparse=True)
    averager = make(model, topology, algorithms.k_avg(1))
    model(torch.tensor([1])).sum().backward()
    if topology.rank == 0 and topology.num_learners > 1:
        model.weight.data.fill_(torch.nan)
    averager.step()
    assert model.weight.isfinite().all()
    assert model.weight.grad.to_dense().any() == (topology.rank > 0 or topology.num_learners == 1)


# -- differences between ranks ------------------------------------------------------------------------------------


def test_rank_0s_order_of_memory_is_taken_and_values_travel_by_index(topology):
    torch.manual_seed(topology.rank)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    if topology.rank == 0:
        model.to(memory_format=torch.channels_last)
        model[1].weight.data = model[1].weight.data.t()
    make(model, topology)
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 3))
    assert torch.equal(model[0].weight, expected[0].weight)
    assert torch.equal(model[1].weight, expected[1].weight.t())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_averaged_state_takes_the_order_of_memory_of_its_parameter(topology):
    model = nn.Conv2d(3, 4, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    averager = make(model, topology, optimizer=optimizer, optimizer_state="average")
    values = torch.arange(108.0).reshape(4, 3, 3, 3)
    model.weight.grad = torch.zeros_like(model.weight)
    own = values.to(memory_format=torch.channels_last) if topology.rank == 0 else values.clone()
    optimizer.state[model.weight]["momentum_buffer"] = own
    averager.step()
    assert torch.allclose(optimizer.state[model.weight]["momentum_buffer"], 0.9 * values)


def build(case, is_odd):
    """Return a model and an optimizer, on the odd rank another one."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    parameters = list(model.parameters())
    if is_odd and case == "tie":
        model[1].weight = model[0].weight
    elif is_odd and case == "dtype":
        model[2].double()
    elif is_odd and case == "frozen":
        model[1].requires_grad_(False)
    elif is_odd and case == "order":
        parameters.reverse()
    return model, torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("start", ["rank0", "own"])
@pytest.mark.parametrize("case", ["tie", "dtype", "frozen", "order"])
def test_models_of_another_form_are_refused_on_every_rank(topology, case, start):
    last = topology.num_learners - 1
    model, optimizer = build(case, topology.rank == last > 0)
    engine = select_engine("mpi", topology)
    if last == 0:
        Replica(model, optimizer, topology, engine, start)
        return
    with pytest.raises(InputError, match=f"on rank {last}.*as on rank 0"):
        Replica(model, optimizer, topology, engine, start)


def test_a_replica_may_keep_its_own_values(topology):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(topology.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Replica(model, optimizer, topology, select_engine("auto", topology), start="own")
    assert all((tensor == topology.rank).all() for tensor in (*model.parameters(), *model.buffers()))


def test_a_topology_of_many_small_tensors_is_flattened_as_one(topology):
    model = nn.ParameterList([nn.Parameter(torch.full((3,), float(index))) for index in range(500)])
    averager = make(model, topology)
    assert len(averager._replica.parameters.arrays) == 1
    model[250].data = torch.full((3,), float(topology.rank))
    averager.step()
    assert model[250].tolist() == pytest.approx([(topology.num_learners - 1) / 2] * 3)
    assert isinstance(averager.topology, Topology)
