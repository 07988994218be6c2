"""What --resume takes for a checkpoint to go on from, and what it refuses; with one learner, in this process."""

import errno
import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from hpcavg import Topology
from hpcavg.averaging.delayed import Delayed
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.checkpoints import store
from hpcavg.checkpoints.manager import CheckpointManager
from hpcavg.cli import parsers
from hpcavg.config.options import Config
from hpcavg.config.sources import tomllib
from hpcavg.distributed.preemption import Pause, PauseKind
from hpcavg.errors import InputError
from hpcavg.results import report
from hpcavg.results.view import read_attributes
from hpcavg.tasks import Data, digits
from hpcavg.training.trainer import Trainer
from hpcavg.utils import files
from tests.process.resuming import differences, outcome

RUN = "--model mlp --batch-size 128 --algorithm dasgd --tau 4 --delay 3 --checkpoint-minutes 0 --threads 1"
FAILED, REQUEUE = 1, 75


def train(folder, arguments, stop=False, failing=None):
    """Train, up to the end or only one step, or until the evaluation `failing` raises; return the trainer."""
    trainer = Trainer(parsers.parse_train([*f"{RUN} {arguments}".split(), "--output", str(folder)]))

    def prepare(loop):
        evaluate, count = loop._evaluate, None if failing is None else iter(range(failing))

        def fail(what):
            if count is not None and next(count, None) is None:
                raise RuntimeError("out of memory")
            return evaluate(what)

        loop._evaluate = fail
        if stop:
            loop._pauses.request(PauseKind.STOP, "a test")
            until = time.monotonic() + 20
            while loop._pauses._target_step is None and time.monotonic() < until:  # the thread is on its way
                time.sleep(0.001)

    trainer._make_loop = prepared(trainer._make_loop, prepare)
    trainer.status = trainer.train()
    return trainer


def prepared(make_loop, prepare):
    """Return a function that makes the loop and changes it by `prepare`."""

    def make():
        loop = make_loop()
        prepare(loop)
        return loop

    return make


def refusal(folder, arguments):
    with pytest.raises(InputError) as caught:
        Trainer(parsers.parse_train([*f"{RUN} {arguments}".split(), "--output", str(folder)]))
    line = caught.value.as_option()
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of two epochs, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(folder, "--epochs 2 --checkpoint-steps 5 --keep-checkpoints 9")
    assert [path.name for path in sorted(folder.glob("checkpoints/step-*"))] == [
        *(f"step-{step:08d}" for step in (5, 10, 15, 20, 24))
    ]
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def test_every_file_of_a_run_carries_its_format(finished):
    assert tomllib.loads((finished / "config.toml").read_text())["format"] == 1
    assert json.loads((finished / "summary.json").read_text())["format"] == 1
    assert json.loads((finished / "checkpoints" / "latest" / "manifest.json").read_text())["format"] == 1
    assert [read_attributes(path)["format"] for path in (finished / "metrics").glob("*.h5")] == [1, 1]


@pytest.mark.parametrize("way", ["auto", ".", "checkpoints/latest", "checkpoints/step-00000010"])
def test_ways_to_name_a_checkpoint(finished, run, way):
    trainer = train(run, f"--epochs 2 --resume {way if way == 'auto' else run / way}")
    assert trainer.status == 0
    assert differences(outcome(finished), outcome(run)) == []


def test_the_folder_is_that_of_the_run_that_is_named(finished, run):
    trainer = Trainer(parsers.parse_train(["--resume", str(run / "checkpoints" / "step-00000015")]))
    assert trainer.path == run
    assert trainer.averager.progress.step == 15
    assert trainer.train() == 0
    assert differences(outcome(finished), outcome(run)) == []


def test_a_run_does_not_go_on_with_other_data(run, monkeypatch):
    data = digits.load_data()
    monkeypatch.setattr(digits, "load_data", lambda: Data(data[0][:-1], data[1][:-1], *data[2:]))
    with pytest.raises(InputError, match=r"1440 training samples, as in the run that .* is of, not 1439"):
        train(run, "--epochs 2 --resume auto")


def test_a_run_may_go_on_in_another_folder(finished, run, tmp_path):
    train(tmp_path / "other", f"--epochs 2 --resume {run}/checkpoints/step-00000010")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (finished, tmp_path / "other")]
    for name in ("parameters_sha256", "samples", "steps", "global_averages", "test_loss", "train_loss"):
        assert summaries[0][name] == summaries[1][name], name


