"""``python -m hpcavg report DIR ...``: the table of one or several runs, and their curves on one plot."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from hpcavg import curves, files, metrics, summary
from hpcavg.curves import Curves
from hpcavg.errors import InputError, printable, reason

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class _Run:
    """A run's folder, its summary, None while it is unfinished, and its curves or why there are none."""

    path: Path
    summary: summary.Summary | None
    curves: Curves | str

    @property
    def label(self) -> str:
        state = "unfinished" if self.summary is None else self.summary["algorithm"].replace("_", "-")
        # Matplotlib takes what is between dollars for mathematics.
        return printable(f"{self.path.name}: {state}", 60).replace("$", r"\$")


def main(folders: Sequence[str], output: str | None) -> None:
    """Print the table of the runs in `folders` and write their curves as PNG to `output`.

    Of a run that is unfinished, the curves; of one whose metrics are damaged, the table and a warning. Raises
    `InputError` for a folder that holds no run, a damaged summary, and where nothing can be drawn.
    """
    paths = [Path(folder) for folder in folders]
    summaries = [_summary(path) for path in paths]
    runs = [_Run(*parts) for parts in zip(paths, summaries, curves.read(paths), strict=True)]
    if all(isinstance(run.curves, str) for run in runs):
        raise InputError("folder", paths[0], f"a run whose curves can be drawn: {runs[0].curves}")
    target = Path(output) if output else paths[0] / "curves.png"
    plot(runs, target)
    finished = [(run.path, run.summary) for run in runs if run.summary is not None]
    if finished:
        summary.show(finished)
    for run in runs:
        for line in _remarks(run):
            print(printable(line, 1000))
    print(printable(f"curves: {target}", 1000))


def _summary(path: Path) -> summary.Summary | None:
    """Return the run's summary, None where it has metrics and no summary yet."""
    try:
        unfinished = not (path / "summary.json").exists() and (path / "metrics" / metrics.VIEW).exists()
    except (OSError, ValueError) as error:
        raise InputError("folder", path, f"the folder of a run ({reason(error)})") from error
    return None if unfinished else summary.read(path)


def _remarks(run: _Run) -> list[str]:
    """Return what there is to say of a run beside its table."""
    if isinstance(run.curves, str):
        return [f"warning: {run.path}: {run.curves}"]
    if run.summary is None:
        return [f"{run.path} is unfinished: {summary.counted(run.curves.num_steps, 'step')} so far"]
    there = {rank for rank, _ in metrics.rank_files(run.path / "metrics")}
    missing = run.summary["num_ranks"] - len(there)
    if missing <= 0:
        return []
    first = next(rank for rank in range(len(there) + 1) if rank not in there)
    return [f"warning: {run.path} has no metrics of {summary.counted(missing, 'rank')}, first of rank {first}"]


def plot(runs: Sequence[_Run], target: Path) -> None:
    """Draw training loss by step, test loss and accuracy by epoch, and where the time went; write them to `target`."""
    figure, panels = plt.subplots(1, 4, figsize=(18, 4.6), layout="constrained")
    losses, test_losses, accuracies, times = panels
    for run in runs:
        if isinstance(run.curves, Curves):
            losses.plot(run.curves.step, run.curves.loss, label=run.label)
            test_losses.plot(run.curves.epoch, run.curves.test_loss, marker=".")
            accuracies.plot(run.curves.epoch, run.curves.test_accuracy, marker=".")
    finished = [(str(1 + index), run.summary) for index, run in enumerate(runs) if run.summary is not None]
    lefts = np.zeros(len(finished))
    for label, key in {"compute": "compute_s", "data": "data_s", "blocked": "averaging_blocked_s"}.items():
        seconds = np.array([values[key] for _, values in finished])  # type: ignore[literal-required]
        times.barh([number for number, _ in finished], seconds, left=lefts, label=label)
        lefts += seconds
    losses.set(xlabel="step", ylabel="training loss, mean over learners", yscale="log")
    test_losses.set(xlabel="epoch", ylabel="test loss of the mean model", yscale="log")
    accuracies.set(xlabel="epoch", ylabel="test accuracy of the mean model")
    times.set(xlabel="seconds, mean over ranks", ylabel="run")
    times.invert_yaxis()
    times.legend(fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    image = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that its font lacks, of axes without a curve
            figure.savefig(image, dpi=120, format=target.suffix[1:] or "png")
        files.replace_file(target, [image.getvalue()])
    except (OSError, ValueError) as error:
        raise InputError("output", target, f"a file that can be written ({reason(error)})") from error
    finally:
        plt.close(figure)
