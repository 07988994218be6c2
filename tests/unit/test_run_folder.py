"""What a run leaves beside its metrics: whole files, or the reason why not."""

import os

import pytest

from hpcavg import files, run_folder
from hpcavg.errors import InputError


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    run_folder.write_json(path, {"loss": float("nan")})
    run_folder.write_json(path, {"loss": 1.0})
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
        return run_folder.attempt(lambda: run_folder.write_json(path, {}))

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
