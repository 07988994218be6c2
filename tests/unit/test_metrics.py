"""Metrics files: what was flushed can be read, during the run and after a kill."""

import multiprocessing
import os
import signal

import h5py
import numpy as np
import pytest
import torch

from hpcavg.metrics import COLUMNS, Recorder, file_name, read_view, write_view


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


def test_an_existing_file_is_never_reopened(tmp_path):
    Recorder(tmp_path / "a.h5", {}, 1).close()
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "a.h5", {}, 1)


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
