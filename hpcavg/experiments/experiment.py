"""What an experiment is: a claim of a paper, the runs that test it, and the rule that judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import Judgement

PAPERS = {
    "hier-avg": "Hier-AVG: a distributed hierarchical averaging SGD algorithm (Zhou, Cong)",
    "k-avg": "K-AVG: On the Convergence Properties of a K-Step Averaging Stochastic Gradient Descent Algorithm for"
    " Nonconvex Optimization (Zhou, Cong)",
    "pr-sgd": "PR-SGD: Parallel Restarted SGD with Faster Convergence and Less Communication (Yu, Yang, Zhu)",
    "lupa-sgd": "LUPA-SGD: Local SGD with Periodic Averaging: Tighter Analysis and Adaptive Synchronization"
    " (Haddadpour, Kamani, Mahdavi, Cadambe)",
    "dasgd": "DaSGD: Squeezing SGD Parallelization Performance in Distributed Training Using Delayed Averaging",
}
"""The papers, by the names of their recipes."""


class Results(Mapping[str, Sequence[Result]]):
    """The results of an experiment: of each arm, one for each seed, in the order of the seeds.

    Examples
    --------
    >>> from hpcavg.experiments.experiment import Results
    >>> results = Results({"K = 1": [{"summary": {"test_accuracy": 0.9}}, {"summary": {"test_accuracy": 0.8}}]})
    >>> results.values_of("K = 1", "summary", "test_accuracy")
    array([0.9, 0.8])
    """

    def __init__(self, by_arm: Mapping[str, Sequence[Result]]) -> None:
        self._by_arm = dict(by_arm)

    def __getitem__(self, arm: str) -> Sequence[Result]:
        return self._by_arm[arm]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._by_arm)

    def __len__(self) -> int:
        return len(self._by_arm)

    def values_of(self, arm: str, *path: str) -> NDArray[Any]:
        """Return a value of all seeds, as an array of shape (seeds, ...); NaN for what a run does not have.

        Parameters
        ----------
        arm : one of the arms.
        *path : the keys that lead to the value in a `Result`. Lists shorter than the longest one end with NaN.
        """
        found: list[Any] = []
        for result in self[arm]:
            value: Any = result
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            found.append(value)
        length = max((len(value) for value in found if isinstance(value, list)), default=None)
        if length is not None:
            rows = [value if isinstance(value, list) else [] for value in found]
            found = [row + [None] * (length - len(row)) for row in rows]
        return np.array(found, float)


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes
    ----------
    seeds : number of seeds; the runs of all arms use the same ones.
    is_quick : everything is shrunk to seconds. It shows that an experiment works, not what it finds.
    """

    seeds: int = 5
    is_quick: bool = False

    def pick(self, full: Any, quick: Any) -> Any:
        """Return one of two values."""
        return quick if self.is_quick else full


@dataclass(frozen=True)
class Line:
    """A line of a plot, with a band: the confidence interval of the mean over the seeds.

    Attributes
    ----------
    label : its name.
    x : array of shape (points,).
    values : array of shape (seeds, points).
    """

    label: str
    x: ArrayLike
    values: ArrayLike


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes
    ----------
    name : of its file, in the experiment; a word.
    x_label : of the horizontal axis.
    y_label : of the vertical axis.
    lines : what it shows.
    is_x_log : the horizontal axis is logarithmic, with base 2.
    is_y_log : the vertical axis is logarithmic.
    title : above it.
    """

    name: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    is_x_log: bool = False
    is_y_log: bool = False
    title: str = ""


@dataclass(frozen=True)
class Finding:
    """What the runs of an experiment say.

    Attributes
    ----------
    judgement : the verdict, by the experiment's rule.
    heads : the heads of the table's columns.
    rows : the rows of the table.
    plots : the plots.
    diverged : how many runs diverged, by arm; arms without any are left out.
    """

    judgement: Judgement
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    plots: Sequence[Plot] = ()
    diverged: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A claim of a paper, the runs that test it, and the rule that judges them. The rule comes before the runs.

    Attributes
    ----------
    name : its name, with hyphens: the algorithm, and the figure, table or theorem.
    paper : a key of `PAPERS`.
    where : section and figure, table or theorem.
    claim : what the paper claims, in our words.
    saw : what the paper saw, with its numbers.
    rule : in words, when the claim holds and when it does not.
    scaling : what scaling down changes, in one sentence.
    arms : returns, for a scale, the arms by name; each returns the run of a seed.
    judge : returns the finding of results; of the arms of any scale.
    pretend : returns made-up results for which the rule must say that the claim holds, or that it does not. They show
        that the rule can say either.
    recipes : the recipes of the same experiment at the paper's size, of `hpcavg.config.recipes`; none for theorems.
    """

    name: str
    paper: str
    where: str
    claim: str
    saw: str
    rule: str
    scaling: str
    arms: Callable[[Scale], Mapping[str, Callable[[int], Run]]]
    judge: Callable[[Results], Finding]
    pretend: Callable[[bool], Results]
    recipes: Sequence[str] = ()

    def runs(self, scale: Scale) -> dict[str, list[Run]]:
        """Return the runs of each arm, one for each seed."""
        return {arm: [make(seed) for seed in range(scale.seeds)] for arm, make in self.arms(scale).items()}

    def find(self, results: Results) -> Finding:
        """Return the finding of results, with the numbers of runs that diverged."""
        counts = {arm: sum(bool(run.get("has_diverged")) for run in runs) for arm, runs in results.items()}
        return replace(self.judge(results), diverged={arm: count for arm, count in counts.items() if count})


def table_of(values: Mapping[str, ArrayLike], digits: int = 1, factor: float = 1.0) -> list[list[str]]:
    """Return a row for each arm: its name, and mean and deviation over the seeds.

    Parameters
    ----------
    values : by arm, a value for each seed.
    digits : after the point.
    factor : by which values are multiplied, such as 100 for percent.

    Examples
    --------
    >>> from hpcavg.experiments.experiment import table_of
    >>> table_of({"K = 1": [0.90, 0.92]}, factor=100)
    [['K = 1', '91.0 ± 1.4']]
    """
    rows = []
    for arm, of_arm in values.items():
        scaled = factor * np.asarray(of_arm, float)
        deviation = f" ± {scaled.std(ddof=1):.{digits}f}" if len(scaled) > 1 else ""
        rows.append([arm, f"{scaled.mean():.{digits}f}{deviation}"])
    return rows
