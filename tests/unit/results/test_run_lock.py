"""The lock on a run's folder: one owner at a time, whoever dies, wherever and whenever."""

import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time

import pytest

from hpcavg.errors import InputError
from hpcavg.results import run_folder, run_lock
from hpcavg.results.run_lock import RunLock, owners, this_process
from hpcavg.utils import files

ELSEWHERE = "another machine pid:[1]"


@pytest.fixture(autouse=True)
def _short_times(monkeypatch):
    for name, seconds in {
        "_ENDING_S": 0.1,
        "BEAT_S": 0.05,
        "SILENT_S": 0.4,
        "_TELL_S": 0.1,
        "_LOOK_S": 0.02,
        "_AGAIN_S": 0.05,
    }.items():
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def make_lock():
    made = []

    def make(run="this", has_heirs=False, on_lost=pytest.fail, **changes):
        made.append(RunLock(dataclasses.replace(this_process(run, has_heirs), **changes), on_lost))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(lock, folder):
    with pytest.raises(InputError) as caught:
        lock.take(folder)
    assert not lock.is_held
    return caught.value.as_option()


def left_by(owner, folder, number=1):
    """Write the lock of an owner who is not heard of again."""
    path = folder / f"lock-{number:06d}"
    path.write_bytes(owner.to_bytes() if isinstance(owner, run_lock.Owner) else owner)
    return path


def dead_process():
    process = subprocess.Popen(["sleep", "60"])
    ticks = run_lock.started_ticks(process.pid)
    process.kill()
    return process, ticks


def test_a_folder_is_one_runs_until_it_is_released(tmp_path, make_lock):
    first, second = make_lock("first"), make_lock("second")
    first.take(tmp_path)
    first.take(tmp_path)
    assert names(tmp_path) == ["lock-000001"]
    who = f"process {os.getpid()} on {os.uname().nodename}"
    line = f"--output {tmp_path}: must be a folder that no other run uses; {who} does"
    assert refusal(second, tmp_path) == line
    assert names(tmp_path) == ["lock-000001"]
    first.release()
    first.release()
    assert names(tmp_path) == []
    second.take(tmp_path)
    assert [owner.run for owner in owners(tmp_path)] == ["second"]


@pytest.mark.parametrize("is_buried", [True, False])
def test_a_dead_process_owns_nothing(tmp_path, make_lock, is_buried):
    process, ticks = dead_process()
    if is_buried:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    left_by(dataclasses.replace(this_process("dead"), pid=process.pid, started_ticks=ticks), tmp_path)
    lock, began = make_lock(), time.monotonic()
    lock.take(tmp_path)
    assert time.monotonic() - began < run_lock.SILENT_S / 2
    assert names(tmp_path) == ["lock-000002"]
    process.wait()


def test_a_process_that_is_about_to_end_is_awaited(tmp_path, make_lock, monkeypatch):
    monkeypatch.setattr(run_lock, "_ENDING_S", 10)
    process = subprocess.Popen(["sleep", "0.3"])
    ticks = run_lock.started_ticks(process.pid)
    left_by(dataclasses.replace(this_process("ending"), pid=process.pid, started_ticks=ticks), tmp_path)
    make_lock().take(tmp_path)
    assert names(tmp_path) == ["lock-000002"]
    process.wait()


def test_a_later_process_of_the_same_number_is_another(tmp_path, make_lock):
    left_by(dataclasses.replace(this_process("dead"), started_ticks=1), tmp_path)
    make_lock().take(tmp_path)
    assert names(tmp_path) == ["lock-000002"]


def test_a_process_that_only_stopped_lives(tmp_path, make_lock):
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        ticks = run_lock.started_ticks(process.pid)
        left_by(dataclasses.replace(this_process("stopped"), pid=process.pid, started_ticks=ticks), tmp_path)
        assert f"process {process.pid} on " in refusal(make_lock(), tmp_path)
    finally:
        process.kill()
        process.wait()


ABROAD = [
    dataclasses.replace(this_process("abroad"), machine=ELSEWHERE, pid=1, host="node7", job="Slurm job 17"),
    dataclasses.replace(this_process("unknown"), machine="", host="node7"),
    dataclasses.replace(this_process("heirs", has_heirs=True), started_ticks=1),
    b"",
    b"\0" * 100,
    b'{"run": 1}',
    b"notes of a user",
]


@pytest.mark.parametrize("owner", ABROAD)
def test_who_cannot_be_looked_at_is_dead_when_its_heart_is_silent(tmp_path, make_lock, monkeypatch, owner):
    said = []
    monkeypatch.setattr(run_lock, "print_error", said.append)
    path = left_by(owner, tmp_path)
    lock, began = make_lock(), time.monotonic()
    lock.take(tmp_path)
    assert time.monotonic() - began > run_lock.SILENT_S
    (told,) = said
    assert told.startswith(f"hpcavg: {path} is ")
    assert ("process 1 on node7 (Slurm job 17)" in told) == (owner is ABROAD[0])
    is_somebodys = owner in ABROAD[-2:]  # they stay, and are in nobody's way
    assert names(tmp_path) == ["lock-000001"] * is_somebodys + ["lock-000002"]


