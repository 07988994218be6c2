"""Metrics files: what was flushed can be read, during the run and after a kill."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from hpcavg.algorithms.scope import LOCAL
from hpcavg.averaging.events import Arrival, Event
from hpcavg.results.columns import COLUMNS, FORMAT, STACKED_FORMAT, markdown_table, row_of
from hpcavg.results.metrics import Recorder
from hpcavg.results.view import continued, file_name, num_segments, read_attributes, read_view, rows_before, write_view
from hpcavg.training.evaluation import Evaluation, Score
from hpcavg.utils.format_version import NewerFormatError


def step_row(step):
    return (step, 1, torch.tensor(0.5 * step), 0.1, 0.01, 0.001, 0.0)


def test_rows_columns_units_and_attributes(tmp_path):
    recorder = Recorder(tmp_path / file_name(0), {"algorithm": "k_avg"}, flush_s=3600)
    for step in range(1, 2000):
        recorder.record("step", *step_row(step))
    recorder.record("averaging", 2, "global", 2, 0.1, 0.2, 0.2, 400, np.nan)
    recorder.close()
    recorder.close()
    with h5py.File(tmp_path / "rank-00000.h5", "r") as file:
        assert file.attrs["algorithm"] == "k_avg"
        assert file["step/step"][...].tolist() == list(range(1, 2000))
        assert file["step/loss"][2] == 1.5
        assert file["averaging/scope"][0] == b"global"
        units = {f"{g}/{c}": file[g][c].attrs["units"] for g, columns in COLUMNS.items() for c in columns}
    assert units["step/compute_s"] == "s"
    assert units["averaging/bytes"] == "byte"
    assert set(units) == {f"{g}/{c}" for g, columns in COLUMNS.items() for c in columns}


def test_files_carry_their_format_and_newer_ones_are_named(tmp_path):
    write_view(tmp_path, 1)
    recorded(tmp_path / file_name(0), 1, 3)
    assert read_attributes(tmp_path / file_name(0))["format"] == FORMAT
    for written in (FORMAT, None, FORMAT + 1):  # None: as of before there were formats
        write_view(tmp_path, 1)
        with h5py.File(tmp_path / "all.h5", "r+") as view:
            assert view.attrs.pop("format") == FORMAT
            view.attrs.update({} if written is None else {"format": written})
        if written in (FORMAT, None):
            assert read_view(tmp_path, "step")["step"].tolist() == [[1, 2, 3]]
        else:
            with pytest.raises(NewerFormatError, match=f"it is of format {written}; this hpcavg reads up to {FORMAT}"):
                read_view(tmp_path, "step")


def test_a_row_is_made_of_the_attributes_that_columns_name():
    event = Event(4, LOCAL, 2, 0.5, 0.25, 0.125, 400, sick=(1,), distances=(3.0,))
    assert row_of("averaging", event) == (4, "local", 2, 0.5, 0.25, 0.125, 400, 3.0)
    result = Evaluation(12, 2, 0.5, Score(1.5, 0.75, 0.875), Score(2.5, 0.25))
    assert row_of("evaluation", result) == (12, 2, 0.5, 1.5, 0.75, 0.875, 2.5, 0.25)
    assert row_of("arrival", Arrival(3, 1.5, 7)) == (3, 1.5, 7)


def test_rows_of_loops_that_do_not_know_the_last_columns(tmp_path):
    write_view(tmp_path, 1)
    recorder = Recorder(tmp_path / file_name(0), {}, 3600)
    recorder.record("averaging", 4, "local")
    with pytest.raises(ValueError, match="a row of 4 values for the 3 columns of arrival"):
        recorder.record("arrival", 1, 2.0, 3, 4)
    recorder.close()
    assert recorder.lost is None
    read = read_view(tmp_path, "averaging")
    assert (read["step"].tolist(), read["scope"].tolist()) == ([[4]], [[b"local"]])
    assert (read["bytes"].tolist(), np.isnan(read["blocked_s"]).tolist()) == ([[-1]], [[True]])
    assert read_view(tmp_path, "arrival")["learner"].shape == (1, 0)


def test_every_column_has_its_row_in_the_docs():
    lines = [line for line in markdown_table().splitlines() if "`" in line]
    assert [line.split("`")[1] for line in lines if line.startswith("|")] == [
        name for columns in COLUMNS.values() for name in columns
    ]
    assert [line.split("`")[1] for line in lines if not line.startswith("|")] == list(COLUMNS)
    assert all(column.text for columns in COLUMNS.values() for column in columns.values())


def recorded(path, first, last, rows_before=None):
    """Record the steps `first`..`last` in a file of their own."""
    recorder = Recorder(path, {}, 3600, rows_before)
    for step in range(first, last + 1):
        recorder.record("step", *step_row(step))
    recorder.close()
    return recorder


def test_an_existing_file_is_never_reopened(tmp_path):
    recorded(tmp_path / "a.h5", 1, 3)
    before = (tmp_path / "a.h5").read_bytes()
    again = recorded(tmp_path / "a.h5", 4, 5)
    assert (again.lost, again.rows_lost) == (f"{tmp_path}/a.h5: File exists", 2)
    assert (tmp_path / "a.h5").read_bytes() == before


def _write_and_die(path, rows):
    recorder = Recorder(path, {}, flush_s=3600)
    for step in range(1, rows + 1):
        recorder.record("step", *step_row(step))
    recorder.flush()
    recorder.record("step", *step_row(rows + 1))
    os.kill(os.getpid(), signal.SIGKILL)


def test_files_of_killed_ranks_hold_everything_up_to_the_last_flush(tmp_path):
    write_view(tmp_path, 3)  # before any of its sources is there
    spawn = multiprocessing.get_context("spawn")
    for rank, rows in enumerate([4, 6]):
        process = spawn.Process(target=_write_and_die, args=(tmp_path / file_name(rank), rows))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    with h5py.File(tmp_path / file_name(1), "r", swmr=True) as file:
        assert file["step/step"][...].tolist() == [1, 2, 3, 4, 5, 6]
    view = read_view(tmp_path, "step")
    assert view["step"].tolist() == [[1, 2, 3, 4, -1, -1], [1, 2, 3, 4, 5, 6], [-1] * 6]
    assert np.isnan(view["loss"][0, 4:]).all()


def test_the_view_follows_a_run_that_goes_on(tmp_path):
    write_view(tmp_path, 1)
    recorder = Recorder(tmp_path / file_name(0), {}, flush_s=0)
    for step in (1, 2, 3):
        recorder.record("step", *step_row(step))
        assert read_view(tmp_path, "step")["step"].tolist() == [list(range(1, step + 1))]
    recorder.close()


def counts(*steps):
    return [dict.fromkeys(COLUMNS, 0) | {"step": step} for step in steps]


def test_a_resumed_run_adds_files_and_shows_each_step_once(tmp_path):
    write_view(tmp_path, 2)
    for rank, steps in enumerate((9, 7)):  # a checkpoint at step 5, then killed
        assert recorded(tmp_path / file_name(rank), 1, steps).positions()["step"] == steps
    resumed = continued(tmp_path, [], counts(5, 5))
    assert (resumed, num_segments(tmp_path)) == ([counts(5, 5)], 1)
    write_view(tmp_path, 2, resumed)
    assert read_view(tmp_path, "step")["step"].tolist() == [[1, 2, 3, 4, 5]] * 2
    recorder = recorded(tmp_path / file_name(0, 1), 6, 8, rows_before(resumed, 0))
    assert recorder.positions()["step"] == 8
    with h5py.File(tmp_path / "rank-00000-1.h5", "r") as file:
        assert (file.attrs["rows_before_step"], file.attrs["rows_before_averaging"]) == (5, 0)
    view = read_view(tmp_path, "step")
    assert view["step"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, -1, -1, -1]]
    assert view["loss"][0].tolist() == [0.5 * step for step in range(1, 9)]
    # resumed from the same checkpoint once more: what came of the last time does not count
    resumed = continued(tmp_path, [], counts(5, 5))
    assert len(resumed) == 2
    write_view(tmp_path, 2, resumed)
    recorded(tmp_path / file_name(1, 2), 6, 7, rows_before(resumed, 1))
    assert read_view(tmp_path, "step")["step"].tolist() == [[1, 2, 3, 4, 5, -1, -1], [1, 2, 3, 4, 5, 6, 7]]


def test_a_run_resumed_on_other_numbers_of_ranks(tmp_path):
    history = []
    recorded(tmp_path / file_name(0), 1, 4)
    recorded(tmp_path / file_name(1), 1, 6)  # at its own pace
    for num_ranks, positions in ((1, counts(4, 6)), (3, counts(5))):
        history = continued(tmp_path, history, positions)
        for rank in range(num_ranks):
            before = rows_before(history, rank)
            recorded(tmp_path / file_name(rank, len(history)), 5, 5 + rank, before)
        write_view(tmp_path, num_ranks, history)
    assert read_view(tmp_path, "step")["step"].tolist() == [
        [1, 2, 3, 4, 5, 5, -1, -1, -1],
        [1, 2, 3, 4, 5, 6, 5, 6, -1],
        [-1, -1, -1, -1, -1, -1, 5, 6, 7],  # begins after the longest that was there
    ]


def stacked(path, learners, first, last, rows_before=()):
    """Record the steps of several learners in a rank: learner i's loss at step s is s + i / 10."""
    recorder = Recorder(path, {}, 3600, rows_before, learners)
    for step in range(first, last + 1):
        losses = torch.tensor([step + learner / 10 for learner in learners], dtype=torch.float64)
        recorder.record("step", step, 1, losses, 0.1, 0.01, 0.001, 0.0)
    recorder.record("averaging", last, "global", 2, 0.1, 0.2, 0.2, 400, np.array(learners, dtype=float))
    recorder.close()
    return recorder


