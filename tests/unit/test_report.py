"""Reports: unfinished, killed and oddly named runs, and outputs that cannot be written."""

import os
import shutil

import numpy as np
import pytest

from hpcavg import curves, report, run_folder
from hpcavg.errors import InputError
from hpcavg.metrics import Recorder, file_name, write_view
from tests.unit.test_summary import example


def make_run(folder, steps=450, killed=False):
    """Make a run of two ranks, the second one step behind; its files are left open where it was killed."""
    (folder / "metrics").mkdir(parents=True)
    write_view(folder / "metrics", 2)
    for rank in range(2):
        path = folder / "metrics" / file_name(rank)
        recorder = Recorder(path, {}, 3600)
        for step in range(1, steps + 1 - rank):
            recorder.record("step", step, 1, step + rank, 0.1, 0.1, 0.1, 0.1)
        recorder.record("evaluation", steps, 1, 0.5, 0.25, 0.75, 0.9, 0.5, 0.5)
        recorder.flush()
        shutil.copy(path, f"{path}.killed")
        recorder.close()
        if killed:
            os.replace(f"{path}.killed", path)
    return folder


@pytest.mark.parametrize("killed", [False, True])
def test_curves_are_means_over_learners_and_short_spans(tmp_path, killed):
    (read,) = curves.read([make_run(tmp_path / "run", killed=killed)])
    assert read.num_steps == 450
    # spans of 2 steps; learners have losses t and t + 1; the last step is the first learner's alone
    assert read.step.tolist() == [1.5 + 2 * span for span in range(225)]
    assert read.loss.tolist() == [2.0 + 2 * span for span in range(224)] + [(449.5 + 450) / 2]
    assert (read.epoch.tolist(), read.test_loss.tolist(), read.test_accuracy.tolist()) == ([1], [0.25], [0.75])


def test_unfinished_and_oddly_named_runs_are_drawn(tmp_path, capsys):
    for name in ("a [red]", "b [x] $_{\n\udcff"):
        make_run(tmp_path / name, 3, killed=True)
    (tmp_path / "c" / "metrics").mkdir(parents=True)
    write_view(tmp_path / "c" / "metrics", 2)  # nothing recorded yet
    run_folder.write_json(tmp_path / "a [red]" / "summary.json", example(num_ranks=3))
    report.main([str(path) for path in sorted(tmp_path.iterdir())], None)
    out = capsys.readouterr().out
    assert "k-avg" in out
    assert out.count("a [red]") == 3  # in the table, the warning and the name of the plot
    assert f"warning: {tmp_path}/a [red] has no metrics of 1 rank, first of rank 2\n" in out
    assert f"{tmp_path}/b [x] $_{{\\n\\udcff is unfinished: 3 steps so far\n" in out
    assert f"{tmp_path}/c is unfinished: 0 steps so far\n" in out
    assert (tmp_path / "a [red]" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_lost_over_one_run_does_not_take_the_others_along(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "DEADLINE_S", 3.0)
    folders = [make_run(tmp_path / name, 3) for name in "abc"]
    (folders[1] / "metrics" / "all.h5").unlink()
    os.mkfifo(folders[1] / "metrics" / "all.h5")  # waits for ever
    first, second, third = curves.read(folders)
    assert np.array_equal(first.loss, third.loss)
    assert second == "its metrics cannot be read within 3 s: damaged, or too many"


@pytest.mark.parametrize("name", ["none/curves.png", "folder", "pipe", "curves.txt", "a\0b", "x" * 300])
def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path, name):
    run = make_run(tmp_path / "run", 3)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        report.main([str(run)], f"{tmp_path}/{name}")
    assert caught.value.as_option().startswith("--output ")
    assert caught.value.as_option().isprintable()
    assert sorted(tmp_path.rglob("*")) == before
