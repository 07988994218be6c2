"""The presets of the suite: each is a table of benchmarks and their options."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A choice of sizes and repeats.

    Attributes
    ----------
    deadline_s : a benchmark is ended after this many seconds.
    runs : for each run the module of ``benchmarks`` and its options. Files have the name of the run.
    clusters : for each run on emulated nodes the options of `benchmarks.cluster`.
    """

    deadline_s: float
    runs: dict[str, str]
    clusters: dict[str, str] = field(default_factory=dict)


_SLOTS = {"2x1": "1,1", "2x2": "2,2", "4x1": "1,1,1,1"}
_RATES = {"1gbit": " --rate 1gbit", "10gbit": " --rate 10gbit", "no-limit": ""}
_CLUSTERS = {
    f"{nodes}-{rate}": f"--yield --slots {slots}{option}"
    for nodes, slots in _SLOTS.items()
    for rate, option in _RATES.items()
}

PRESETS = {
    # A minute: does everything run here? Its figures mean nothing.
    "tiny": Preset(
        deadline_s=300,
        runs={
            "mean": "mean --bytes 1024 1000000 --repeats 3",
            "overlap": "overlap --bytes 40000 --repeats 2",
            "training": "training --seconds 0.01 --repeats 1 --max-epochs 1 --algorithms hier_avg dasgd"
            " --k1 2 --k2 4 --tau 4 --delay 2",
            "scaling": "scaling --seconds 0.01 --repeats 1 --parameters 1e4 --algorithms k-avg",
            "memory": "memory --parameters 1e6 --algorithms k_avg dasgd",
            "own_pace": "own_pace --seconds 0.2 --budget-s 0.1",
            "step_overhead": "step_overhead --rounds 2 --calls 2",
            "data_pipeline": "data_pipeline --batch-sizes 128 --images 5000 --repeats 2",
            "compare_algorithms": "compare_algorithms --only k_avg --at-least 0.1 --epochs 1",
        },
    ),
    # Some minutes on a workstation: shows large differences.
    "quick": Preset(
        deadline_s=300,
        runs={
            "mean": "mean --bytes 1024 65536 1048576 44700000 --repeats 31 --seconds 4",
            "overlap": "overlap --bytes 4000000 --repeats 7",
            "training": "training --seconds 0.4 --repeats 6 --algorithms k_avg hier_avg dasgd",
            "scaling": "scaling --seconds 0.2 --repeats 6 --algorithms sgd hier_avg",
            "memory": "memory --parameters 5e6 --algorithms k_avg hier_avg dasgd slowmo",
            "own_pace": "own_pace --seconds 3",
            "step_overhead": "step_overhead --rounds 40 --calls 20",
            "data_pipeline": "data_pipeline",
            "compare_algorithms": "compare_algorithms --only sync_sgd hier_avg dasgd --at-least 0.9 --epochs 5",
        },
    ),
    # For publication: about an hour on a cluster.
    "full": Preset(
        deadline_s=3600,
        runs={
            "mean": "mean --max-bytes 1.1e9 --seconds 60",
            "overlap": "overlap --bytes 44700000 --repeats 31",
            "overlap-4MB": "overlap --bytes 4000000 --repeats 51",
            "training": "training --repeats 15",
            "training-mlp": "training --model mlp --seconds 10 --repeats 7 --k 32 --k1 4 --k2 32 --tau 32 --delay 16",
            "scaling": "scaling --parameters 2e7 --seconds 3 --repeats 7",
            "memory": "memory --engines auto mpi",
            "own_pace": "own_pace --seconds 30",
            "step_overhead": "step_overhead",
            "data_pipeline": "data_pipeline --repeats 51",
            "compare_algorithms": "compare_algorithms",
        },
    ),
    # About 5 minutes on a workstation, as root: means between emulated nodes, whatever ranks and launcher.
    "nodes": Preset(
        deadline_s=300,
        runs=dict.fromkeys(
            _CLUSTERS,
            "mean --bytes 1024 16384 65536 262144 1048576 4194304 44700000 --repeats 31 --seconds 15"
            " --only 'hpcavg auto' 'hpcavg mpi' 'hpcavg twolevel' 'MPI Allreduce' 'lane Allreduce'",
        ),
        clusters=_CLUSTERS,
    ),
}

# Options of the suite that it passes on, and the modules that take them.
HANDED_ON = {"wire_gbit": ("mean",), "interface": ("mean", "training")}

LEFT_OUT = {
    "soak": "kills ranks and checks the survivors: it measures recoveries, not speed",
    "imagenet_pipeline": "measures how one core makes batches; ranks do not matter",
    "cluster": "emulates the nodes that a benchmark runs on",
    "suite": "runs the others",
    "compare": "compares the results of suites",
    "many_tensors": "measures the cost of 100,000 tensors, which no usual model has",
    "learners": "compares many learners in one rank with a loop; other ranks do not matter",
    "stub_wire": "measures Python on one rank; a network makes no difference",
    "recipes": "shows that the recipes run, for two steps each; it measures nothing",
}
"""Modules that can be run but are not in the suite, and why."""