def test_auto_where_nothing_is_starts_afresh_and_goes_on_from_there(finished, tmp_path):
    folder = tmp_path / "new"
    for _ in range(3):
        assert train(folder, "--epochs 2 --resume auto", stop=True).status == REQUEUE
    assert not (folder / "summary.json").exists()
    assert train(folder, "--epochs 2 --resume auto").status == 0
    assert differences(outcome(finished), outcome(folder)) == []
    report.main([str(folder)], None)


# In each epoch two, of the learners' own models and of the mean. Of the last epoch the model is the final one.
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_an_evaluation_that_dies_loses_nothing(finished, tmp_path, failing):
    options = "--epochs 2 --checkpoint-steps 6 --resume auto"
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path / "run", options, failing=failing)
    saved, _ = store.newest(tmp_path / "run" / "checkpoints")
    assert saved.manifest.step == 12 * (1 + failing // 2)
    train(tmp_path / "run", options)
    assert differences(outcome(finished), outcome(tmp_path / "run")) == []


@pytest.mark.parametrize("step", [11, 12, 13])
def test_a_stop_about_an_epochs_end_neither_loses_nor_doubles_its_evaluation(finished, tmp_path, capsys, step):
    options = f"--epochs 2 --stop-after 1000000 --resume auto --checkpoint-steps {step}"
    trainer = Trainer(parsers.parse_train([*f"{RUN} {options}".split(), "--output", str(tmp_path / "run")]))

    def ask(loop):
        loop._pauses.end_step = lambda taken: Pause(PauseKind.STOP, "a test") if taken == step else None

    trainer._make_loop = prepared(trainer._make_loop, ask)
    assert trainer.train() == REQUEUE
    assert trainer.averager.progress.step == step
    train(tmp_path / "run", "--epochs 2 --resume auto")
    assert capsys.readouterr().out.count("epoch   1 ") == 1
    assert differences(outcome(finished), outcome(tmp_path / "run")) == []


def test_a_finished_run_ends_at_once_with_the_same_result(finished, run):
    for _ in range(2):
        assert train(run, "--epochs 2 --resume auto").state.totals.samples == [2 * 1440]
        assert differences(outcome(finished), outcome(run)) == []


@pytest.mark.parametrize("longer", ["--epochs 4", "--epochs 3 --stop-after 1000000"])
def test_a_finished_run_may_go_on_to_more_epochs(run, tmp_path, longer):
    train(run, f"{longer} --resume auto")
    train(tmp_path / "long", longer)
    assert differences(outcome(tmp_path / "long"), outcome(run)) == []


def test_another_length_is_told(run, capsys):
    train(run, "--epochs 3 --resume auto")
    assert "warning: --epochs is 3; in the run so far it was 2\n" in capsys.readouterr().out
    train(run, "--epochs 3 --resume auto")
    assert "warning: --" not in capsys.readouterr().out


def test_a_schedule_laid_out_for_the_length_refuses_another(tmp_path):
    options = "--schedule one-cycle --steps"
    train(tmp_path / "run", f"{options} 10", stop=True)
    line = refusal(tmp_path / "run", f"{options} 20 --resume auto")
    assert line == "--steps 20: must be 10: the one-cycle schedule is laid out for the run's length"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ("--algorithm k-avg --tau unset --delay unset", "--algorithm k_avg: must be dasgd, as in the run that "),
        ("--tau 5", "--tau 5: must be 4, as in the run that "),
        ("--batch-size 64", "--batch-size 64: must be 128, as in the run that "),
        ("--seed 7", "--seed 7: must be 0, as in the run that "),
        ("--optimizer adam", "--optimizer adam: must be sgd, as in the run that "),
        ("--dtype float64", "--dtype float64: must be float32, as in the run that "),
        ("--drop-last", "--drop-last True: must be False, as in the run that "),
        ("--buffers keep", "--buffers keep: must be average, as in the run that "),
        ("--model cnn", "--model cnn: must be mlp, as in the run that "),
    ],
)
def test_another_run_is_refused(run, changed, line):
    before = sorted(path for path in run.rglob("*"))
    assert refusal(run, f"--epochs 2 --resume auto {changed}").startswith(line)
    assert sorted(path for path in run.rglob("*")) == before


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_one_is_passed_over_and_told(finished, run, capsys):
    damage(run / "checkpoints/step-00000024/rank-00000.safetensors")
    (run / "checkpoints/step-00000020/manifest.json").unlink()
    train(run, "--epochs 2 --resume auto")
    shown = capsys.readouterr().out
    why = "rank-00000.safetensors is damaged: its checksum is another"
    assert f"warning: passed over step-00000024: {why}" in shown
    assert "warning: passed over step-00000020: it has no manifest.json: it was not finished" in shown
    assert "going on from step 15" in shown
    assert differences(outcome(finished), outcome(run)) == []


