"""What the suite runs: for every preset a table of benchmarks and their options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A choice of sizes and repeats.

    Attributes
    ----------
    deadline_s : seconds after which a benchmark is ended. runs : by the name of a run, which its files have too, the
        module of ``benchmarks`` and its options.
    """

    deadline_s: float
    runs: dict[str, str]


PRESETS = {
    # A minute: whether everything runs here. Its figures mean nothing.
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
    # Some minutes on a workstation: shows that all is well, and large differences.
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
    # What one would publish: about an hour on a cluster.
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
}

# Options of the suite that it hands on, and the modules that take them.
HANDED_ON = {"wire_gbit": ("mean",), "interface": ("mean", "training")}

LEFT_OUT = {
    "soak": "kills ranks and checks the survivors: it measures recoveries, not speed",
    "imagenet_pipeline": "measures how one core makes batches, which has nothing to do with ranks",
    "cluster": "emulates the nodes that a benchmark runs on",
    "suite": "is what runs the others",
    "compare": "compares what they have left",
    "many_tensors": "looks for what looking after 100,000 tensors costs, which is no way that models are",
    "recipes": "shows that the recipes run, for two steps each: it measures nothing",
}
"""Modules that can be run and are no part of the suite, and why."""