def test_a_rank_of_several_learners_has_a_row_of_each_dataset_for_each(tmp_path):
    recorder = stacked(tmp_path / file_name(1), range(3, 6), 1, 2)
    assert recorder.positions(2) == {"step": 2, "averaging": 1, "arrival": 0, "evaluation": 0, "learners_per_rank": 3}
    with h5py.File(tmp_path / "rank-00001.h5", "r") as file:
        assert (file.attrs["format"], file.attrs["learners"].tolist()) == (STACKED_FORMAT, [3, 6])
        assert file["step/step"][...].tolist() == [[1, 2]] * 3
        assert file["step/loss"][...].tolist() == [[1.3, 2.3], [1.4, 2.4], [1.5, 2.5]]
        assert file["averaging/scope"][...].tolist() == [[b"global"]] * 3
        assert file["averaging/consensus_distance"][...].tolist() == [[3], [4], [5]]
        assert file["arrival/learner"].shape == (3, 0)
    write_view(tmp_path, 6, learners_per_rank=3)  # rank 0 has recorded nothing
    assert read_view(tmp_path, "step")["step"].tolist() == [[-1, -1]] * 3 + [[1, 2]] * 3
    with h5py.File(tmp_path / "all.h5", "r") as file:
        assert file.attrs["format"] == FORMAT