def test_a_damaged_one_that_is_named_is_refused(run):
    damage(run / "checkpoints/step-00000010/rank-00000.safetensors")
    line = refusal(run, f"--epochs 2 --resume {run}/checkpoints/step-00000010")
    assert line.startswith(f"--resume {run}/checkpoints/step-00000010: must be a whole checkpoint (")


@pytest.mark.parametrize("is_only_one", [True, False])
def test_a_folder_that_cannot_be_read_is_named(finished, run, monkeypatch, capsys, is_only_one):
    """As of another user. Nothing starts over where it may be the only one that is good, and it stays."""
    if is_only_one:
        for path in run.glob("checkpoints/step-*"):
            if path.name != "step-00000024":
                shutil.rmtree(path)
    open_file = files.open_file

    def refuse(path):
        if "step-00000024" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path)

    monkeypatch.setattr(files, "open_file", refuse)
    if is_only_one:
        line = refusal(run, "--epochs 2 --resume auto")
        assert "(step-00000024: manifest.json: Permission denied); to start over, remove them" in line
        return
    train(run, "--epochs 2 --resume auto --keep-checkpoints 1")
    assert "warning: passed over step-00000024: manifest.json: Permission denied" in capsys.readouterr().out
    assert differences(outcome(finished), outcome(run)) == []
    assert (run / "checkpoints" / "step-00000024" / "manifest.json").exists()


@pytest.mark.parametrize("way", ["auto", "folder"])
def test_where_all_are_damaged_nothing_starts_over(run, way):
    for path in run.glob("checkpoints/step-*"):
        damage(path / "manifest.json")
    line = refusal(run, f"--epochs 2 --resume {run if way == 'folder' else way}")
    assert line.startswith(f"--resume {run if way == 'folder' else way}: must be ")
    assert line.count("manifest.json is damaged") == 5


def test_where_none_was_ever_finished_auto_starts_afresh(finished, run):
    for path in run.glob("checkpoints/step-*/manifest.json"):
        path.unlink()
        path.with_name("unfinished-1").touch()
    train(run, "--epochs 2 --resume auto --checkpoint-steps 5 --keep-checkpoints 1")
    assert differences(outcome(finished), outcome(run)) == []
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000024"]


