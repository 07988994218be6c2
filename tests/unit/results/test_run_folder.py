"""What a run leaves beside its metrics: whole files, or the reason why not."""

import dataclasses
import errno
import os

import pytest

from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.results import run_folder, run_lock
from hpcavg.results.run_lock import RunLock, this_process
from hpcavg.utils import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"loss": float("nan")})
    files.write_json(path, {"loss": 1.0})
    assert path.read_text() == '{\n  "loss": 1.0\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_ordinary_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError):
            files.replace_file(tmp_path / name, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_failure_to_write_becomes_its_reason(tmp_path):
    def write(path):
        return run_folder.attempt(lambda: files.write_json(path, {}))

    assert write(tmp_path / "summary.json") is None
    gone = tmp_path / "gone" / "summary.json"
    assert write(gone) == f"{gone}: No such file or directory"


def test_other_failures_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_folder.attempt(lambda: 1 / 0)


@pytest.mark.parametrize("left", [["metrics"], ["metrics", "checkpoints"], ["metrics", "config.toml.partial"]])
def test_a_run_that_was_killed_at_its_very_start_may_be_resumed(tmp_path, left):
    for name in left:
        (tmp_path / name).mkdir()
    run_folder.check(tmp_path, may_be_run=True)
    with pytest.raises(InputError, match="output"):
        run_folder.check(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="output"):
        run_folder.check(tmp_path, may_be_run=True)


@pytest.mark.parametrize(("flags", "reason"), [(os.ST_RDONLY, "Read-only file system"), (0, "permission denied")])
def test_a_folder_that_may_not_be_written_says_why(tmp_path, monkeypatch, flags, reason):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([flags] * 11))
    with pytest.raises(InputError) as caught:
        run_folder.check(tmp_path / "run")
    line = f"--output {tmp_path}/run: must be a folder that can be written ({tmp_path}: {reason})"
    assert caught.value.as_option() == line


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: open(path, "x").close()])
def test_what_is_in_a_links_way_is_named_and_left(tmp_path, make):
    way = tmp_path / "latest.partial"
    make(way)
    assert run_folder.attempt(lambda: files.switch_link(tmp_path / "latest", "step-1")) == f"{way}: File exists"
    assert list(tmp_path.iterdir()) == [way]


def lock_of(run, **changes):
    return RunLock(dataclasses.replace(this_process(run), **changes), pytest.fail)


@pytest.mark.parametrize("error", [InputError("task", 1, "2"), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("is_there", [True, False])
def test_what_was_made_for_nothing_is_gone_and_nothing_else(tmp_path, error, is_there):
    folder = tmp_path / "runs" / "mine"
    if is_there:
        folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    def create():
        with run_folder.creating(Config(output=str(folder)), "digits", lock_of("mine")) as path:
            assert sorted(entry.name for entry in path.iterdir()) == ["checkpoints", "lock-000001", "metrics"]
            raise error

    with pytest.raises(InputError):
        create()
    assert sorted(tmp_path.rglob("*")) == before


def test_who_is_refused_touches_nothing(tmp_path, monkeypatch):
    """Also what the other has only just made, and is empty."""
    monkeypatch.setattr(run_lock, "_ENDING_S", 0.1)
    first = lock_of("first")
    with run_folder.creating(Config(output=str(tmp_path / "run")), "digits", first) as path:
        before = sorted(path.rglob("*"))
        config = Config(output=str(path), resume="auto")
        with pytest.raises(InputError, match="no other run uses"), run_folder.creating(config, "", lock_of("second")):
            pass
        assert sorted(path.rglob("*")) == before
    first.release()


def test_runs_without_a_name_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "now")
    paths = []
    for run in range(3):
        lock = lock_of(f"run {run}")
        with run_folder.creating(Config(), "digits", lock) as path:
            paths.append(path.name)
        lock.release()
    assert paths == ["digits-hier-avg-now", "digits-hier-avg-now~2", "digits-hier-avg-now~3"]
