"""``python -m hpcavg report DIR ...``: the table of one or several runs, and their curves on one plot."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from hpcavg.config import sources
from hpcavg.config.options import CONFIG_FILE
from hpcavg.errors import InputError, UsageError, reason
from hpcavg.results import curves, summary, view
from hpcavg.results.curves import Curves
from hpcavg.results.run_lock import owners
from hpcavg.results.summary import PARTS
from hpcavg.utils import files
from hpcavg.utils.format_version import NewerFormatError
from hpcavg.utils.text import counted, printable

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class _Run:
    """A folder that is reported.

    Parameters
    ----------
    path : Path
        The folder.
    known : mapping
        The run's `Summary`, or as many of its fields as config.toml and metrics contain, with a ``state``; empty if
        the folder holds no run.
    curves : Curves or str
        The curves, or why there are none.
    faults : sequence of str
        What is wrong with the run.
    """

    path: Path
    known: Mapping[str, Any]
    curves: Curves | str
    faults: Sequence[str]

    @property
    def label(self) -> str:
        state = self.known.get("state") or self.known["algorithm"].replace("_", "-")
        # Matplotlib takes what is between dollars for mathematics.
        return printable(f"{self.path.name}: {state}", 60).replace("$", r"\$")


def main(folders: Sequence[str], output: str | None) -> None:
    """Print the table of the runs in `folders`, and a line for each that something is wrong with; draw their curves.

    Parameters
    ----------
    folders : sequence of str
        The runs, also unfinished and damaged ones.
    output : str or None
        The image; None: ``curves.png`` in the first of the folders.

    Raises
    ------
    InputError
        If nothing can be shown of any folder, or `output` cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    runs = [_look(path, found) for path, found in zip(paths, curves.read(paths), strict=True)]
    shown = [run for run in runs if run.known]
    if not shown:
        more = f" (and {len(runs) - 1} more)" if len(runs) > 1 else ""
        why = "; ".join(runs[0].faults)
        raise UsageError(f"DIR {printable(runs[0].path)}{more}: must be the folder of a run: {why}")
    drawn = [run for run in shown if isinstance(run.curves, Curves)]
    target = Path(output) if output else drawn[0].path / "curves.png" if drawn else None
    last = None
    if target is not None:
        try:
            plot(shown, target)
            last = f"curves: {target}"
        except InputError as error:
            if output:
                raise
            last = f"no curves: {error.as_option()}"
    summary.show([(run.path, run.known) for run in shown])
    for run in runs:
        if run.faults:
            print(printable(f"{run.path}: {'; '.join(run.faults)}", 1000))
    if last is not None:
        print(printable(last, 1000))


def _look(path: Path, found: Curves | str) -> _Run:
    """Return the run in the folder `path`, whose curves are `found`."""
    try:
        there = os.listdir(path)
    except (OSError, ValueError) as error:
        return _Run(path, {}, found, [f"no folder ({reason(error)})"])
    if not {summary.FILE, "metrics"} & set(there):
        return _Run(path, {}, found, ["no run: neither summary.json nor metrics is in it"])
    faults = [found] if isinstance(found, str) else []
    if summary.FILE in there:
        try:
            known = summary.read(path)
        except (OSError, NewerFormatError) as error:
            state = "newer" if isinstance(error, NewerFormatError) else "damaged"
            return _unfinished(path, found, state, [f"{summary.FILE}: {reason(error)}", *faults])
        except ValueError as error:
            return _unfinished(path, found, "damaged", [str(error), *faults])
        later = [f"{owner} goes on with it, or was killed; this is its summary of before" for owner in owners(path)[:1]]
        return _Run(path, {**known}, found, [*later, *faults, *_other_ranks(path, found, known["num_ranks"])])
    so_far = "" if isinstance(found, str) else f", {counted(found.known['steps'], 'step')} so far"
    return _unfinished(path, found, "unfinished", [f"unfinished{so_far}", *faults])


