"""The command ``paper``: carries out the papers' experiments, prints their verdicts and writes their page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hpcavg.errors import InputError, why
from hpcavg.experiments import registry
from hpcavg.experiments.cache import Cache
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.verdict import Verdict

if TYPE_CHECKING:
    from argparse import Namespace

    from mpi4py import MPI

    from hpcavg.experiments.full_size import Finished


def check(options: Namespace, num_ranks: int) -> None:
    """Raise `InputError` for what would be found out only after the runs."""
    if num_ranks % options.ranks_per_run:
        allowed = f"a divisor of the number of ranks, {num_ranks}"
        raise InputError("ranks_per_run", options.ranks_per_run, allowed)
    _make("cache", options.cache, Cache, "a folder that can be written, on a file system with locks")
    _make("page", options.page, lambda path: _make_folder(path.with_suffix("")), "a file that can be written")
    _make("full", options.full, _make_folder, "a folder that can be written")


def _make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def _make(option: str, value: str | None, make: Callable[[Path], object], allowed: str) -> None:
    try:
        if value is not None:
            make(Path(value))
    except OSError as error:
        raise InputError(option, value, f"{allowed} ({why(error)})") from error


def run(options: Namespace, world: MPI.Intracomm) -> None:
    """Carry out the experiments that `options` name. Collective over `world`.

    Raises
    ------
    AssertionError
        If the rule of an experiment can only say one thing. No run has been carried out then.
    RuntimeError
        If a run fails.
    """
    experiments = registry.chosen(options.names)
    is_first = world.Get_rank() == 0
    for experiment in experiments if is_first else ():
        check_rule(experiment)
    finished = None
    if options.full is not None and is_first:
        finished = show_full_size(Path(options.full), experiments, options.seeds)
    if options.full is not None and options.page is None:
        return
    scale = Scale(options.seeds, options.quick)
    runs = {experiment.name: experiment.runs(scale) for experiment in experiments}
    wanted = [run for arms in runs.values() for of_arm in arms.values() for run in of_arm]
    cache = Cache(Path(options.cache))
    if is_first:
        cache.remove_remains()
    if world.bcast(bool(cache.missing(wanted)) if is_first else None):
        from hpcavg.experiments.runner import carry_out  # torch

        carry_out(wanted, cache, world, options.ranks_per_run)
    if not is_first:
        return
    found = {}
    for experiment in experiments:
        results = {arm: [cache.get(run) for run in of_arm] for arm, of_arm in runs[experiment.name].items()}
        found[experiment.name] = experiment.find(Results(results))  # type: ignore[arg-type]
    show(experiments, found)
    if options.page is not None:
        from hpcavg.experiments import page

        page.write(Path(options.page), found, experiments, scale, finished)


def check_rule(experiment: Experiment) -> None:
    """Raise an error unless the rule of the experiment can say that the claim holds, and that it does not."""
    for holds, verdict in ((True, Verdict.HOLDS), (False, Verdict.FAILS)):
        said = experiment.judge(experiment.pretend(holds)).judgement.verdict
        if said is not verdict:
            raise AssertionError(
                f"the rule of {experiment.name} says {said.value!r} where it must say {verdict.value!r}"
            )


def show_full_size(folder: Path, experiments: list[Experiment], seeds: int) -> dict[str, Finished]:
    """Write the sweep files, print how to start them and what is finished, and return the latter."""
    from hpcavg.experiments import full_size

    finished = full_size.collect(folder, experiments, seeds)
    for experiment in experiments:
        if experiment.name not in finished:
            print(f"{experiment.name}: no recipe")
            continue
        path, num_lines = full_size.write_sweep(folder, experiment, seeds)
        print(f"{experiment.name}: {finished[experiment.name]}")
        print(f"    HPCAVG_RUNS={folder} HPCAVG_SWEEP={path} sbatch --array=1-{num_lines} jobs/sweep.sbatch")
    return finished


def show(experiments: list[Experiment], found: dict[str, Finding]) -> None:
    """Print the verdicts."""
    width = max(len(experiment.name) for experiment in experiments)
    for experiment in experiments:
        print(f"{experiment.name:{width}}  {found[experiment.name].judgement.verdict.value:14}  {experiment.claim}")