@pytest.mark.parametrize("owner", ABROAD)
def test_who_cannot_be_looked_at_lives_when_its_heart_beats(tmp_path, make_lock, owner):
    path = left_by(owner, tmp_path)
    before = path.read_bytes()
    beat = threading.Timer(0.2, lambda: os.utime(path, (1, 1)))  # as another host's clock may have it
    beat.start()
    line = refusal(make_lock(), tmp_path)
    beat.join()
    assert line.startswith(f"--output {tmp_path}: must be a folder that no other run uses; ")
    assert ("process 1 on node7 (Slurm job 17) does" in line) == (owner is ABROAD[0])
    assert (names(tmp_path), path.read_bytes()) == (["lock-000001"], before)


def test_a_heart_beats(tmp_path, make_lock):
    make_lock("abroad", machine=ELSEWHERE).take(tmp_path)
    assert f"process {os.getpid()} on " in refusal(make_lock(), tmp_path)


def test_one_that_is_released_meanwhile_is_free(tmp_path, make_lock):
    path = left_by(ABROAD[0], tmp_path)
    threading.Timer(0.1, path.unlink).start()
    began = time.monotonic()
    make_lock().take(tmp_path)
    assert time.monotonic() - began < run_lock.SILENT_S
    assert len(names(tmp_path)) == 1


def test_who_comes_late_to_a_dead_owners_lock_harms_no_heir(tmp_path, make_lock, monkeypatch):
    """Between its look and its claim others have come and gone, and one has the lock that is now free again."""
    late, quick = make_lock("late"), make_lock("quick")
    left_by(dataclasses.replace(this_process("dead"), started_ticks=1), tmp_path)
    claim = late._claim

    def claim_late(*arguments):
        monkeypatch.setattr(late, "_claim", claim)
        (tmp_path / "lock-000001").unlink()
        quick.take(tmp_path)
        return claim(*arguments)

    monkeypatch.setattr(late, "_claim", claim_late)
    assert f"process {os.getpid()} on " in refusal(late, tmp_path)
    quick.beat()
    assert [owner.run for owner in owners(tmp_path)] == ["quick"]


def test_what_only_looks_like_a_lock_is_none(tmp_path, make_lock):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock-000003").mkdir()
    (folder / "lock-000005").symlink_to(left_by(dataclasses.replace(this_process("dead"), started_ticks=1), tmp_path))
    (folder / "lock-7").write_text("mine")
    (folder / "lock-000009.bak").write_text("mine")
    before = names(folder)
    lock = make_lock()
    lock.take(folder)
    assert [owner.run for owner in owners(folder)] == ["this"]
    assert set(names(folder)) - set(before) == {"lock-000006"}
    lock.release()
    assert names(folder) == before


@pytest.mark.parametrize("number", [999_999, 10**18 - 1, 10**40])
def test_there_is_always_a_next_number(tmp_path, make_lock, number):
    """Else the lock after it would be none, and two runs would have the folder."""
    left_by(dataclasses.replace(this_process("dead"), started_ticks=1), tmp_path, number)
    make_lock().take(tmp_path)
    assert names(tmp_path) == [f"lock-{number + 1}"]
    assert f"process {os.getpid()} on " in refusal(make_lock("other"), tmp_path)


@pytest.mark.parametrize("refused", [os.open, os.write, os.fsync, os.unlink])
def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path, make_lock, monkeypatch, refused):
    """Nothing is taken over where the dead one's lock cannot be removed: it might not be dead, but far away."""
    left_by(dataclasses.replace(this_process("dead"), started_ticks=1), tmp_path)

    def perform(call, *arguments):
        if call is refused and not (call is os.unlink and str(arguments[0]).endswith("2")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "here")
        return call(*arguments)

    monkeypatch.setattr(files, "perform", perform)
    line = f"--output {tmp_path}: must be a folder that can be written (here: Read-only file system)"
    assert refusal(make_lock(), tmp_path) == line
    assert names(tmp_path) == ["lock-000001"]


# -- owners that come late, or leave heirs ------------------------------------------------------------------------


def told_by(make_lock, folder):
    told = []
    lock = make_lock(on_lost=told.append)
    lock.take(folder)
    return lock, told


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_finds_another_in_its_folder_is_told(tmp_path, make_lock):
    """As a run that was stopped for minutes."""
    lock, told = told_by(make_lock, tmp_path)
    (tmp_path / "lock-000001").unlink()
    left_by(ABROAD[0], tmp_path, 2)
    wait_until(lambda: told)
    who = "process 1 on node7 (Slurm job 17)"
    assert told[0] == f"--output {tmp_path}: taken over by {who}, when this run had not moved for a while; it ends"
    lock.release()
    assert names(tmp_path) == ["lock-000002"]


