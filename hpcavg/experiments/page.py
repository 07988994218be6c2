"""The page of all experiments: an index of verdicts, and for each claim what the paper saw and what these runs saw."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcavg.experiments import plots
from hpcavg.experiments.experiment import PAPERS, Experiment, Finding, Scale
from hpcavg.experiments.full_size import HEADS, Finished
from hpcavg.experiments.verdict import Verdict
from hpcavg.utils import files, markdown

HEAD = """# The papers' experiments

`make paper` writes this page. Each experiment is a claim of one of the five papers, tested at the papers' numbers of
learners, with smaller networks and data: all learners of a run compute in one process, with the arithmetic of as many
ranks. The rule of each verdict was written before the runs. Verdicts against a paper stay in: they are about these
runs, not about the paper's.

Intervals are those of Student at 95 %, over the seeds, and differences are taken seed by seed. An effect size is the
distance of the mean from its margin, in deviations. Where a claim has several comparisons, a second interval is at 95 %
for all of them together (Bonferroni): by this one, a comparison decides alone.

Each verdict stands for itself. Nothing corrects for the number of verdicts on this page, so a few may be wrong by
chance; and several share runs, so that they may be wrong together.

"""


def write(
    path: Path,
    found: Mapping[str, Finding],
    experiments: Sequence[Experiment],
    scale: Scale,
    finished: Mapping[str, Finished] | None = None,
) -> None:
    """Write the page to `path`, and its plots into the folder of the same name without ``.md``.

    Parameters
    ----------
    path : the page.
    found : the findings by the name of the experiment.
    experiments : those that were found, in the order of the page.
    scale : theirs.
    finished : what is finished at the papers' size, by the name of the experiment; None: it was not asked for.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        f"{experiment.name}-{plot.name}.svg": plot
        for experiment in experiments
        for plot in found[experiment.name].plots
    }
    for name, plot in names.items():
        files.replace_file(folder / name, [plots.draw(plot)])
    for old in set(os.listdir(folder)) - names.keys():
        if old.endswith(".svg"):
            os.unlink(folder / old)
    parts = [HEAD + index(experiments, found)]
    for paper, title in PAPERS.items():
        of_paper = [experiment for experiment in experiments if experiment.paper == paper]
        if of_paper:
            parts.append(f"## {title}")
            for each in of_paper:
                parts.append(_section(each, found[each.name], folder.name, scale))
                if each.recipes:
                    parts.append(_at_full_size(each, (finished or {}).get(each.name)))
    files.replace_file(path, [("\n\n".join(parts) + "\n").encode()])


def index(experiments: Sequence[Experiment], found: Mapping[str, Finding]) -> str:
    """Return the table of all verdicts."""
    rows = [
        (
            f"[{each.name}](#{_anchor(each.name)})",
            each.where,
            each.claim,
            f"**{found[each.name].judgement.verdict.value}**",
        )
        for each in experiments
    ]
    return markdown.table(("experiment", "in the paper", "claim", "verdict"), rows)


def _anchor(heading: str) -> str:
    """Return the name by which code hosts and Sphinx know a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _section(experiment: Experiment, finding: Finding, folder: str, scale: Scale) -> str:
    judgement = finding.judgement
    lines = [
        f"### {experiment.name}",
        f"**Claim** ({experiment.where}). {experiment.claim}",
        f"**The paper saw.** {experiment.saw}",
        f"**Rule.** {experiment.rule}",
        f"**These runs saw.** {scale.seeds} seeds.",
        markdown.table(finding.heads, finding.rows),
        *([_diverged(finding, scale)] if finding.diverged else []),
        *(
            f"![{plot.y_label} against {plot.x_label}]({folder}/{experiment.name}-{plot.name}.svg)"
            for plot in finding.plots
        ),
        f"**Verdict: {judgement.verdict.value}.**",
        "\n".join(f"- {statistic}" for statistic in judgement.statistics),
    ]
    if judgement.verdict is Verdict.UNDECIDED:
        needed = (
            "no number of seeds up to 1000"
            if judgement.seeds_to_decide is None
            else f"{judgement.seeds_to_decide} seeds"
        )
        lines.append(f"With these differences, {needed} would probably decide it.")
    lines.append(f"**Scaled down.** {experiment.scaling}")
    return "\n\n".join(lines)


def _diverged(finding: Finding, scale: Scale) -> str:
    arms = "; ".join(f"{arm}: {count} of {scale.seeds}" for arm, count in finding.diverged.items())
    return (
        f"Runs that diverged: {arms}. Where some seeds of an arm diverge and others do not, its intervals say little."
    )


def _at_full_size(experiment: Experiment, finished: Finished | None) -> str:
    listed = ", ".join(f"`{name}`" for name in experiment.recipes)
    if finished is None or not any(finished.accuracies.values()):
        return f"**At the paper's size** ({listed}). No run was collected."
    return f"**At the paper's size** ({listed}), {finished}.\n\n{markdown.table(HEADS, finished.rows)}"
