"""Checkpoints: whole or not there, whatever happens while they are written, and every damage is noticed."""

import errno
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from contextlib import suppress

import pytest
import torch
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.checkpoints import collective, store
from hpcavg.checkpoints.store import LATEST, Manifest, discard, load_model, newest, open_checkpoint, prune, save_model
from hpcavg.checkpoints.tensor_file import digest
from hpcavg.errors import InputError
from hpcavg.utils import files

NUM_RANKS = 3


def state(step, rank):
    """Return the parts of a rank: all ranks have equal models, and ranks 0 and 1 equal optimizers."""
    return {
        "model": {"w": torch.full((2, 3), float(step)), "n": torch.tensor(step)},
        "optimizer": {"state": {0: torch.full((2,), step + (rank == 2) / 2)}},
        "loop": {"step": step, "rank": rank, "loss": 1 / step},
    }


PARTS = [
    {"model": 0, "optimizer": 0, "loop": 0},
    {"model": 0, "optimizer": 0, "loop": 1},
    {"model": 0, "optimizer": 2, "loop": 2},
]


def write(folder, step):
    """Write a checkpoint as a run does, up to its manifest."""
    path = store.create(folder, step, NUM_RANKS)
    records = []
    for rank in range(NUM_RANKS):
        stored = {part: tree for part, tree in state(step, rank).items() if PARTS[rank][part] == rank}
        records.append(store.write_rank(path, rank, stored))
    return path, Manifest(step, NUM_RANKS, records, PARTS, {"algorithm": "dasgd"})


def take(folder, step, keep=99):
    path, manifest = write(folder, step)
    store.commit(path, manifest)
    prune(folder, keep)
    return path


def holds(found, step):
    """Whether a checkpoint is that of `step`, in every bit of every rank."""
    loaded = [digest(found.load(rank)) for rank in range(NUM_RANKS)]
    return found.manifest.step == step and loaded == [digest(state(step, rank)) for rank in range(NUM_RANKS)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- what is written is found -------------------------------------------------------------------------------------


def test_every_rank_gets_its_parts_wherever_they_are(tmp_path):
    path = take(tmp_path, 120)
    assert path.name == "step-00000120"
    assert names(path) == ["manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(NUM_RANKS))]
    found, passed_over = newest(tmp_path)
    assert found.path == path
    assert passed_over == []
    assert found.manifest.about == {"algorithm": "dasgd"}
    assert holds(found, 120)
    assert holds(open_checkpoint(tmp_path / LATEST, verify=False), 120)
    assert list(found.load(1, ["loop"])) == ["loop"]


def test_the_newest_is_the_one_that_was_written_last(tmp_path):
    assert newest(tmp_path) == newest(tmp_path / "missing") == (None, [])
    paths = [take(tmp_path, step) for step in (9, 10, 9, *[10] * 10)]
    assert [path.name for path in paths[1:5]] == [
        "step-00000010",
        "step-00000009~2",
        "step-00000010~2",
        "step-00000010~3",
    ]
    assert newest(tmp_path)[0].path == open_checkpoint(tmp_path / LATEST).path == tmp_path / "step-00000010~11"
    path = take(tmp_path, 7)
    assert newest(tmp_path)[0].path == open_checkpoint(tmp_path / LATEST).path == path


def test_what_is_not_whole_is_passed_over_and_told(tmp_path):
    for step in (1, 2, 3, 4):
        take(tmp_path, step)
    write(tmp_path, 5)
    (tmp_path / "step-00000004" / "rank-00001.safetensors").unlink()
    (tmp_path / "step-00000003" / "rank-00002.safetensors").write_bytes(b"short")
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "final.safetensors").touch()
    found, passed_over = newest(tmp_path)
    assert holds(found, 1)
    assert [(path.name, reason) for path, reason in passed_over] == [
        ("step-00000009", "there is no such folder"),
        ("step-00000005", "it has no manifest.json: it was not finished"),
        ("step-00000002", "manifest.json is damaged"),
        ("step-00000004", "rank-00001.safetensors: No such file or directory"),
        ("step-00000003", "rank-00002.safetensors has 5 bytes and was written with 304"),
    ]
    for path, reason in passed_over:
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        assert caught.value.as_option() == f"--resume {path}: must be a whole checkpoint ({reason})"


@pytest.mark.parametrize("name", ["missing", "", "\0", "pipe", "loop", "full/step-00000001", "x" * 300])
def test_what_is_no_checkpoint_is_refused(name, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "full").touch()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "manifest.json")
    with pytest.raises(InputError, match="must be a whole checkpoint"):
        open_checkpoint(tmp_path / name)


