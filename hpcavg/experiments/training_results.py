"""What many experiments do with the results of training runs: read accuracies, draw curves, and make results up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcavg.experiments.experiment import Line, Plot, Results
from hpcavg.experiments.verdict import Comparison

SHARE_PERCENT = 5.0
"""A difference in losses, or in errors, up to which they count as alike. The paper of Hier-AVG calls 0.3 points of
accuracy at 94 % similar: a twentieth of the errors."""


def curves(results: Results, table: str, x: str, y: str) -> list[Line]:
    """Return a line for each arm.

    Parameters
    ----------
    results : of training runs.
    table : ``"evaluations"``, ``"steps"`` or ``"distances"``.
    x : the column for the horizontal axis, such as ``"epoch"``.
    y : the column for the vertical axis, such as ``"test_accuracy"``.
    """
    return [Line(arm, _longest(results.values_of(arm, table, x)), results.values_of(arm, table, y)) for arm in results]


def _longest(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the row with the most values. Those of runs that diverged are shorter."""
    return rows[np.isfinite(rows).sum(axis=1).argmax()]


def accuracy_plot(results: Results, title: str = "") -> Plot:
    """Return the plot of test accuracy against epochs."""
    return Plot(
        "accuracy", "epoch", "test accuracy", curves(results, "evaluations", "epoch", "test_accuracy"), title=title
    )


def made_up(accuracy: Mapping[str, float], loss: Mapping[str, float] | None = None, seeds: int = 5) -> Results:
    """Return made-up results of training runs, for `Experiment.pretend`.

    Parameters
    ----------
    accuracy : by arm, the final test accuracy, about which seeds vary by a thousandth.
    loss : by arm, the final training loss, about which seeds vary by a hundredth of it; 1 if left out.
    seeds : number of seeds.
    """
    generator = np.random.default_rng(0)
    by_arm: dict[str, Sequence[dict[str, Any]]] = {}
    for arm, mean in accuracy.items():
        runs = []
        for noise in generator.normal(0, 1, seeds):
            final, final_loss = mean + 1e-3 * noise, (loss or {}).get(arm, 1.0) * (1 + 1e-2 * noise)
            curve = {"epoch": [1, 2], "step": [10, 20], "test_accuracy": [0.1, final], "train_loss": [2.3, final_loss]}
            curve |= {"test_loss": curve["train_loss"]}
            summary = {"test_accuracy": final, "train_loss": final_loss, "test_loss": final_loss}
            steps = {"step": [10, 20], "loss": [2.3, final_loss]}
            distances = {"step": [10, 20], "consensus_distance": [1.0, 0.1]}
            runs.append(
                {
                    "has_diverged": False,
                    "summary": summary,
                    "evaluations": curve,
                    "steps": steps,
                    "distances": distances,
                }
            )
        by_arm[arm] = runs
    return Results(by_arm)


def number_in(arm: str, name: str) -> float:
    """Return the number of a name in the name of an arm.

    Examples
    --------
    >>> from hpcavg.experiments.training_results import number_in
    >>> number_in("P = 8, T = 512", "T")
    512.0
    """
    found = re.search(rf"\b{re.escape(name)} = ([\d.]+)", arm)
    if found is None:
        raise ValueError(f"{arm} has no {name}")
    return float(found[1])


def log_slopes(x: ArrayLike, values: ArrayLike) -> NDArray[Any]:
    """Return the slopes of log(values) against log(x), by least squares: one for each seed.

    Parameters
    ----------
    x : shape (points,).
    values : shape (seeds, points).

    Examples
    --------
    >>> from hpcavg.experiments.training_results import log_slopes
    >>> log_slopes([1, 2, 4], [[8, 4, 2], [1, 1, 1]])
    array([-1.,  0.])
    """
    logs = np.log2(np.asarray(x, float))
    logs -= logs.mean()
    return np.log2(np.asarray(values, float)) @ logs / (logs @ logs)


def times_to(levels: ArrayLike, times: ArrayLike, values: ArrayLike) -> NDArray[Any]:
    """Return when falling curves first reach their levels, by linear interpolation: one time for each seed.

    A level that is never reached counts as reached after twice the time.

    Parameters
    ----------
    levels : shape (seeds,).
    times : shape (points,), or (seeds, points).
    values : shape (seeds, points). NaN is above every level.

    Examples
    --------
    >>> from hpcavg.experiments.training_results import times_to
    >>> times_to([3.0, 1.0], [0, 10, 20], [[8, 4, 2], [4, 3, 2]])
    array([15., 40.])
    """
    curves_of = np.nan_to_num(np.asarray(values, float), nan=np.inf)
    times_of = np.broadcast_to(np.asarray(times, float), curves_of.shape)
    found = []
    for level, time, curve in zip(np.asarray(levels, float), times_of, curves_of, strict=True):
        (reached,) = np.nonzero(curve <= level)
        if not len(reached):
            found.append(2.0 * time[-1])
        elif reached[0] == 0 or not np.isfinite(curve[reached[0] - 1]):
            found.append(time[reached[0]])
        else:
            ends = [reached[0], reached[0] - 1]
            found.append(np.interp(level, curve[ends], time[ends]))
    return np.array(found, float)


def side_by_side(*tables: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return tables of `hpcavg.experiments.experiment.table_of` as one, whose arms are the same.

    Examples
    --------
    >>> from hpcavg.experiments.training_results import side_by_side
    >>> side_by_side([["K = 1", "91.0"]], [["K = 1", "0.3"]])
    [['K = 1', '91.0', '0.3']]
    """
    return [[rows[0][0], *(row[1] for row in rows)] for rows in zip(*tables, strict=True)]


def at_end(results: Results, name: str, diverged: float) -> dict[str, NDArray[Any]]:
    """Return a number of the summaries: by arm, one for each seed.

    Parameters
    ----------
    results : of training runs.
    name : its name, such as ``"test_loss"``.
    diverged : what counts as the number of runs that diverged.
    """
    found = {}
    for arm in results:
        values, has_diverged = results.values_of(arm, "summary", name), results.values_of(arm, "has_diverged")
        found[arm] = np.where((has_diverged == 0) & np.isfinite(values), values, diverged)
    return found


def less(what: str, values: ArrayLike, than: ArrayLike, margin: float = -SHARE_PERCENT) -> Comparison:
    """Return the comparison by how many percent `values` are less than others, seed by seed.

    Parameters
    ----------
    what : names the difference.
    values : losses or errors, one for each seed.
    than : those they are compared with.
    margin : in percent; the default says "not much more".

    Examples
    --------
    >>> from hpcavg.experiments.training_results import less
    >>> less("loss of K = 4: less than that of K = 1", [1.5, 3.0], [2.0, 4.0]).mean
    25.0
    """
    percent = 100 * (1 - np.asarray(values, float) / np.asarray(than, float))
    return Comparison(what, percent.tolist(), margin, " %")


def more(what: str, values: ArrayLike, than: ArrayLike, margin: float = SHARE_PERCENT) -> Comparison:
    """Return the comparison by how many percent `values` are above others, seed by seed; see `less`."""
    percent = 100 * (np.asarray(values, float) / np.asarray(than, float) - 1)
    return Comparison(what, percent.tolist(), margin, " %")