def test_learners_at_their_own_pace_have_rows_of_their_own_steps(tmp_path):
    """Learner 0 waits at every third step, and learner 2 in the first half."""
    steps = np.zeros(3, dtype=int)
    recorder = Recorder(tmp_path / file_name(0), {}, 3600, learners=range(3))
    for taken in range(12):
        of = [row for row in range(3) if not (row == 0 and taken % 3 == 0) and not (row == 2 and taken < 6)]
        steps[of] += 1
        recorder.record("step", steps.tolist(), 1, torch.tensor([0.1, 0.2, 0.3]) + taken, 0.1, 0.01, 0.0, 0.0, of=of)
        if taken % 5 == 4:
            recorder.flush()
    recorder.close()
    assert [recorder.positions(row)["step"] for row in range(3)] == [8, 12, 6]
    write_view(tmp_path, 3, learners_per_rank=3)
    view = read_view(tmp_path, "step")
    for row, count in enumerate((8, 12, 6)):
        assert view["step"][row].tolist() == [*range(1, count + 1)] + [-1] * (12 - count)
    assert view["loss"][2, :6] == pytest.approx([taken + 0.3 for taken in range(6, 12)])


def test_a_run_resumed_with_other_numbers_of_learners_per_rank(tmp_path):
    for rank in range(4):  # 4 ranks of one learner, 2 of two, 1 of four
        recorder = Recorder(tmp_path / file_name(rank), {}, 3600)
        recorder.record("step", 1, 1, 1 + rank / 10, 0.1, 0.01, 0.001, 0.0)
        recorder.close()
    history = continued(tmp_path, [], [recorder.positions()] * 4)
    for learners_per_rank in (2, 4):
        segment = len(history)
        write_view(tmp_path, 4, history, learners_per_rank)
        for rank in range(4 // learners_per_rank):
            learners = range(rank * learners_per_rank, (rank + 1) * learners_per_rank)
            before = [rows_before(history, learner) for learner in learners]
            recorder = stacked(tmp_path / file_name(rank, segment), learners, segment + 1, segment + 2, before)
        # the checkpoint is of the first of the two steps
        at_checkpoint = recorder.positions() | {"step": segment + 1}
        history = continued(tmp_path, history, [at_checkpoint] * 4)
    view = read_view(tmp_path, "step")
    assert view["step"].tolist() == [[1, 2, 3, 4]] * 4
    assert view["loss"].tolist() == [[step + learner / 10 for step in (1, 2, 3, 4)] for learner in range(4)]
    with h5py.File(tmp_path / file_name(0, 2), "r") as file:
        assert file.attrs["rows_before_step"].tolist() == [2, 2, 2, 2]


def test_rows_that_were_lost_before_a_resume_leave_a_gap(tmp_path):
    recorded(tmp_path / file_name(0), 1, 3)
    write_view(tmp_path, 1, [counts(6)])
    recorded(tmp_path / file_name(0, 1), 7, 8, {"step": 6})
    view = read_view(tmp_path, "step")
    assert view["step"].tolist() == [[1, 2, 3, -1, -1, -1, 7, 8]]
    assert np.isnan(view["loss"][0, 3:6]).all()


def test_a_view_is_replaced_whole_or_not_at_all(tmp_path):
    write_view(tmp_path, 1)
    before = (tmp_path / "all.h5").read_bytes()
    (tmp_path / "all.h5.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        write_view(tmp_path, 2)
    assert (tmp_path / "all.h5").read_bytes() == before


def test_records_of_a_folder_that_has_gone_are_lost_and_counted(tmp_path):
    folder = tmp_path / "metrics"
    folder.mkdir()
    recorder = Recorder(folder / file_name(0), {}, 0)
    recorder.record("step", *step_row(1))
    assert recorder.lost is None
    shutil.rmtree(folder)
    for step in range(2, 5):
        recorder.record("step", *step_row(step))
    assert recorder.lost == f"{folder}/rank-00000.h5: No such file or directory"
    assert (recorder.rows_lost, recorder.positions()["step"]) == (3, 4)
    assert not any(recorder._rows.values())
    recorder.close()
    assert recorded(folder / file_name(1), 1, 3).rows_lost == 3


# HDF5 would crash at the end of a process that could not write; a limit on the size of files stands for a full disk.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from hpcavg.results.metrics import Recorder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
recorder = Recorder(Path(sys.argv[1]), {}, 3600)
for step in range(1, 10_001):
    recorder.record("step", step, 1, 0.5 * step, 0.1, 0.01, 0.001, 0.0)
    if step % 100 == 0:
        recorder.flush()
print(recorder.lost, recorder.rows_lost)
if sys.argv[3] == "close":
    recorder.close()
"""


@pytest.mark.parametrize(
    ("limit", "end"),
    [(0, "close"), (100, "leave"), (5000, "leave"), (70_000, "leave"), (70_000, "close"), (300_000, "close")],
)
def test_a_full_disk_loses_records_and_nothing_else(tmp_path, limit, end):
    path = tmp_path / file_name(0)
    command = [sys.executable, "-c", FULL_DISK, path, str(limit), end]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    lost, _, rows_lost = result.stdout.rpartition(" ")
    assert lost == f"{path}: File too large"
    written = 10_000 - int(rows_lost)
    assert written >= (2000 if limit == 300_000 else 0)
    if written:
        with h5py.File(path, "r", swmr=True) as file:
            steps, losses = file["step/step"][...], file["step/loss"][...]
        assert steps[:written].tolist() == list(range(1, written + 1))
        assert losses[:written].tolist() == [0.5 * step for step in range(1, written + 1)]
        assert set(steps[written:]) <= {-1, *range(written + 1, written + 101)}  # the flush that failed
