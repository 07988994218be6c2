"""Reports: unfinished, damaged and oddly named runs, foreign folders, and outputs that cannot be written."""

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from matplotlib import pyplot as plt

from hpcavg.cli import main
from hpcavg.errors import InputError
from hpcavg.results import curves, metrics, report, summary, view
from hpcavg.results.metrics import Recorder
from hpcavg.results.run_lock import this_process
from hpcavg.results.view import file_name, write_view
from tests.old_runs import DATA, copy_run
from tests.unit.results.test_summary import example

OLD_RUN = DATA / "d2269b3" / "dasgd"
PNG = b"\x89PNG"


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
    assert read.known == {
        "steps": 450,
        **{"train_loss": 0.5, "test_loss": 0.25, "test_accuracy": 0.75, "test_top5_accuracy": 0.9},
        **{"learner_test_loss": 0.5, "learner_test_accuracy": 0.5},
    }
    # spans of 2 steps; learners have losses t and t + 1; the last step is the first learner's alone
    assert read.step.tolist() == [1.5 + 2 * span for span in range(225)]
    assert read.loss.tolist() == [2.0 + 2 * span for span in range(224)] + [(449.5 + 450) / 2]
    assert (read.epoch.tolist(), read.test_loss.tolist(), read.test_accuracy.tolist()) == ([1], [0.25], [0.75])


def test_unfinished_and_oddly_named_runs_are_drawn(tmp_path, capsys):
    for name in ("a [red]", "b [x] $_{\n\udcff"):
        make_run(tmp_path / name, 3, killed=True)
    (tmp_path / "c" / "metrics").mkdir(parents=True)
    write_view(tmp_path / "c" / "metrics", 2)  # nothing recorded yet
    summary.write(tmp_path / "a [red]", example(num_ranks=3))
    report.main([str(path) for path in sorted(tmp_path.iterdir())], None)
    out = capsys.readouterr().out
    assert "k-avg" in out
    assert out.count("a [red]") == 3  # in the table, the line below and the name of the plot
    assert f"{tmp_path}/a [red]: no metrics of 1 rank, first of rank 2\n" in out
    missing = "config.toml: No such file or directory"
    assert f"{tmp_path}/b [x] $_{{\\n\\udcff: unfinished, 3 steps so far; {missing}\n" in out
    assert f"{tmp_path}/c: unfinished, 0 steps so far; {missing}\n" in out
    assert (tmp_path / "a [red]" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_lost_over_one_run_does_not_take_the_others_along(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "DEADLINE_S", 3.0)
    folders = [make_run(tmp_path / name, 3) for name in "abc"]
    os.mkfifo(folders[1] / "metrics" / "pipe")  # waits for ever
    with h5py.File(folders[1] / "metrics" / "all.h5", "w") as view:
        view["step"] = h5py.ExternalLink("pipe", "/")
    first, second, third = curves.read(folders)
    assert np.array_equal(first.loss, third.loss)
    assert second == "its metrics cannot be read within 3 s: damaged, or too many"


@pytest.mark.parametrize("name", ["all.h5", "rank-00000.h5", "rank-00001.h5"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_among_the_metrics_is_named_at_once(tmp_path, name, make):
    path = make_run(tmp_path / "run", 3, killed=True) / "metrics" / name
    path.unlink()
    make(path)
    why = "Is a directory" if path.is_dir() else "Invalid argument"
    assert curves._read_or_reason(path.parent) == f"its metrics cannot be read: {name}: {why}"


def test_metrics_of_ranks_that_the_summary_does_not_know_are_told(tmp_path, capsys):
    for name, ranks in {"a": 1, "b": 2, "c": 3}.items():
        summary.write(make_run(tmp_path / name, 3), example(num_ranks=ranks))
    summary.write(make_run(tmp_path / "resumed", 3), example(num_ranks=1))
    again = tmp_path / "resumed" / "metrics"
    shutil.copy(again / file_name(0), again / file_name(0, 1))  # with one rank instead of two
    report.main([str(path) for path in sorted(tmp_path.iterdir())], None)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))] == [
        f"{tmp_path}/a: metrics of 1 rank that its summary lacks, first of rank 1",
        f"{tmp_path}/c: no metrics of 1 rank, first of rank 2",
    ]


@pytest.mark.parametrize("is_lock", [True, False])
def test_a_run_that_goes_on_after_its_summary_is_told(tmp_path, capsys, is_lock):
    """Else the figures of before would be taken for those of a finished run."""
    run = make_run(tmp_path / "run", 3)
    summary.write(run, example(num_ranks=2))
    owner = this_process("run")
    (run / "lock-000001").write_bytes(owner.to_bytes() if is_lock else b"mine")
    report.main([str(run)], None)
    line = f"{run}: {owner} goes on with it, or was killed; this is its summary of before\n"
    assert capsys.readouterr().out.count(line) == is_lock


