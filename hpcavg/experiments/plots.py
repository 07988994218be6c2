"""Plots of experiments as small SVG files: lines with bands, the confidence intervals of the means over the seeds."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcavg.experiments.experiment import Line, Plot
from hpcavg.experiments.verdict import intervals

_INCHES = (5.2, 3.2)
# Texts stay texts, and the same plot has the same bytes.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hpcavg",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
_MARKED_POINTS = 12


def draw(plot: Plot) -> bytes:
    """Return a plot as SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for line in plot.lines:
            _draw_line(axes, line)
        if plot.is_x_log:
            axes.set_xscale("log", base=2)
        if plot.is_y_log:
            axes.set_yscale("log")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.set_title(plot.title)
        if len(plot.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()


def _draw_line(axes: Axes, line: Line) -> None:
    x, values = np.asarray(line.x, float), np.atleast_2d(np.asarray(line.values, float))
    mean = np.ma.masked_invalid(values).mean(axis=0)
    marker = "o" if len(x) <= _MARKED_POINTS else None
    (drawn,) = axes.plot(x, mean, label=line.label, marker=marker, markersize=3, linewidth=1.2)
    if len(values) > 1:
        axes.fill_between(x, *intervals(values), color=drawn.get_color(), alpha=0.2, linewidth=0)
