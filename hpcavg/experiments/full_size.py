"""Experiments at the papers' size: sweep files from the recipes, and a table of the finished runs of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcavg.config import recipes
from hpcavg.config.options import CONFIG_FILE
from hpcavg.config.sources import from_sources, read_toml
from hpcavg.errors import reason
from hpcavg.experiments.experiment import Experiment
from hpcavg.results import summary
from hpcavg.utils import files
from hpcavg.utils.streams import print_error
from hpcavg.utils.text import counted

# They follow from the ranks that a job has.
_BY_JOB = ("intended_learners", "learners")


@dataclass(frozen=True)
class Arm:
    """The runs of a recipe, or of one of its variations, which differ in their seeds.

    Attributes
    ----------
    recipe : its name.
    variation : options beside the recipe's, as texts.
    """

    recipe: str
    variation: Mapping[str, str]

    @property
    def name(self) -> str:
        """The recipe, with what varies."""
        return ", ".join([self.recipe, *(f"{key} = {value}" for key, value in self.variation.items())])

    def options(self) -> dict[str, Any]:
        """Return all options of its runs, as a TOML file gives them back."""
        options = from_sources(self.recipe, self.variation).as_toml()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}

    def line(self, seed: int) -> str:
        """Return the line of a sweep file. With any number of ranks that divides it, the learners are the paper's."""
        config = from_sources(self.recipe, self.variation)
        options = {"config": self.recipe, **self.variation}
        if config.rule().server is None:  # otherwise the ranks of the job decide
            options["learners"] = str(config.run.intended_learners)
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in {**options, "seed": seed}.items())

    def fixed(self) -> dict[str, Any]:
        """Return the options that the recipe and its variation set, but for the learners, which a job's ranks are."""
        given = {*read_toml(recipes.find(self.recipe)), *self.variation} - {*_BY_JOB}
        return {name: value for name, value in self.options().items() if name in given}


@dataclass(frozen=True)
class Finished:
    """What is finished of an experiment at the paper's size.

    Attributes
    ----------
    accuracies : of each arm, the test accuracies by seed.
    seeds : number of seeds that were asked for.
    """

    accuracies: Mapping[str, Mapping[int, float]]
    seeds: int

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """The rows of a table: arm, seeds that are done, test accuracy in percent, seeds that are missing."""
        rows = []
        for arm, by_seed in self.accuracies.items():
            values = 100 * np.array(list(by_seed.values()))
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            missing = ", ".join(str(seed) for seed in range(self.seeds) if seed not in by_seed)
            rows.append(
                (arm, str(len(values)), f"{values.mean():.2f}{spread}" if len(values) else "", missing or "none")
            )
        return rows

    def __str__(self) -> str:
        missing = sum(seed not in by_seed for by_seed in self.accuracies.values() for seed in range(self.seeds))
        wanted = counted(self.seeds * len(self.accuracies), "run")
        return f"{missing} of {wanted} are missing" if missing else f"all of {wanted} are there"


HEADS = ("arm", "seeds", "test accuracy, %", "seeds that are missing")
"""The heads of the columns of `Finished.rows`."""


def arms(experiment: Experiment) -> list[Arm]:
    """Return the arms of an experiment's recipes, each once. A recipe is itself one unless a variation equals it."""
    found: list[tuple[dict[str, Any], Arm]] = []
    for recipe in experiment.recipes:
        for variation in (*recipes.variations(recipe), {}):
            arm = Arm(recipe, variation)
            options = arm.options()
            if options not in [known for known, _ in found]:
                found.append((options, arm))
    return [arm for _, arm in found]


def write_sweep(folder: Path, experiment: Experiment, seeds: int) -> tuple[Path, int]:
    """Write the sweep file of an experiment for the job scripts; return its path and the number of its lines."""
    lines = [arm.line(seed) for arm in arms(experiment) for seed in range(seeds)]
    path = folder / f"{experiment.name}.txt"
    files.replace_file(path, ["".join(f"{line}\n" for line in lines).encode()])
    return path, len(lines)


def collect(folder: Path, experiments: Sequence[Experiment], seeds: int) -> dict[str, Finished]:
    """Return what is finished of the experiments that have recipes, by their names, of all runs under `folder`."""
    runs = _runs(folder)
    found = {}
    for experiment in experiments:
        if experiment.recipes:
            accuracies: dict[str, dict[int, float]] = {}
            for arm in arms(experiment):
                fixed, learners = arm.fixed(), arm.options()["intended_learners"]
                accuracies[arm.name] = {
                    about["seed"]: about["test_accuracy"]
                    for options, about in runs
                    if all(options.get(name) == value for name, value in fixed.items())
                    and about["num_learners"] == learners
                }
            found[experiment.name] = Finished(accuracies, seeds)
    return found


def _runs(folder: Path) -> list[tuple[dict[str, Any], summary.Summary]]:
    """Return options and summary of all finished runs, in the order of their folders."""
    found = [_finished_run(path.parent) for path in sorted(folder.rglob(summary.FILE))]
    return [run for run in found if run is not None]


def _finished_run(folder: Path) -> tuple[dict[str, Any], summary.Summary] | None:
    try:
        about = summary.read(folder)
        return (read_toml(folder / CONFIG_FILE), about) if about["completed"] else None
    except (OSError, ValueError) as error:
        print_error(f"hpcavg: warning: {folder} is left out: {reason(error)}")
        return None