def test_every_run_has_its_line_in_the_legend(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(plt.Figure, "legend", lambda figure, handles, labels, **how: made.append(labels))
    run = report._Run(tmp_path / "_x", {"state": "unfinished"}, curves.read([make_run(tmp_path / "_x", 3)])[0], [])
    report.plot([run, run], tmp_path / "curves.png")
    assert made == [["1  _x: unfinished", "2  _x: unfinished"]]


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


# What became of a folder's name or contents, and the line about it; those that are still shown in the table.
def _link_loop(run):
    shutil.rmtree(run)
    run.symlink_to(run.name)


def _replaced(run, text=None):
    shutil.rmtree(run)
    if text is None:
        run.write_text("notes")
    else:
        run.mkdir()
        (run / "config.toml").write_text(text)


def _summary(run, text):
    (run / "summary.json").write_text(text)


def _cut(run, name):
    os.truncate(run / name, 700)


def _unfinished(run):
    (run / "summary.json").unlink()


def _bare(run):
    _unfinished(run)
    _cut(run, "metrics/all.h5")
    (run / "config.toml").write_bytes(b"\xff")


def _newer_metrics(run):
    with h5py.File(run / "metrics" / "all.h5", "r+") as view:
        view.attrs["format"] = 9


NEWER = "it is of format 9; this hpcavg reads up to 1"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda run: _summary(run, '{"format": 9}'), f"summary.json: {NEWER}"),
        (_newer_metrics, f"its metrics cannot be read: {NEWER}"),
        (lambda run: (_unfinished(run), (run / "config.toml").write_text("format = 9")), f"config.toml: {NEWER}"),
    ],
)
def test_files_of_a_newer_format_are_not_called_damaged(tmp_path, capsys, change, line):
    run = shutil.copytree(OLD_RUN, tmp_path / "run", symlinks=True)
    change(run)
    report.main([str(run)], None)
    out = capsys.readouterr().out
    assert line in out
    assert "damaged" not in out


DAMAGED = {
    "no JSON": (lambda run: _summary(run, '{"algorithm": "dasgd",'), "summary.json is no JSON ("),
    "no summary": (
        lambda run: _summary(run, '{"loss": 1}'),
        "summary.json has no algorithm (and lacks ",
    ),
    "unfinished": (_unfinished, "unfinished, 13 steps so far"),
    "cut view": (lambda run: _cut(run, "metrics/all.h5"), "its metrics cannot be read: "),
    "lost rank": (lambda run: (run / "metrics" / "rank-00001.h5").unlink(), "no metrics of 1 rank, first of rank 1"),
}
UNSHOWN = {
    "empty": (lambda run: (shutil.rmtree(run), run.mkdir()), "no run: neither summary.json nor metrics is in it"),
    "file": (_replaced, "no folder (Not a directory)"),
    "loop": (_link_loop, "no folder (Too many levels of symbolic links)"),
    "foreign": (lambda run: _replaced(run, "algorithm = 'dasgd'"), "no run: neither summary.json nor metrics is in it"),
    "bare": (_bare, "unfinished; its metrics cannot be read: "),
}


def test_a_report_of_30_folders_takes_what_it_can(tmp_path, capsys):
    folders, lines = [], {}
    for number in range(30):
        folder = shutil.copytree(OLD_RUN, tmp_path / f"run-{number:02d}", symlinks=True)
        folders.append(str(folder))
        if number % 3 == 2:
            damage, line = [*DAMAGED.values(), *UNSHOWN.values()][number // 3]
            damage(folder)
            lines[str(folder)] = line
    values = json.loads((OLD_RUN / "summary.json").read_text())
    _summary(Path(folders[0]), json.dumps({name: values[name] for name in values if name not in summary.DEFAULTS}))
    _summary(Path(folders[1]), json.dumps(values | {"a_later_field": "x"}))
    assert main._without_mpi("report", folders) == 0
    out = capsys.readouterr().out.splitlines()
    told = dict(line.split(": ", 1) for line in out if line.startswith(str(tmp_path)))
    assert told.keys() == lines.keys()
    for folder, line in lines.items():
        assert told[folder].startswith(line), folder
    assert len([line for line in out if line.startswith(str(tmp_path))]) == 10
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out if "│" in line]
    table = {label: texts for label, *texts in cells}
    shown = [folder for number, folder in enumerate(folders) if number < 17 or number % 3 < 2]
    assert table["folder"] == shown
    assert table["algorithm"] == ["dasgd"] * 25
    assert table["task"] == ["digits"] * 25
    assert table["test accuracy"] == ["0.7619"] * 25
    assert [cell for cell in table["state"] if cell] == ["damaged", "damaged", "unfinished"]
    assert out[-1] == f"curves: {folders[0]}/curves.png"
    assert Path(folders[0], "curves.png").read_bytes().startswith(PNG)


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    folders = [str(shutil.copytree(OLD_RUN, tmp_path / name, symlinks=True)) for name in UNSHOWN]
    for folder, (damage, line) in zip(folders, UNSHOWN.values(), strict=True):
        damage(Path(folder))
        assert main._without_mpi("report", [folder]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"hpcavg: error: DIR {folder}: must be the folder of a run: {line}")
        assert (out, err.count("\n")) == ("", 1)
    assert main._without_mpi("report", [*folders, "a\0b"]) == 2
    assert capsys.readouterr().err.startswith(f"hpcavg: error: DIR {folders[0]} (and 5 more): must be ")