def _unfinished(path: Path, found: Curves | str, state: str, faults: Sequence[str]) -> _Run:
    """Return a run without a usable summary, from its options and metrics."""
    configured: dict[str, Any] = {}
    try:
        options = sources.read_toml(path / CONFIG_FILE)
        configured = {name: options[name] for name in ("algorithm", "task") if isinstance(options.get(name), str)}
    except (OSError, ValueError, RecursionError) as error:
        faults = [*faults, f"{CONFIG_FILE}: {reason(error)}"]
    known = {**configured, **({} if isinstance(found, str) else found.known)}
    return _Run(path, {**known, "state": state} if known else {}, found, faults)


def _other_ranks(path: Path, found: Curves | str, num_ranks: int) -> list[str]:
    """Return lines about ranks whose metrics are missing, and about metrics of ranks that the summary lacks."""
    if isinstance(found, str):
        return []
    there = view.rank_files(path / "metrics")
    last = max((segment for _, segment in there), default=0)  # a run may have had more ranks before it was resumed
    more = sorted(rank for rank, segment in there if segment == last and rank >= num_ranks)
    known = {rank for rank, _ in there if rank < num_ranks}
    missing = num_ranks - len(known)
    lines = []
    if missing:
        first = next(rank for rank in range(len(known) + 1) if rank not in known)
        lines.append(f"no metrics of {counted(missing, 'rank')}, first of rank {first}")
    if more:
        lines.append(f"metrics of {counted(len(more), 'rank')} that its summary lacks, first of rank {more[0]}")
    return lines


def plot(runs: Sequence[_Run], target: Path) -> None:
    """Draw training loss, test loss, test accuracy and the parts of the wall time; write the image to `target`."""
    image = io.BytesIO()
    figure, panels = plt.subplots(1, 4, figsize=(18, 4.6), layout="constrained")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters that the font lacks, and axes without a curve
            _draw(runs, figure, panels)
            figure.savefig(image, dpi=120, format=target.suffix[1:] or "png")
        files.replace_file(target, [image.getvalue()])
    except (OSError, ValueError) as error:
        raise InputError("output", target, f"a file that can be written ({reason(error)})") from error
    finally:
        plt.close(figure)


def _draw(runs: Sequence[_Run], figure: Any, panels: Any) -> None:
    losses, test_losses, accuracies, times = panels
    for number, run in enumerate(runs, 1):
        if isinstance(run.curves, Curves):
            step, loss, epoch, *scores = map(_drawable, astuple(run.curves)[1:])
            losses.plot(step, loss, label=f"{number}  {run.label}")  # a label that begins with _ would be in no legend
            for axes, score in zip((test_losses, accuracies), scores, strict=True):
                axes.plot(epoch, score, marker=".")
    finished = {str(number): run.known for number, run in enumerate(runs, 1) if "wall_s" in run.known}
    lefts = np.zeros(len(finished))
    for name, label in PARTS.items():
        seconds = np.nan_to_num(_drawable([known[name] for known in finished.values()]))
        times.barh(list(finished), seconds, left=lefts, label=label)
        lefts += seconds
    rest = _drawable([known["wall_s"] for known in finished.values()]) - lefts
    times.barh(list(finished), np.nan_to_num(rest).clip(min=0), left=lefts, label="other", color="lightgray")
    losses.set(xlabel="step", ylabel="training loss, mean over learners", yscale="log")
    test_losses.set(xlabel="epoch", ylabel="test loss of the mean model", yscale="log")
    accuracies.set(xlabel="epoch", ylabel="test accuracy of the mean model")
    times.set(xlabel="seconds, mean over learners", ylabel="run")
    times.invert_yaxis()
    times.legend(fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", fontsize="small")


def _drawable(values: Any) -> Any:
    """Return `values` with NaN for those that no axis can span: of a run that diverged, or a damaged file."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(numbers) < 1e100, numbers, np.nan)