def test_ranks_share_the_work_of_looking(tmp_path):
    path = take(tmp_path, 1)
    (path / "rank-00002.safetensors").write_bytes(b"")
    found = open_checkpoint(path, verify=False)
    assert [found.fault(rank, 2) is None for rank in range(2)] == [False, True]


def test_a_manifest_names_the_files_it_needs(tmp_path):
    _, manifest = write(tmp_path, 1)
    for parts in (PARTS[:2], [*PARTS[:2], {"model": 7}]):
        with pytest.raises(ValueError, match="the parts of every rank"):
            Manifest(1, NUM_RANKS, manifest.files, parts, {})


# -- removing -----------------------------------------------------------------------------------------------------


def test_the_newest_stay(tmp_path):
    for step in (1, 2):
        take(tmp_path, step)
    write(tmp_path, 2)
    write(tmp_path, 8)
    take(tmp_path, 3, keep=2)
    assert names(tmp_path) == [LATEST, "step-00000002", "step-00000003"]
    take(tmp_path, 1, keep=1)
    assert names(tmp_path) == [LATEST, "step-00000001"]


def test_the_latest_stays_also_where_its_manifest_is_damaged(tmp_path):
    for step in (10, 20):
        take(tmp_path, step)
    (tmp_path / "step-00000020" / "manifest.json").write_text("{}")
    prune(tmp_path, 1)
    assert names(tmp_path) == [LATEST, "step-00000010", "step-00000020"]


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path, monkeypatch):
    paths = [take(tmp_path, step) for step in (1, 2, 3)]

    def refuse(call, *arguments):
        if call is os.unlink and arguments[0] == paths[1] / "rank-00001.safetensors":
            raise OSError(errno.EACCES, "mine", str(arguments[0]))
        return call(*arguments)

    monkeypatch.setattr(files, "perform", refuse)
    assert prune(tmp_path, 1) == [f"{paths[1]}/rank-00001.safetensors: Permission denied"]
    assert names(tmp_path) == [LATEST, "step-00000002", "step-00000003"]
    assert "manifest.json" not in names(paths[1])
    monkeypatch.undo()
    assert prune(tmp_path, 1) == []
    assert names(tmp_path) == [LATEST, "step-00000003"]


def contents(folder):
    """Return what is below `folder` by its path: the bytes of a file, the target of a link, None for a folder."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_checkpoint_that_a_link_names_stays(is_relative, tmp_path):
    """As where a run is forked by linking another run's checkpoint, or where users put a folder of their own there."""
    theirs, mine, own = tmp_path / "theirs", tmp_path / "mine", tmp_path / "own"
    for folder in (theirs, mine, own):
        folder.mkdir()
    (own / "notes.txt").write_text("of a user")
    (own / "rank-00000.safetensors").write_text("of a user")
    forked = take(theirs, 20)
    before = contents(theirs), contents(own)
    for name, target in {"step-00000020": forked, "step-00000010": own, "step-00000015": tmp_path / "gone"}.items():
        (mine / name).symlink_to(os.path.relpath(target, mine) if is_relative else target)
    assert newest(mine)[0].path.name == "step-00000020"
    nobodys = ["step-00000010", "step-00000015"]
    take(mine, 25, keep=2)
    assert names(mine) == [LATEST, *nobodys, "step-00000020", "step-00000025"]
    take(mine, 30, keep=1)
    assert names(mine) == [LATEST, *nobodys, "step-00000030"]
    assert (contents(theirs), contents(own)) == before


