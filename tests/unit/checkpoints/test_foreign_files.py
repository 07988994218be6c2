"""Nothing that hpcavg did not write itself is ever removed, whatever users put into a run's folder."""

import dataclasses
import errno
import itertools
import os
import random
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from hpcavg.checkpoints import store
from hpcavg.checkpoints.store import LATEST
from hpcavg.errors import InputError
from hpcavg.results import run_lock
from hpcavg.results.run_lock import RunLock, this_process
from hpcavg.utils import files
from tests.unit.checkpoints.test_store import contents, take, write
from tests.unit.cli.test_fuzz import COUNT

NAMES = [
    *("notes.txt", "manifest.json", "manifest.json~", "unfinished-1", "unfinished-3", ".nfs00001", "final.safetensors"),
    *("rank-00000.safetensors", "rank-00002.safetensors", "rank-00009.safetensors", "rank-1", "latest~2"),
    *("step-00000003", "step-00000004~2", "step-00000050", "latest.partial", "lock-000001", "lock-000008"),
]
TARGETS = ["theirs/step-00000020", "theirs", "outside", "outside/rank-00000.safetensors", "nowhere"]
# What a run or its user does: a method of `Folder` and its arguments, and perhaps which change of it is refused.
actions = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 9), st.integers(1, 3)),
    st.tuples(st.just("leave_half_written"), st.integers(1, 9)),
    st.tuples(st.just("discard"), st.integers(0, 9)),
    st.tuples(st.just("litter"), st.integers(0, 2**32)),
    st.tuples(st.just("litter"), st.integers(0, 2**32)),
    st.tuples(st.just("copy_latest")),
    st.tuples(st.just("lock"), st.booleans()),
    st.tuples(st.just("release")),
)
refusals = st.one_of(st.none(), st.none(), st.integers(0, 30))


class Folder:
    """A run's folder in which a run and its user do what they like."""

    def __init__(self, place):
        self.place = place
        self.run = place / "run"
        self.checkpoints = self.run / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        for name in ("outside", "theirs"):
            (place / name).mkdir()
        (place / "outside" / "rank-00000.safetensors").write_text("outside")
        (place / "outside" / "unfinished-3").touch()
        take(place / "theirs", 20)
        self.elsewhere = {name: contents(place / name) for name in ("outside", "theirs")}
        self.files, self.links = set(), []  # of the user
        self.locks = []

    # -- what the run does ----------------------------------------------------------------------------------------

    def take(self, step, keep):
        take(self.checkpoints, step, keep)

    def leave_half_written(self, step):
        write(self.checkpoints, step)

    def discard(self, number):
        found = store.candidates(self.checkpoints)
        if found:
            store.discard(found[number % len(found)])

    def lock(self, is_left):
        owner = this_process(f"run {len(self.locks)}")
        lock = RunLock(dataclasses.replace(owner, started_ticks=1) if is_left else owner, lambda text: None)
        with suppress(InputError):
            lock.take(self.run)
            self.locks += [] if is_left else [lock]

    def release(self):
        for lock in self.locks:
            lock.release()

    # -- what the user does ---------------------------------------------------------------------------------------

    def litter(self, seed):
        """Put a file, a folder and a link, or more of them, into every folder."""
        own = random.Random(seed)
        folders = [path for path in self.checkpoints.iterdir() if path.is_dir() and not path.is_symlink()]
        for folder in (self.run, self.checkpoints, *sorted(folders)):
            for plant in (self.plant_file, self.plant_folder, self.plant_link):
                path = folder / own.choice(NAMES)
                if not os.path.lexists(path):
                    plant(path, own)

    def plant_file(self, path, own):
        text = f"a user's, {len(self.files)}"
        path.write_text(text)
        self.files.add((path.name, text))

    def plant_folder(self, path, own):
        path.mkdir()
        self.plant_file(path / own.choice(NAMES), own)

    def plant_link(self, path, own):
        target = self.place / own.choice(TARGETS)
        path.symlink_to(target)
        # Where a link stands for a checkpoint, it comes and goes as one. So does what a change of `latest` prepares.
        if not (path.name.startswith(("step-", "latest.")) and path.parent == self.checkpoints):
            self.links.append((path.name, str(target)))

    def copy_latest(self):
        latest = self.checkpoints / LATEST
        if latest.is_symlink():
            target = latest.resolve()
            latest.unlink()
            if target.is_dir():
                shutil.copytree(target, latest, symlinks=True)

    # -- what must be ---------------------------------------------------------------------------------------------

    def check(self):
        assert {name: contents(self.place / name) for name in self.elsewhere} == self.elsewhere
        found = [path for path in self.run.rglob("*") if path.is_symlink() or path.is_file()]
        texts = {(path.name, path.read_bytes()) for path in found if not path.is_symlink()}
        assert {(name, text.encode()) for name, text in self.files} <= texts
        links = [(path.name, os.readlink(path)) for path in found if path.is_symlink()]
        assert all(link in links for link in self.links)


@settings(max_examples=COUNT // 10, deadline=None)
@given(st.lists(st.tuples(actions, refusals), min_size=5, max_size=20))
def test_what_the_run_did_not_write_stays(plan):
    """Every now and then the file system refuses a change, as where parts of the folder are read-only."""
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.multiple(run_lock, SILENT_S=0.0),
        mock.patch.object(RunLock, "_begin"),
        mock.patch.object(files, "perform") as perform,
    ):
        perform.side_effect = make_call
        folder = Folder(Path(place))
        for (name, *arguments), refused in [*plan, (("take", 9, 1), None), (("release",), None)]:
            count = itertools.count()

            def refuse(call, *given, count=count, refused=refused):
                if next(count) == refused:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(given[0]))
                return make_call(call, *given)

            perform.side_effect = refuse
            with suppress(OSError):
                getattr(folder, name)(*arguments)
            folder.check()


def make_call(call, *arguments):
    return None if call is os.fsync else call(*arguments)
