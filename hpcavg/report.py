"""``python -m hpcavg report DIR ...``: the table of one or several runs, and their curves on one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from hpcavg import summary
from hpcavg.errors import InputError
from hpcavg.metrics import read_view

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_SMOOTHED_POINTS = 200


def main(folders: Sequence[str], output: str | None) -> None:
    """Print the table of the runs in `folders` and write their curves as PNG to `output`."""
    paths = [Path(folder) for folder in folders]
    runs = [(path, summary.read(path)) for path in paths]
    target = Path(output) if output else paths[0] / "curves.png"
    plot(runs, target)
    summary.show(runs)
    print(f"curves: {target}")


def plot(runs: Sequence[tuple[Path, summary.Summary]], target: Path) -> None:
    """Draw training loss by step, test accuracy by epoch, and where the time went; write them to `target`."""
    figure, (loss_axes, accuracy_axes, time_axes) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    shares = {"compute": "compute_s", "data": "data_s", "blocked by averaging": "averaging_blocked_s"}
    lefts = np.zeros(len(runs))
    for path, run in runs:
        try:
            steps = read_view(path / "metrics", "step")
            evaluations = read_view(path / "metrics", "evaluation")
        except OSError as error:
            raise InputError("folder", path, f"a run with readable metrics ({error})") from error
        label = f"{run['algorithm'].replace('_', '-')} ({path.name})"
        loss = np.nanmean(steps["loss"], axis=0)
        width = max(1, len(loss) // _SMOOTHED_POINTS)
        usable = len(loss) // width * width
        position = steps["step"].max(axis=0)[:usable].reshape(-1, width).mean(axis=1)
        loss_axes.plot(position, loss[:usable].reshape(-1, width).mean(axis=1), label=label)
        accuracy_axes.plot(evaluations["epoch"][0], evaluations["test_accuracy"][0], marker=".", label=label)
    names = [path.name for path, _ in runs]
    for label, key in shares.items():
        seconds = np.array([run[key] for _, run in runs])  # type: ignore[literal-required]
        time_axes.barh(names, seconds, left=lefts, label=label)
        lefts += seconds
    loss_axes.set(xlabel="step", ylabel="training loss, mean over learners", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy of the mean model")
    time_axes.set(xlabel="seconds, mean over ranks")
    time_axes.invert_yaxis()
    for axes in (loss_axes, accuracy_axes, time_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise InputError("output", target, f"a file that can be written ({error.strerror})") from error
    finally:
        plt.close(figure)
