"""Runs, their keys, the cache of their results, and who carries them out."""

import json
import os
import sys
import types

import pytest
from mpi4py import MPI

import hpcavg
from hpcavg.experiments import run as run_module
from hpcavg.experiments import runner
from hpcavg.experiments.cache import Cache
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Run

RUN = Run("fake:double", {"number": 3})


@pytest.fixture
def calls(monkeypatch):
    """Make the functions ``fake:double`` and ``fake:fail`` of runs; return the numbers with which they are called."""
    found = []

    def double(comm, folder, number):
        assert not folder.exists()
        folder.mkdir()
        print("a run's own output")
        found.append(number)
        return {"twice": 2 * number}

    def fail(comm, folder, number):
        raise hpcavg.InputError("k1", number, "a divisor of 4")

    module = types.ModuleType("fake")
    module.double, module.fail = double, fail
    monkeypatch.setitem(sys.modules, "hpcavg.experiments.functions.fake", module)
    return found


# -- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_tells_options_and_functions_apart():
    runs = [RUN, Run("fake:double", {"number": 4}), Run("fake:double", {"other": 3}), Run("fake:fail", {"number": 3})]
    assert len({run.key for run in runs}) == 4
    assert len({training(seed=seed, k=k).key for seed in (0, 1) for k in (2, 4)}) == 4


def test_a_key_knows_neither_the_work_nor_the_order_of_options():
    assert Run("f:g", {"a": 1, "b": 2}, work=9).key == Run("f:g", {"b": 2, "a": 1}).key


@pytest.mark.parametrize("name", ["averaging/rows.py", "experiments/functions/mine.py", "experiments/problems.py"])
def test_other_code_of_runs_has_other_keys(tmp_path, monkeypatch, name):
    monkeypatch.setattr(hpcavg, "__file__", str(tmp_path / "__init__.py"))
    digests = {run_module.code_digest.__wrapped__()}
    (tmp_path / name).parent.mkdir(parents=True)
    for text in ("x = 1", "x = 2"):
        (tmp_path / name).write_text(text)
        digests.add(run_module.code_digest.__wrapped__())
    assert len(digests) == 3


def test_rules_and_pages_may_change(tmp_path, monkeypatch):
    monkeypatch.setattr(hpcavg, "__file__", str(tmp_path / "__init__.py"))
    before = run_module.code_digest.__wrapped__()
    for name in ("experiments/page.py", "experiments/k_avg/figure.py", "cli/main.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    assert run_module.code_digest.__wrapped__() == before


# -- cache --------------------------------------------------------------------------------------------------------


def test_what_is_put_is_found_again(tmp_path):
    Cache(tmp_path).put(RUN, {"values": [1.5, None], "text": "é"}, 2.5)
    assert Cache(tmp_path).get(RUN) == {"values": [1.5, None], "text": "é"}
    (file,) = tmp_path.glob("*.json")
    about = json.loads(file.read_text())
    assert (about["function"], about["options"], about["seconds"]) == ("fake:double", {"number": 3}, 2.5)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"key": "0"}', None])
def test_a_damaged_file_is_no_result(tmp_path, capfd, content):
    cache, other = Cache(tmp_path), Run("fake:double", {"number": 4})
    cache.put(RUN, {"twice": 6}, 1.0)
    cache.put(other, {"twice": 8}, 1.0)
    path = tmp_path / f"{RUN.key}.json"
    path.write_bytes((tmp_path / f"{other.key}.json").read_bytes() if content is None else content)
    assert cache.missing([RUN, other, RUN]) == [RUN]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"hpcavg: warning: {path} is damaged")
    assert cache.missing([RUN]) == [RUN]
    assert capfd.readouterr().err == ""


def test_one_at_a_time_has_the_claim_of_a_run(tmp_path):
    one, other = Cache(tmp_path), Cache(tmp_path)
    claim = one.claim(RUN)
    assert claim is not None
    assert other.claim(RUN) is None
    other.remove_remains()
    assert other.claim(RUN) is None
    claim.release()
    again = other.claim(RUN)
    assert again is not None
    other.put(RUN, {"twice": 6}, 1.0)
    again.release()
    assert one.claim(RUN) is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([f"{RUN.key}.json", "under-way"])


@pytest.mark.parametrize("clean", [Cache.remove_remains, lambda cache: cache.claim(RUN)])
def test_what_a_killed_process_leaves_is_removed(tmp_path, clean):
    cache = Cache(tmp_path)
    claim = cache.claim(RUN)
    cache.folder_of(RUN).mkdir()
    (cache.folder_of(RUN) / "metrics").touch()
    os.close(claim._descriptor)  # as the end of a process does
    clean(cache)
    assert not cache.folder_of(RUN).exists()


# -- the runner ---------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_carried_out_the_heaviest_first(tmp_path, calls, capfd):
    runs = [Run("fake:double", {"number": number}, work) for number, work in ((1, 1), (2, 5), (3, 3), (2, 5))]
    cache = Cache(tmp_path)
    cache.put(Run("fake:double", {"number": 3}), {"twice": 6}, 1.0)
    runner.carry_out(runs, cache, MPI.COMM_SELF)
    assert calls == [2, 1]
    assert [cache.get(run) for run in runs] == [{"twice": 2 * n} for n in (1, 2, 3, 2)]
    assert capfd.readouterr().out == "2 runs to carry out\n"
    assert list((tmp_path / "under-way").iterdir()) == []
    runner.carry_out(runs, cache, MPI.COMM_SELF)
    assert calls == [2, 1]


def test_a_run_that_another_job_carries_out_is_waited_for(tmp_path, calls, monkeypatch):
    cache, other = Cache(tmp_path), Cache(tmp_path)
    claim, looks = other.claim(RUN), []

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            other.put(RUN, {"twice": 6}, 1.0)
            claim.release()

    monkeypatch.setattr(runner.time, "sleep", look)
    assert runner._claim_one([RUN], cache) is None
    assert len(looks) == 3


def test_a_run_that_fails_is_named_on_one_line(tmp_path, calls):
    with pytest.raises(RuntimeError) as raised:
        runner.carry_out([Run("fake:fail", {"number": 3})], Cache(tmp_path), MPI.COMM_SELF)
    assert str(raised.value) == "the run fake:fail with number=3 failed: k1=3: must be a divisor of 4"
    assert Cache(tmp_path).missing([Run("fake:fail", {"number": 3})]) != []


def test_progress_is_told_by_work_and_not_by_the_number_of_runs(tmp_path):
    cache = Cache(tmp_path)
    runs = [Run("fake:double", {"number": number}, work) for number, work in ((1, 1.0), (2, 3.0))]
    progress = runner._Progress(runs, cache)
    progress._started = runner.time.monotonic() - 30
    assert progress._state() == (0, "0 of 2 runs")
    cache.put(runs[1], {}, 1.0)
    part, text = progress._state()
    assert part == 0.75
    assert text == "1 of 2 runs, about 10 s left"