def test_a_run_without_curves_is_in_the_table_and_no_folder_need_be_written_to(tmp_path, capsys):
    run = shutil.copytree(OLD_RUN, tmp_path / "run", symlinks=True)
    (run / "curves.png").mkdir()
    report.main([str(run)], None)
    assert f"no curves: --output {run}/curves.png: must be a file that can be written" in capsys.readouterr().out
    shutil.rmtree(run / "metrics")
    report.main([str(run)], None)
    out = capsys.readouterr().out
    assert "0.7619" in out
    assert out.endswith(f"{run}: its metrics cannot be read: all.h5: No such file or directory\n")


def test_metrics_of_before_top5_accuracy_are_read(tmp_path, monkeypatch):
    old = {table: dict(columns) for table, columns in metrics.COLUMNS.items()}
    for group, name in (("evaluation", "test_top5_accuracy"), ("averaging", "period_steps")):
        del old[group][name]
    with monkeypatch.context() as patched:
        for module in (metrics, view):
            patched.setattr(module, "COLUMNS", old)
        write_view(tmp_path, 1)
        recorder = Recorder(tmp_path / file_name(0), {}, 3600)
        recorder.record("evaluation", 3, 1, 0.5, 0.25, 0.75, 0.5, 0.5)
        recorder.close()
    read = view.read_view(tmp_path, "evaluation")
    assert read["test_accuracy"].tolist() == [[0.75]]
    assert np.isnan(read["test_top5_accuracy"]).tolist() == [[True]]
    assert view.read_view(tmp_path, "averaging")["period_steps"].shape == (1, 0)
    resumed = [{"step": 0, "averaging": 0, "arrival": 0, "evaluation": 1}]
    write_view(tmp_path, 1, [resumed])
    recorder = Recorder(tmp_path / file_name(0, 1), {}, 3600, resumed[0])
    recorder.record("evaluation", 6, 2, 0.5, 0.25, 0.75, 0.9, 0.5, 0.5)
    recorder.close()
    again = view.read_view(tmp_path, "evaluation")
    assert np.array_equal(again["test_top5_accuracy"], [[np.nan, 0.9]], equal_nan=True)
    assert again["test_accuracy"].tolist() == [[0.75, 0.75]]


@pytest.mark.parametrize(
    ("name", "known", "epochs"),
    [
        ("d2269b3/dasgd", {"algorithm": "dasgd", "steps": 13, "test_accuracy": 0.7619}, [1]),
        ("e7aff81/hier-avg", {"algorithm": "hier_avg", "steps": 13, "test_accuracy": 0.7871}, [1, 2, 3]),
    ],
)
def test_a_run_of_an_earlier_version_is_reported(tmp_path, capsys, name, known, epochs):
    run = copy_run(name, tmp_path)
    (read,) = curves.read([run])
    assert {key: read.known[key] for key in known} == known | {
        "test_accuracy": pytest.approx(known["test_accuracy"], abs=5e-5)
    }
    assert (read.step.tolist(), read.epoch.tolist()) == (list(range(1, 14)), epochs)
    report.main([str(run)], None)
    out = capsys.readouterr().out
    assert f"curves: {run}/curves.png\n" in out
    assert str(known["test_accuracy"]) in out
    assert str(run) not in out.replace(f"curves: {run}", "").replace(f" {run} ", "")  # nothing is wrong with it


def test_a_view_of_today_shows_the_files_of_an_earlier_version(tmp_path):
    """Texts were shorter then."""
    run = copy_run("e7aff81/hier-avg", tmp_path)
    before = {table: view.read_view(run / "metrics", table) for table in metrics.COLUMNS}
    manifest = json.loads((run / "checkpoints" / "latest" / "manifest.json").read_text())
    history = manifest["about"]["metrics"]  # as on resuming it once more
    write_view(run / "metrics", 2, [*history["resumed"], history["positions"]])
    for table, columns in before.items():
        after = view.read_view(run / "metrics", table)
        counted = history["positions"][0][table]
        for name in columns:
            assert np.array_equal(after[name], columns[name][:, :counted], equal_nan=name != "scope"), name
    assert set(before["averaging"]["scope"].ravel()) == {b"local", b"global"}


def test_whatever_numbers_there_are_can_be_drawn(tmp_path):
    numbers = [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, -1.0, 0.0, 1.0, 3.0]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        runs = []
        for _ in range(rng.integers(1, 3)):
            points, epochs = rng.integers(0, 6, 2)
            columns = [rng.choice(numbers, size) for size in (points, points, epochs, epochs)]
            drawn = curves.Curves({}, *columns[:2], rng.choice([-(2**63), 2**63 - 1, 0, 1], epochs), *columns[2:])
            known = {name: rng.choice(numbers) for name in [*summary.PARTS, "wall_s"]}
            runs.append(
                report._Run(
                    tmp_path, {"state": "unfinished"} if rng.random() < 0.4 else known | {"algorithm": "x"}, drawn, []
                )
            )
        report.plot(runs, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
