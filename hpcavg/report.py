"""``python -m hpcavg report DIR ...``: the table of one or several runs, and their curves on one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from hpcavg import summary
from hpcavg.errors import InputError
from hpcavg.metrics import file_name, read_view

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_POINTS = 200


def main(folders: Sequence[str], output: str | None) -> None:
    """Print the table of the runs in `folders` and write their curves as PNG to `output`."""
    runs = [(Path(folder), summary.read(Path(folder))) for folder in folders]
    target = Path(output) if output else runs[0][0] / "curves.png"
    plot(runs, target)
    summary.show(runs)
    for path, run in runs:
        missing = [r for r in range(run["num_ranks"]) if not (path / "metrics" / file_name(r)).exists()]
        if missing:
            print(
                f"warning: {path} has no metrics of {summary.counted(len(missing), 'rank')}, first of rank {missing[0]}"
            )
    print(f"curves: {target}")


def plot(runs: Sequence[tuple[Path, summary.Summary]], target: Path) -> None:
    """Draw training loss by step, test loss and accuracy by epoch, and where the time went; write them to `target`."""
    figure, panels = plt.subplots(1, 4, figsize=(18, 4.6), layout="constrained")
    losses, test_losses, accuracies, times = panels
    for path, run in runs:
        try:
            steps = read_view(path / "metrics", "step")
            evaluations = read_view(path / "metrics", "evaluation")
        except OSError as error:
            raise InputError("folder", path, f"a run with readable metrics ({error})") from error
        position, loss = _smoothed(steps["step"], steps["loss"])
        losses.plot(position, loss, label=f"{path.name}: {run['algorithm'].replace('_', '-')}")
        for axes, column in ((test_losses, "test_loss"), (accuracies, "test_accuracy")):
            axes.plot(evaluations["epoch"].max(axis=0), evaluations[column][0], marker=".")
    lefts = np.zeros(len(runs))
    for label, key in {"compute": "compute_s", "data": "data_s", "blocked": "averaging_blocked_s"}.items():
        seconds = np.array([run[key] for _, run in runs])  # type: ignore[literal-required]
        times.barh([str(1 + index) for index in range(len(runs))], seconds, left=lefts, label=label)
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
    try:
        figure.savefig(target, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError("output", target, f"a file that can be written ({error})") from error
    finally:
        plt.close(figure)


def _smoothed(step: NDArray[Any], loss: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return steps and the mean loss of all learners, averaged over short spans; missing rows are left out."""
    values = np.ma.masked_invalid(loss).mean(axis=0)
    width = max(1, len(values) // _POINTS)
    usable = len(values) // width * width
    position = step.max(axis=0)[:usable].reshape(-1, width).mean(axis=1)
    return position, values[:usable].reshape(-1, width).mean(axis=1)