def test_what_the_run_did_not_write_is_never_removed(tmp_path):
    """Whatever stands among the checkpoints and in them: files, folders and links; checkpoints come and go as ever."""
    draw = random.Random(3)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rank-00000.safetensors").write_text("outside")
    for run in range(30):
        folder, kept = tmp_path / str(run), {}
        folder.mkdir()
        for step in range(1, 7):
            path = take(folder, step, keep=2) if draw.random() < 0.7 else write(folder, step)[0]
            for name in draw.sample(["notes.txt", "rank-x.safetensors", "manifest.json~", "mine", "rank-00007"], 2):
                place = draw.choice([path, folder / f"step-0000010{draw.randrange(10)}"])
                place.mkdir(exist_ok=True)
                if not os.path.lexists(place / name):
                    kept[place / name] = str(step)
                    if draw.random() < 0.5:
                        (place / name).write_text(str(step))
                    else:
                        (place / name).mkdir()
                        kept[place / name / "rank-00001.safetensors"] = str(step)
                        (place / name / "rank-00001.safetensors").write_text(str(step))
            link = path / draw.choice(["rank-00009.safetensors", "here"])
            if not os.path.lexists(link):
                link.symlink_to(draw.choice([outside, outside / "rank-00000.safetensors"]))
        (folder / "step-00000201").write_text("a file")
        take(folder, 7, keep=1)
        assert all(place.is_dir() or place.read_text() == text for place, text in kept.items())
        assert all(os.path.lexists(place) for place in kept)
        assert (folder / "step-00000201").read_text() == "a file"
        assert contents(outside) == {(outside / "rank-00000.safetensors").relative_to(outside): b"outside"}
        assert [path.parent.name for path in folder.glob("*/manifest.json")].count("step-00000007") == 1
        left = {path for path in folder.glob("step-*") if (path / "manifest.json").is_file()}
        assert left == {folder / "step-00000007"}
        assert holds(newest(folder)[0], 7)


def test_a_copy_in_place_of_latest_is_kept(tmp_path):
    """As `scp -r` and `cp -rL` leave it: beside its twin."""
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        take(tmp_path / "run", step)
    folder = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (folder / LATEST).is_symlink()
    path = take(folder, 30, keep=9)
    assert names(folder) == [LATEST, "step-00000010", "step-00000020", "step-00000020~2", "step-00000030"]
    assert os.readlink(folder / LATEST) == path.name
    assert newest(folder)[0].path == path
    assert all(open_checkpoint(found) for found in store.candidates(folder))
    take(folder, 40, keep=2)
    assert names(folder) == [LATEST, "step-00000030", "step-00000040"]


def test_a_copy_of_latest_alone_is_older_than_what_comes(tmp_path):
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        take(tmp_path / "run", step)
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copytree(tmp_path / "run" / LATEST, folder / LATEST)
    path = take(folder, 5, keep=9)
    assert [found.name for found in store.candidates(folder)] == [path.name, "step-00000020"]
    assert os.readlink(folder / LATEST) == path.name


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_else_stands_in_place_of_latest_is_not_lost(is_folder, tmp_path):
    for _ in range(2):
        with suppress(FileNotFoundError):
            (tmp_path / LATEST).unlink()
        if is_folder:
            (tmp_path / LATEST).mkdir()
            (tmp_path / LATEST / "notes.txt").write_text("of a user")
        else:
            (tmp_path / LATEST).write_text("step-00000020")  # as a file system without links has it
        take(tmp_path, 20, keep=1)
    assert names(tmp_path) == [LATEST, "latest~2", "latest~3", "step-00000020~2"]
    assert os.readlink(tmp_path / LATEST) == "step-00000020~2"


def test_discard_removes_what_does_not_count_and_nothing_else(tmp_path):
    whole = take(tmp_path, 1)
    path, _ = write(tmp_path, 2)
    discard(path)
    discard(path)
    discard(whole)
    assert names(tmp_path) == [LATEST, "step-00000001"]