def test_who_finds_another_under_its_own_number_is_told(tmp_path, make_lock):
    lock, told = told_by(make_lock, tmp_path)
    left_by(ABROAD[0], tmp_path, 1)
    wait_until(lambda: told)
    lock.release()
    assert names(tmp_path) == ["lock-000001"]


def test_a_lock_that_somebody_removed_is_missed_the_second_time(tmp_path, make_lock):
    lock, told = told_by(make_lock, tmp_path)
    (tmp_path / "lock-000001").unlink()
    wait_until(lambda: told)
    assert "somebody who removed its lock" in told[0]
    lock.release()


def test_a_folder_that_is_gone_is_no_matter_of_the_lock(tmp_path, make_lock):
    (tmp_path / "run").mkdir()
    lock, told = told_by(make_lock, tmp_path / "run")
    (tmp_path / "run" / "lock-000001").unlink()
    (tmp_path / "run").rmdir()
    time.sleep(0.3)
    assert told == []
    lock.release()


def test_an_heir_goes_on(tmp_path, make_lock):
    """Rank 0 has died, and the one that is rank 0 now has the lock; a rank that had it keeps it."""
    left_by(dataclasses.replace(this_process("run", has_heirs=True), started_ticks=1), tmp_path)
    heir = make_lock("run", has_heirs=True)
    heir.inherit(tmp_path)
    wait_until(lambda: names(tmp_path) == ["lock-000002"])
    heir.inherit(tmp_path)
    assert f"process {os.getpid()} on " in refusal(make_lock("other"), tmp_path)
    heir.release()
    assert names(tmp_path) == []


def test_an_heir_of_one_that_died_after_its_release_goes_on(tmp_path, make_lock):
    heir = make_lock("run", has_heirs=True)
    heir.inherit(tmp_path)
    wait_until(lambda: names(tmp_path) == ["lock-000001"])
    time.sleep(0.2)
    heir.release()
    assert names(tmp_path) == []


def test_an_heir_that_comes_too_late_is_told(tmp_path, make_lock):
    told = []
    make_lock("other").take(tmp_path)
    heir = make_lock("run", has_heirs=True, on_lost=told.append)
    heir.inherit(tmp_path)
    wait_until(lambda: told)
    heir.release()
    assert [owner.run for owner in owners(tmp_path)] == ["other"]


@pytest.mark.parametrize(
    ("error", "has_heirs", "is_kept"),
    [(InputError("k", 1, "2"), True, False), (OSError(), False, False), (OSError(), True, True)],
)
def test_a_failure_releases_it_unless_others_go_on(tmp_path, make_lock, error, has_heirs, is_kept):
    lock = make_lock(has_heirs=has_heirs)
    lock.take(tmp_path)
    with pytest.raises(type(error)), lock:
        raise error
    assert lock.is_held == is_kept


# -- races --------------------------------------------------------------------------------------------------------


def run_for(folder, number, barrier, results, draw):
    lock = RunLock(this_process(f"racer {number}"), results.put)
    barrier.wait()
    time.sleep(draw.choice([0, 0, 0.001, 0.01]))
    try:
        lock.take(folder)
    except InputError as error:
        results.put(error.as_option())
    else:
        results.put(os.getpid())
        barrier.wait(10)  # when all the others were refused
        lock.release()
        return
    barrier.wait(10)


@pytest.mark.parametrize("number", range(20))
def test_of_many_at_once_one_wins(tmp_path, number):
    """With nothing there, a dead owner's lock, or one that its owner has only begun to write."""
    if number % 3 == 1:
        left_by(dataclasses.replace(this_process("dead"), started_ticks=1), tmp_path)
    elif number % 3 == 2:
        left_by(b"", tmp_path)
    context, draw = multiprocessing.get_context("fork"), random.Random(number)
    barrier, results = context.Barrier(6), context.Queue()
    racers = [
        context.Process(target=run_for, args=(tmp_path, one, barrier, results, random.Random(draw.random())))
        for one in range(6)
    ]
    for racer in racers:
        racer.start()
    ends = [results.get(timeout=20) for _ in racers]
    for racer in racers:
        racer.join(20)
    winners = [end for end in ends if isinstance(end, int)]
    assert len(winners) == 1, ends
    assert sum(f"process {winners[0]} on " in end for end in ends if isinstance(end, str)) == 5, ends
    assert names(tmp_path) == []


# -- folders ------------------------------------------------------------------------------------------------------


def test_locks_make_no_folder_anothers(tmp_path):
    left_by(ABROAD[0], tmp_path)
    run_folder.check(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"another run would \(that of process 1 on node7 \(Slurm job 17\)\)"):
        run_folder.check(tmp_path)
