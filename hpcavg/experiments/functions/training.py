"""Training runs: options of ``python -m hpcavg``, and what the run's records hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.config.options import Config
from hpcavg.errors import SickLearnersError
from hpcavg.experiments.run import Result, Run
from hpcavg.utils.exit_status import ExitStatus

if TYPE_CHECKING:
    from mpi4py import MPI

# Of a curve of losses by step.
_POINTS = 200
_EVALUATED = ("epoch", "step", "train_loss", "test_loss", "test_accuracy", "learner_test_loss", "learner_test_accuracy")
_SUMMARISED = (
    "steps",
    "samples",
    "train_loss",
    "test_loss",
    "test_accuracy",
    "learner_test_accuracy",
    "global_averages",
    "local_averages",
    "exchanges",
    "staleness_mean",
    "bytes_averaged",
    "wall_s",
    "compute_s",
    "averaging_blocked_s",
)


def training(seed: int, work: float = 1.0, **options: Any) -> Run:
    """Return a training run.

    Parameters
    ----------
    seed : of initial parameters, shuffles and learners.
    work : how long it takes, compared to other runs.
    **options : of ``python -m hpcavg``, with underscores, as values or texts.

    Examples
    --------
    >>> from hpcavg.experiments.functions.training import training
    >>> run = training(seed=1, algorithm="k-avg", k=4, learners=16, task="digits", model="mlp", epochs=2)
    >>> run.function, run.options["seed"]
    ('training:train', 1)
    """
    return Run("training:train", {**options, "seed": seed}, work)


def train(comm: MPI.Intracomm, folder: Path, **options: Any) -> Result:
    """Train as ``python -m hpcavg`` does; return the curves and the summary. Collective over `comm`.

    Parameters
    ----------
    comm : the ranks of the run. With an algorithm that has servers, only the first of them computes.
    folder : of the run's records.
    **options : see `training`.

    Returns
    -------
    Result
        ``summary`` has numbers at the end; ``evaluations`` has lists with a value for each epoch; ``steps`` has lists
        ``step`` and ``loss``, the mean over the learners, of at most 200 points; ``distances`` has lists ``step`` and
        ``consensus_distance``, those of the global means. ``has_diverged`` says that the run ended early because the
        parameters of all learners, or of one with servers, were not finite: the summary then is that of the last
        evaluation.
    """
    from mpi4py import MPI  # here, because lists of experiments import this module

    from hpcavg.results import summary
    from hpcavg.training.trainer import Trainer

    config = Config(**options, output=str(folder), threads=1, device="cpu")
    if config.rule().server is not None:  # servers are simulated on one rank
        if comm.Get_rank() != 0:
            return {}
        comm = MPI.COMM_SELF
    has_diverged = False
    trainer = Trainer(config, comm)
    try:
        status = trainer.train()
    except SickLearnersError:
        trainer.topology.free()
        has_diverged = True
    else:
        if status != ExitStatus.DONE:
            raise RuntimeError(f"it ended with status {int(status)}: {status.meaning}")
    if comm.Get_rank() != 0:
        return {}
    evaluations = _evaluations(folder / "metrics")
    at_end: dict[str, Any] = {name: values[-1] for name, values in evaluations.items() if values}
    if not has_diverged:
        found = summary.read(folder)
        at_end = {name: found[name] for name in _SUMMARISED}  # type: ignore[literal-required]
    return {
        "has_diverged": has_diverged,
        "summary": at_end,
        "evaluations": evaluations,
        "steps": _losses(folder / "metrics"),
        "distances": _distances(folder / "metrics"),
    }


def _read(metrics: Path, table: str) -> Any:
    from hpcavg.results.view import read_view

    return read_view(metrics, table)


def _evaluations(metrics: Path) -> dict[str, list[float]]:
    columns = _read(metrics, "evaluation")
    times = columns["epoch"] >= 0  # every learner records the same; one that left early has fewer rows
    learner = times.sum(axis=1).argmax()
    return {name: columns[name][learner][times[learner]].tolist() for name in _EVALUATED}


def _losses(metrics: Path) -> dict[str, list[float]]:
    columns = _read(metrics, "step")
    loss = np.ma.masked_invalid(columns["loss"]).mean(axis=0).filled(np.nan)
    return {"step": _in_spans(columns["step"].max(axis=0)), "loss": _in_spans(loss)}


def _distances(metrics: Path) -> dict[str, list[float]]:
    columns = _read(metrics, "averaging")
    distance = np.ma.masked_invalid(columns["consensus_distance"]).mean(axis=0)
    is_there = ~np.ma.getmaskarray(distance)
    steps = columns["step"].max(axis=0, initial=0)
    return {"step": _in_spans(steps[is_there]), "consensus_distance": _in_spans(np.asarray(distance)[is_there])}


def _in_spans(values: NDArray[Any]) -> list[float]:
    """Return the means of short spans of equal length. A rest at the end is left out."""
    width = -(-len(values) // _POINTS) or 1
    usable = len(values) // width * width
    return values[:usable].reshape(-1, width).mean(axis=1).tolist()