# -- damage -------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_every_file_is_noticed(tmp_path):
    path, draw = take(tmp_path, 7), random.Random(1)
    for file in path.iterdir():
        data = file.read_bytes()
        with open(file, "r+b", buffering=0) as target:
            for position, byte in enumerate(data):
                target.seek(position)
                target.write(bytes([byte ^ 1 << draw.randrange(8)]))
                found, ((_, reason),) = newest(tmp_path)
                assert found is None
                assert reason.startswith(file.name)
                target.seek(position)
                target.write(data[position : position + 1])
    assert holds(newest(tmp_path)[0], 7)


def test_every_other_length_of_every_file_is_noticed(tmp_path):
    path = take(tmp_path, 7)
    for file in path.iterdir():
        data = file.read_bytes()
        for cut in (*(data[:length] for length in range(len(data))), data + b"\n"):
            file.write_bytes(cut)
            assert newest(tmp_path)[0] is None
        file.write_bytes(data)


def test_a_thousand_damages_are_refused_or_harmless(tmp_path):
    """Also where only the manifest was looked at: a rank that reads a damaged file gets a line, and no traceback."""
    path, draw = take(tmp_path, 7), random.Random(2)
    outcomes = Counter()
    for _ in range(1000):
        file = draw.choice(sorted(path.iterdir()))
        data = bytearray(file.read_bytes())
        whole = bytes(data)
        position = draw.randrange(len(data))
        data[position : position + draw.choice((0, 1, 1, 5))] = draw.randbytes(draw.choice((0, 1, 1, 5)))
        file.write_bytes(data)
        try:
            found = open_checkpoint(path)
        except InputError:
            outcomes["refused"] += 1
        else:
            assert data == whole
            assert holds(found, 7)
        try:
            open_checkpoint(path, verify=False).load(draw.randrange(NUM_RANKS))
        except InputError:
            outcomes["refused while reading"] += 1
        file.write_bytes(whole)
    assert outcomes["refused"] > 800
    assert outcomes["refused while reading"] > 400


# -- interrupted --------------------------------------------------------------------------------------------------


class Accident:
    """Stands in for `files.perform`: lets `left` operations pass, and calls `happen` before every later one.

    A write counts twice: the second time half of it was done.
    """

    def __init__(self, left, happen):
        self.left, self.happen = left, happen

    def __call__(self, call, *arguments):
        self.pass_by()
        if call is os.write:
            half = len(arguments[1]) // 2
            call(arguments[0], arguments[1][:half])
            self.pass_by()
            return half + call(arguments[0], arguments[1][half:])
        return call(*arguments)

    def pass_by(self):
        self.left -= 1
        if self.left < 0:
            self.happen()


def folder_before(tmp_path, position):
    """Return a folder with checkpoint 1, and what an earlier accident left."""
    folder = tmp_path / str(position)
    folder.mkdir()
    path, _ = write(folder, 1)
    (path / "rank-00002.safetensors").unlink()
    take(folder, 1)
    (folder / "latest.partial").symlink_to("nowhere")
    return folder


def step_after(folder):
    """Return the step of the newest checkpoint, the old or the new one; whatever has a manifest is whole."""
    whole = [path for path in store.candidates(folder) if (path / store.MANIFEST).exists()]
    for path in (*whole, folder / LATEST):
        found = open_checkpoint(path)
        assert holds(found, found.manifest.step)
    found, _ = newest(folder)
    assert found.path == whole[0]
    assert found.manifest.step in (1, 2)
    return found.manifest.step