@pytest.mark.parametrize("resume", ["auto", "here", "missing"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, resume):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.tex").touch()
    line = refusal(tmp_path / "here", f"--resume {tmp_path / resume if resume != 'auto' else resume}")
    assert line.startswith("--output" if resume == "auto" else "--resume"), line
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["thesis.tex"]


def test_checkpoints_by_the_clock_and_how_many_are_kept(tmp_path):
    train(tmp_path / "run", "--epochs 2 --checkpoint-minutes 0.000001 --keep-checkpoints 3")
    kept = sorted(path.name for path in tmp_path.glob("run/checkpoints/step-*"))
    assert len(kept) == 3
    assert kept[-1] == "step-00000024"


def refuse_from(monkeypatch, is_refused):
    """Let calls that change files fail from the first one on for which `is_refused` holds."""
    make_the_call, has_begun = files.perform, []

    def perform(call, *arguments):
        if (has_begun and "lock-" not in str(arguments[0])) or is_refused(call, *arguments):
            has_begun.append(True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return make_the_call(call, *arguments)

    monkeypatch.setattr(files, "perform", perform)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_stop_whose_checkpoint_cannot_be_written_has_failed(finished, run, tmp_path, is_first, monkeypatch, capsys):
    """To be started again would be to go on from an older one, or from the start, without a word."""
    folder = tmp_path / "new" if is_first else run
    if is_first:
        refuse_from(monkeypatch, lambda call, path, *_: call is os.mkdir and "step-" in str(path))
    else:
        refuse_from(monkeypatch, lambda call, path, *_: call is os.replace and "manifest.json" in str(path))
    assert train(folder, "--epochs 3 --resume auto", stop=True).status == FAILED
    step, refused = (1, "step-00000001") if is_first else (25, "step-00000025/manifest.json")
    kept = f"the last good one: {run}/checkpoints/step-00000024"
    kept = "there is no checkpoint to go on from" if is_first else kept
    why = f"{folder}/checkpoints/{refused}: No space left on device"
    line = f"stopped at step {step} by a test; its checkpoint could not be written ({why}); {kept}\n"
    assert line in capsys.readouterr().out
    monkeypatch.undo()
    assert train(folder, "--epochs 2 --resume auto").status == 0
    assert differences(outcome(finished), outcome(folder)) == []


@pytest.mark.parametrize("is_stopped", [True, False])
def test_what_cannot_be_removed_fails_no_checkpoint(tmp_path, is_stopped, monkeypatch, capsys):
    """As on NFS, where another node still reads a file of it."""
    make_the_call = files.perform

    def perform(call, *arguments):
        if call is os.unlink and "step-00000002" in str(arguments[0]):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(arguments[0]))
        return make_the_call(call, *arguments)

    monkeypatch.setattr(files, "perform", perform)
    options = "--steps 9 --checkpoint-steps 2 --keep-checkpoints 1 --resume auto"
    train(tmp_path, f"{options} --steps 2")
    trainer = train(tmp_path, options, stop=is_stopped)
    step = trainer.averager.progress.step  # the thread may be late
    assert trainer.status == (REQUEUE if is_stopped else 0)
    shown, checkpoints = capsys.readouterr().out, tmp_path / "checkpoints"
    assert shown.count("warning: an old checkpoint cannot be removed") == 1
    assert f"{checkpoints}/step-00000002/rank-00000.safetensors: Device or resource busy" in shown
    assert "not recorded" not in shown
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000002", f"step-0000000{step}"]
    assert os.readlink(checkpoints / "latest") == trainer._checkpoints.last.name == f"step-0000000{step}"
    if is_stopped:
        assert f"go on with --resume {checkpoints}/step-0000000{step}\n" in shown


# The device "meta" stands for a GPU: what is on another one cannot be computed with what is there.


@pytest.mark.parametrize("is_of_as_many", [True, False])
def test_losses_go_to_the_device(run, is_of_as_many):
    """Also those of an epoch that was over and not evaluated, where other numbers of learners go on."""
    trainer = Trainer(parsers.parse_train(["--resume", str(run / "checkpoints" / "step-00000010")]))
    trainer.lock.release()
    saved, state = trainer._found.checkpoint, trainer.state
    state.device = torch.device("meta")
    state.is_of_as_many = lambda saved: is_of_as_many
    saved.manifest.about["steps_per_epoch"] = 10
    state.go_on_from(saved)
    (losses,) = state.losses
    assert len(losses) == 10
    assert torch.stack([*losses, torch.ones((), device="meta")]).is_meta


def test_a_mean_in_flight_goes_to_the_device():
    topology = Topology()
    flat, engine = FlatBuffer([("w", torch.zeros(3, device="meta"))]), SimpleNamespace(allocate=lambda array: array)
    delayed = Delayed([flat], engine, topology)
    known = {"step": 4, "period_steps": 4, "num_bytes": 12, "num_members": 1, "is_sick": False}
    means = [torch.zeros_like(array[0], device="cpu") for array in (*flat.arrays, *flat.arrays)]
    delayed.load_state_dicts([{**known, "means": means}])
    assert [mean.is_meta for mean in delayed.flight.pending.wait()] == [True, True]
    topology.free()


@pytest.mark.parametrize(("algorithm", "is_overdue"), [("k-avg", True), ("downpour", False)])
def test_the_clock_asks_for_none_where_servers_keep_the_state(tmp_path, algorithm, is_overdue):
    config = Config(algorithm=algorithm, checkpoint_minutes=1e-9)
    averager = SimpleNamespace(topology=SimpleNamespace(rank=0), agreed_step=0, algorithm=config.rule())
    assert CheckpointManager(config, averager, tmp_path, None, print).is_overdue is is_overdue
