"""What `info` shows and warns of, by tables made by hand: also of machines that are not here."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpcavg.cli import info
from hpcavg.config.options import Config
from hpcavg.machine import mpi_library
from hpcavg.machine.inspection import build_without_memory, file_system_of, find_needs, model_bytes
from hpcavg.machine.inventory import RankInventory
from hpcavg.machine.inventory import RunNeeds as Needs
from hpcavg.machine.warnings import find_warnings

GIB = 2**30


def cluster(num_nodes=1, per_node=4, **changes):
    """Return ranks that have all they want: four cores and a NUMA node each."""
    return [
        replace(
            RankInventory(
                f"node{node:03}",
                node * per_node + index,
                group=node,
                cores=frozenset(range(4 * index, 4 * index + 4)),
                numa_nodes=(index,),
                num_numa_nodes=per_node,
                threads=4,
                versions={"torch": "2.13.0", "messages by": "ucx"},
            ),
            **changes,
        )
        for node in range(1, num_nodes + 1)
        for index in range(per_node)
    ]


def on_gpus(ranks, gpus, visible=None):
    """Return the ranks of one node with these GPUs, each of which sees all of them or those that are named."""
    return [
        replace(rank, device="A100", gpu=gpu, gpu_index=0, visible_gpus=frozenset(visible or gpus), num_gpu_files=4)
        for rank, gpu in zip(ranks, gpus, strict=True)
    ]


ALL_CORES = frozenset(range(16))


def test_nothing_is_said_of_what_is_well():
    assert find_warnings(cluster(64), Needs(model_bytes=GIB)) == []
    assert find_warnings(on_gpus(cluster(), "abcd"), Needs()) == []
    # A resource set shows each rank one GPU, as its number 0.
    assert (
        find_warnings([replace(p, visible_gpus=frozenset({p.gpu})) for p in on_gpus(cluster(), "abcd")], Needs()) == []
    )


@pytest.mark.parametrize(
    ("ranks", "needs", "says"),
    [
        (on_gpus(cluster(), "aabb"), Needs(), ["4 ranks compute on 2 GPUs: start as many ranks"]),
        (on_gpus(cluster(), "aaaa"), Needs(), ["4 ranks compute on 1 GPU: "]),
        (on_gpus(cluster(1, 2), "ab", "abcd"), Needs(), ["2 of 4 GPUs are idle: start 4 ranks"]),
        (cluster(num_gpu_files=4), Needs(), ["4 GPUs that torch does not see: "]),
        (cluster(num_gpu_files=4), Needs(device="cpu"), []),
        (cluster(1, 64, cores=frozenset({0, 1}), threads=1), Needs(), ["64 ranks share 2 cores: start at most 2"]),
        (cluster(cores=ALL_CORES, threads=8), Needs(), ["32 torch threads on 16 cores: --threads 4 at most"]),
        (cluster(cores=ALL_CORES, cores_given=4), Needs(), ["16 torch threads on the 4 cores that the job was given"]),
        (cluster(cores=ALL_CORES, cores_given=4, threads=1), Needs(), []),
        (cluster(cores_given=64), Needs(),
         ["to 16 of the 64 cores that the job was given: mpirun --map-by ppr:4:node:"]),
        (cluster(numa_nodes=(0, 1)), Needs(), ["all ranks may run on several of the 4 NUMA nodes"]),
        ([*cluster()[:3], replace(cluster()[3], numa_nodes=(2, 3))], Needs(), ["1 of 4 ranks may run on several"]),
        (cluster(free_shared_bytes=2**26), Needs(model_bytes=2**25),
         ["128 MiB of parameters, and /dev/shm has 64 MiB free"]),
        (cluster(free_shared_bytes=2**26), Needs(model_bytes=2**23, copies_per_rank=2), []),
        (cluster(free_shared_bytes=2**26), Needs(model_bytes=2**23, copies_per_rank=2, copies_per_node=2),
         ["share 80 MiB"]),
        (cluster(), Needs(on_failure="shrink"), ["--on-failure shrink will be refused: start with mpirun --with-ft"]),
        (cluster(is_fault_tolerant=True), Needs(on_failure="shrink"), []),
        (cluster(thread_level="serialized"), Needs(), ["MPI gives thread level serialized"]),
        (cluster(), Needs(intended_learners=4), []),
        (cluster(), Needs(intended_learners=16), ["the options are meant for 16 learners, not 4"]),
        ([*cluster()[:3], replace(cluster()[3], group=None)], Needs(intended_learners=3), []),  # beside a server
        (cluster(), Needs(locked_file_system="lustre"), ["HDF5_USE_FILE_LOCKING lets HDF5 lock files on lustre"]),
    ],
)  # fmt: skip
def test_one_node_in_trouble(ranks, needs, says):
    found = find_warnings(ranks, needs)
    assert len(found) == len(says), found
    assert all(text in line for text, line in zip(says, found, strict=True)), found


def test_ranks_on_cores_of_their_own_are_looked_at_apart():
    ranks = cluster(1, 3)
    ranks[0] = replace(ranks[0], cores=frozenset({0}), threads=8)
    assert find_warnings(ranks, Needs()) == ["node001: 8 torch threads on 1 core: --threads 1 at most"]


def test_nodes_with_the_same_trouble_share_a_line():
    ranks = [*cluster(64, cores=frozenset({0, 1}), threads=1), *cluster(1, 4, node="fat", group=65)]
    assert find_warnings(ranks, Needs()) == ["node[001-064]: 4 ranks share 2 cores: start at most 2"]


@pytest.mark.parametrize(
    ("ranks", "needs", "says"),
    [
        (cluster(2, versions={"messages by": "ob1"}), Needs(), "messages between nodes go over TCP"),
        (cluster(1, versions={"messages by": "ob1"}), Needs(), None),
        (
            cluster(2, versions={"messages by": "ob1"}, is_fault_tolerant=True),
            Needs(on_failure="shrink"),
            None,
        ),
        (cluster(2, group=0), Needs(), "local group 0 spans nodes"),
        (cluster(2, group=None), Needs(), None),  # servers
        (cluster(3)[:-1], Needs(), "unequal numbers of ranks (3 on 1 node, 4 on 2 nodes)"),
        (
            [*cluster(3)[:-4], *(replace(rank, versions={"torch": "2.12.1"}) for rank in cluster(3)[-4:])],
            Needs(),
            "torch is not the same everywhere: 2.13.0 on node[001-002]; 2.12.1 on node003",
        ),
    ],
)
def test_several_nodes_in_trouble(ranks, needs, says):
    found = find_warnings(ranks, needs)
    assert len(found) == (says is not None), found
    assert says is None or says in found[0]


def test_64_nodes_alike_are_one_row():
    ranks = cluster(64)
    ranks[17] = replace(ranks[17], free_shared_bytes=GIB)
    assert info.table(ranks) == [
        ("node[001-064]: 64", "4-259 (4 each)", "1-64", "16, 4 each", "0-3", "4", "cpu", "1.0 GiB")
    ]


def test_ranks_that_differ_have_rows_of_their_own():
    ranks = [*cluster(2), *on_gpus(cluster(1, 2, node="gpu", cores=ALL_CORES, cores_given=8), "ab")]
    ranks[0] = replace(ranks[0], threads=1)
    ranks[-1] = replace(ranks[-1], group=None)
    assert [row[:3] + row[3:7] for row in info.table(ranks)] == [
        ("node001", "4", "1", "4", "0", "1", "cpu"),
        ("node001", "5-7", "1", "12, 4 each", "1-3", "4", "cpu"),
        ("node002", "8-11", "2", "16, 4 each", "0-3", "4", "cpu"),
        ("gpu", "2", "1", "16, 8 given", "0", "4", "A100 (0)"),
        ("gpu", "3", "servers", "16, 8 given", "1", "4", "A100 (0)"),
    ]


MAPS = """\
7f00-7f01 r-xp 00000000 08:01 123  /opt/my libs/libucp.so.0.0.0
7f01-7f02 r--p 00001000 08:01 123  /opt/my libs/libucp.so.0.0.0
7f02-7f03 r-xp 00000000 08:01 124  /opt/my libs/libucs-1a2b.so.0
7f03-7f04 r-xp 00000000 08:01 125  /opt/my libs/ucx/libuct_ib.so.0 (deleted)
7f04-7f05 r-xp 00000000 08:01 126  /opt/my libs/ucx/libuct_cuda.so.0.0.0
7f05-7f06 rw-p 00000000 00:00 0
7f06-7f07 rw-p 00000000 00:00 0    [heap]
"""


def test_ucx_is_found_in_the_memory_map(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    assert mpi_library.ucx(maps) == ("of unknown version", ["cuda", "ib"])
    maps.write_text("\n".join(MAPS.splitlines()[2:]))
    assert mpi_library.ucx(maps) is None


OPEN_MPI = "Open MPI v5.0.11, package: Open MPI root@x Distribution, ident: 5.0.11, repo rev: v5.0.11, Oct 2026\0\0"
MPICH = """\
MPICH Version:      5.0.2
MPICH Release date: Fri Sep 25 20:45:26 UTC 2026
MPICH ABI:          18:2:6
MPICH Device:       ch4:ucx ofi
MPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker
MPICH CC:           cc
"""
MVAPICH = """\
MVAPICH2 Version      :\t2.3.7
MVAPICH2 Release date :\tWed March 02 22:00:00 EST 2022
MVAPICH2 Device       :\tch3:mrail
MVAPICH2 configure    :\t--prefix=/opt/mvapich2 --with-device=ch3:mrail
"""
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)\nMPI BUILD INFO : Sun Feb 26 2023\n"
INTEL = "Intel(R) MPI Library 2021.11 for Linux* OS\n"


@pytest.mark.parametrize(
    ("text", "version", "messages_by"),
    [
        (OPEN_MPI, "Open MPI v5.0.11", None),
        (MPICH, "MPICH 5.0.2", "ucx"),
        (MPICH.replace("ch4:ucx ofi", "ch4:ofi"), "MPICH 5.0.2", "ofi"),
        (MVAPICH, "MVAPICH2 2.3.7", "mrail"),
        (CRAY, "CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)", None),
        (INTEL, "Intel(R) MPI Library 2021.11 for Linux* OS", None),
        ("", "unknown", None),
    ],
)
def test_what_libraries_say_of_themselves_is_one_line(text, version, messages_by):
    assert mpi_library.version(text) == version
    assert mpi_library.is_open_mpi(version) is (text == OPEN_MPI)
    assert mpi_library.messages_by({}, text)[0] == messages_by


class Library:
    """The MPI tools interface of a library that has the control variables `names`."""

    def __init__(self, *names, status=0):
        self.names, self.status, self.is_open = names, status, False

    def MPI_T_init_thread(self, required, provided):
        self.is_open = self.status == 0
        return self.status

    def MPI_T_cvar_get_index(self, name, index):
        assert self.is_open
        return 0 if name.decode() in self.names else 73

    def MPI_T_finalize(self):
        self.is_open = False
        return 0


@pytest.mark.parametrize(
    ("library", "component"),
    [
        (Library("pml_ob1_priority", "pml_ucx_tls", "pml_base_verbose"), "ob1"),
        (Library("pml_ucx_priority"), "ucx"),
        (Library("pml_ucx_priority", "pml_ob1_priority"), None),
        (Library("MPIR_CVAR_CH4_NETMOD"), None),
        (Library("pml_ucx_priority", status=70), None),
    ],
)
def test_the_component_whose_variables_are_there_sends_messages(monkeypatch, library, component):
    monkeypatch.setattr(mpi_library, "_library", lambda: library)
    monkeypatch.setattr(mpi_library.MPI, "Get_library_version", lambda: OPEN_MPI)
    assert mpi_library.messages_by({})[0] == component
    assert not library.is_open


def test_another_network_module_may_be_asked_for():
    asked = mpi_library.messages_by({"MPIR_CVAR_CH4_NETMOD": "ofi"}, MPICH)
    assert asked == ("ofi", "MPIR_CVAR_CH4_NETMOD; the library's device is ch4:ucx ofi")
    assert mpi_library.messages_by({"MPIR_CVAR_CH4_NETMOD": ""}, MPICH)[0] == "ucx"


@pytest.mark.parametrize(
    ("messages_by", "says"),
    [("ucx", "and sends the messages"), ("ofi", "and does not send"), ("unknown", "and may send the messages")],
)
def test_info_tells_of_mpich_what_it_is(monkeypatch, messages_by, says):
    monkeypatch.setattr(mpi_library, "ucx", lambda: ("1.20.1", ["cma"]))
    versions = {"hpcavg": "0.1.0", "MPI": "MPICH 5.0.2", "messages by": messages_by, "UCX": "1.20.1"}
    text = "\n".join(info._of_software(replace(cluster()[0], versions=versions)))
    assert "\nMPICH 5.0.2, thread level " in text
    assert f"UCX: 1.20.1 is in this process {says}" in text
    assert "fault tolerance: none that hpcavg can use" in text
    assert "with-ft" not in text


def test_mpich_is_not_advised_on_options_of_open_mpi():
    ranks = cluster(cores=ALL_CORES, cores_given=64, numa_nodes=(0, 1), versions={"MPI": "MPICH 5.0.2"})
    shared, bound, numa = find_warnings(ranks, Needs(on_failure="shrink"))
    assert shared == "--on-failure shrink will be refused: it needs Open MPI"
    assert "mpirun -ppn 4 -bind-to core:16, srun --cpus-per-task=16" in bound
    assert "(mpirun -bind-to numa, srun" in numa
    assert not any("--map-by" in text or "ulfm" in text for text in (shared, bound, numa))


def test_settings_are_those_that_change_how_messages_travel():
    environ = {
        "FI_PROVIDER": "verbs",
        "MPIR_CVAR_CH4_NETMOD": "ofi",
        "UCX_TLS": "rc,sm",
        "OMPI_MCA_pml": "ucx",
        "OMPI_MCA_btl_tcp_if_include": "ib0",
    }
    others = {"OMPI_MCA_num_procs": "2", "OMPI_MCA_PREFIXES": "mca", "PATH": "/bin"}
    assert mpi_library.settings({**others, **environ}) == environ


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
home:/home /home nfs4 rw 0 0
lnet /scratch lustre rw,flock 0 0
tmpfs /scratch/tmp tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"), [("/scratch/me/run", "lustre"), ("/scratch/tmp/run", "tmpfs"), ("/scratchy", "ext4")]
)
def test_the_file_system_of_a_folder_that_is_not_there_yet(tmp_path, path, kind):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert file_system_of(Path(path), mounts) == kind
    assert file_system_of(Path(path), tmp_path / "none") is None


def test_a_plan_counts_what_a_node_shares():
    def rows(**options):
        needs = find_needs(Config(**options), 1)
        return needs.copies_per_rank, needs.copies_per_node

    assert rows() == (1, 0)
    assert rows(on_failure="shrink") == (1, 2)
    assert rows(algorithm="dasgd") == (2, 0)
    assert rows(algorithm="slowmo") == (1, 0)
    assert rows(algorithm="sync_sgd", variant="gradients") == (2, 0)


def test_a_model_is_measured_without_being_built(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom hpcavg.tasks import Task\n"
        "def huge(config):\n    return Task('huge', lambda: torch.nn.Linear(10**6, 10**6), None)\n"
        "def broken(config):\n    raise RuntimeError('no such luck')\n"
    )
    sys.modules.pop("hpcavg_task_mine", None)
    for dtype, num_bytes in (("float32", 4), ("float64", 8)):
        config = Config(task=f"{file}:huge", dtype=dtype)
        assert model_bytes(config, build_without_memory(config)) == num_bytes * (10**12 + 10**6)
    num_bytes, size, how = info._model_size(Config(task=f"{file}:broken"), 2)
    assert (num_bytes, how) == (0, [])
    assert size.startswith(f"unknown size: --task {file}:broken: must be a task that does not raise")
    assert size.endswith("RuntimeError: no such luck")


@pytest.mark.parametrize(
    ("model", "options", "start"),
    [
        ("cnn", {}, "learners of a rank compute all at once"),
        ("nin", {}, "learners of a rank compute one after the other: the model has dropout"),
        ("nin", {"stacked_randomness": "fast"}, "learners of a rank compute all at once"),
    ],
)
def test_how_several_learners_of_a_rank_compute(model, options, start):
    config = Config(model=model, task="synthetic", **options)
    num_bytes, size, (how,) = info._model_size(config, 3)
    assert size == f"{num_bytes / 1e6:.3g} MB, {3 * num_bytes / 1e6:.3g} MB in each rank"
    assert how.startswith(start)
    assert info._model_size(config, 1)[2] == []


def test_ranks_with_several_learners_need_the_memory_of_all():
    config = Config(algorithm="dasgd")
    assert find_needs(config, 3).copies_per_rank == 6  # each also has a mean in flight
    ranks = [RankInventory("a", number, num_learners=3) for number in range(2)]
    needs = Needs(intended_learners=4)
    assert "the options are meant for 4 learners, not 6" in find_warnings(ranks, needs)