def test_killed_at_every_operation(tmp_path):
    """SIGKILL before every system call of a checkpoint and of pruning, and in the middle of every write."""
    steps = []
    for position in range(1000):
        folder = folder_before(tmp_path, position)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 on: the child of a process with threads does file work only
            pid = os.fork()
        if pid == 0:
            try:
                files.perform = Accident(position, lambda: os.kill(os.getpid(), signal.SIGKILL))
                take(folder, 2, keep=1)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        steps.append(step_after(folder))
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        take(folder, 2, keep=1)  # a later one clears up
        assert len(names(folder)) == 2
    assert os.WEXITSTATUS(status) == 0
    assert names(folder) == [LATEST, "step-00000002"]
    assert position > 35
    assert set(steps) == {1, 2}
    assert steps == sorted(steps)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_refused_at_every_operation(number, tmp_path, monkeypatch):
    """A disk that is full for a moment, a file system read-only from then on: the previous checkpoint is unharmed."""

    def refuse():
        refused.append(position)
        if number == errno.ENOSPC:  # for a moment
            accident.left = 1000
        raise OSError(number, os.strerror(number))

    steps, refused = [], []
    for position in range(1000):
        folder, accident = folder_before(tmp_path, position), Accident(position, refuse)
        with monkeypatch.context() as patch:
            patch.setattr(files, "perform", accident)
            path = folder / "step-00000002"
            try:
                store.commit(*write(folder, 2))
            except OSError:
                discard(path)
            else:
                if position not in refused:
                    break
        if number == errno.ENOSPC:  # then it could be removed
            assert path.exists() == (os.readlink(folder / LATEST) == path.name)
        steps.append(step_after(folder))
        take(folder, 2, keep=1)
        assert len(names(folder)) == 2
    assert position > 30
    assert steps == sorted(steps)


def test_a_folder_that_is_gone(tmp_path):
    path, manifest = write(tmp_path, 2)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    with pytest.raises(FileNotFoundError):
        store.write_rank(path, 0, {})
    with pytest.raises(FileNotFoundError):
        store.commit(path, manifest)
    discard(path)
    with pytest.raises(FileNotFoundError):
        store.create(tmp_path / "gone", 3, 1)


# -- the final model ----------------------------------------------------------------------------------------------


def test_the_final_model_comes_back(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    for _ in range(2):  # the second time in place of the first
        save_model(tmp_path / "final.safetensors", model.state_dict())
    again = load_model(tmp_path / "final.safetensors")
    assert digest(again) == digest(model.state_dict())
    assert {name: tensor.dtype for name, tensor in again.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(again)
    assert names(tmp_path) == ["final.safetensors"]


def test_a_model_that_cannot_be_written_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "final.safetensors"
    save_model(path, {"w": torch.ones(3)})

    def refuse():
        raise OSError(errno.ENOSPC, "full")

    for position in range(6):  # open, two halves of the header and of the values each, fsync
        with monkeypatch.context() as patch:
            patch.setattr(files, "perform", Accident(position, refuse))
            with pytest.raises(OSError, match="full"):
                save_model(path, {"w": torch.zeros(3)})
        assert torch.equal(load_model(path)["w"], torch.ones(3))
    (tmp_path / "final.safetensors.partial").write_bytes(b"of a process that was killed")
    save_model(path, {"w": torch.zeros(3)})
    assert torch.equal(load_model(path)["w"], torch.zeros(3))


def test_a_rank_writes_a_file_for_each_of_its_learners(tmp_path):
    topology = Topology(MPI.COMM_SELF, learners_per_rank=3)
    same = {"x": torch.ones(1000)}
    parts = [{"model": same, "loop": {"learner": learner}} for learner in range(3)]
    parts[1]["model"] = {"x": torch.zeros(1000)}
    saved = collective.save(topology, tmp_path, 1, 5, parts, {"by": "a test"})
    assert saved.error is None
    found = open_checkpoint(saved.path)
    assert found.manifest.num_ranks == 3
    assert [held["model"] for held in found.manifest.parts] == [0, 1, 0]  # once, as between ranks
    assert [held["loop"] for held in found.manifest.parts] == [0, 1, 2]
    assert [len(list(saved.path.glob(name))) for name in ("rank-0000[012].safetensors", "unfinished-3")] == [3, 0]
    for learner in range(3):
        again = found.load(learner)
        assert again["loop"] == {"learner": learner}
        assert torch.equal(again["model"]["x"], parts[learner]["model"]["x"])
    topology.free()
