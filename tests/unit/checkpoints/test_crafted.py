"""Checkpoints that are whole by their checksums, and yet not what a run can go on from: one line, never a traceback."""

import copy
import hashlib
import json
import random
import shutil
import traceback

import pytest
import torch

from hpcavg.checkpoints import manifest, store, tensor_file
from hpcavg.checkpoints.store import MANIFEST, newest, open_checkpoint, prune
from hpcavg.cli import parsers
from hpcavg.errors import InputError
from hpcavg.training import loop_state
from hpcavg.training.trainer import Trainer
from tests.unit.cli.test_fuzz import COUNT

OPTIONS = "--model logistic --batch-size 128 --algorithm dasgd --tau 4 --delay 3 --checkpoint-minutes 0 --threads 1"
ODD = [None, True, -1, 0, 1.5, 2**70, float("nan"), "", "a\nb", "../x", [], ["a"], {}, {"a": 1}, [[]], ()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "made"
    trainer = Trainer(
        parsers.parse_train([*f"{OPTIONS} --steps 9 --checkpoint-steps 5".split(), "--output", str(folder)])
    )
    assert trainer.train() == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run", symlinks=True)


def path_of(run, step=9):
    return run / "checkpoints" / f"step-{step:08d}"


def read_manifest(path):
    return json.loads((path / MANIFEST).read_text())


def write_manifest(path, values):
    """Write what is right by its own checksum."""
    values = {name: value for name, value in values.items() if name != "sha256"}
    sha256 = hashlib.sha256(manifest._json(values).encode()).hexdigest()
    (path / MANIFEST).write_text(manifest._json({**values, "sha256": sha256}))


def write_state(path, tree, rank=0):
    """Write another tree into a rank's file, and what is right of it into the manifest."""
    file = path / store.rank_file(rank)
    data = b"".join(bytes(chunk) for chunk in tensor_file.chunks(tree))
    file.write_bytes(data)
    values = read_manifest(path)
    values["files"][rank] |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(path, values)


def resume(run, *more):
    trainer = Trainer(parsers.parse_train([*OPTIONS.split(), "--steps", "9", "--resume", str(path_of(run)), *more]))
    trainer.lock.release()
    trainer.topology.free()


def refusal(run):
    with pytest.raises(InputError) as caught:
        resume(run)
    line = caught.value.as_option()
    assert line.isprintable()
    assert line.startswith(f"--resume {path_of(run)}: must be ")
    return line


def test_what_is_crafted_so_is_right(run):
    write_manifest(path_of(run), read_manifest(path_of(run)))
    write_state(path_of(run), tensor_file.read(path_of(run) / store.rank_file(0), "resume"))
    resume(run)


@pytest.mark.parametrize(
    "name", ["../step-00000005/rank-00000.safetensors", "/etc/passwd", "rank-00001.safetensors", ""]
)
def test_files_are_those_in_the_folder(run, name):
    values = read_manifest(path_of(run))
    values["files"][0]["name"] = name
    write_manifest(path_of(run), values)
    assert "manifest.json is damaged" in refusal(run)


@pytest.mark.parametrize("part", ["model", "optimizer", "means", "averager", "random", "loop"])
def test_a_missing_part_is_named(run, part):
    values = read_manifest(path_of(run))
    del values["parts"][0][part]
    write_manifest(path_of(run), values)
    assert f"it has no '{part}'" in refusal(run)


@pytest.mark.parametrize("name", ["config", "metrics"])
def test_what_a_run_does_not_tell_of_itself_is_named(run, name):
    values = read_manifest(path_of(run))
    del values["about"][name]
    write_manifest(path_of(run), values)
    assert f"it has no '{name}'" in refusal(run)


def test_a_missing_value_is_named(run):
    tree = tensor_file.read(path_of(run) / store.rank_file(0), "resume")
    del tree["loop"]["position"]
    write_state(path_of(run), tree)
    assert "it has no 'position'" in refusal(run)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("optimizer", "param_groups", 0, "momentum"), None, "it has no 'momentum'"),
        (("averager", "progress", "step"), "two", "progress: step: a str"),
        (("averager", "totals", "excluded"), [], "totals: excluded: a list"),
        (("averager", "loss_sum"), {}, "loss_sum: a dict"),
        (("means", "in_flight", "means"), [torch.ones(3)] * 2, "a mean in flight of another model"),
        (("loop", "account", "samples"), (), "samples: a tuple"),
    ],
)
def test_a_value_of_another_kind_is_named(run, place, value, says):
    tree = tensor_file.read(path_of(run) / store.rank_file(0), "resume")
    holder = tree
    for key in place[:-1]:
        holder = holder[key]
    if value is None:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    write_state(path_of(run), tree)
    assert says in refusal(run)


def test_what_has_come_since_may_be_missing(run):
    """Fields with defaults, and tables of the metrics."""
    tree = tensor_file.read(path_of(run) / store.rank_file(0), "resume")
    for holder in (tree["averager"]["progress"], tree["averager"]["totals"], tree["loop"]["account"]):
        holder.popitem()
    write_state(path_of(run), tree)
    values = read_manifest(path_of(run))
    del values["about"]["metrics"]["positions"][0]["evaluation"]
    write_manifest(path_of(run), values)
    resume(run)


def test_another_models_is_told(run):
    tree = tensor_file.read(path_of(run) / store.rank_file(0), "resume")
    tree["model"] = {"w": torch.ones(3)}
    write_state(path_of(run), tree)
    with pytest.raises(InputError, match="resume='model': must be of the form that the checkpoint has"):
        resume(run)


def test_a_later_format_is_named_and_kept(run):
    values = read_manifest(path_of(run))
    write_manifest(path_of(run), {**values, "format": 2, "parts": "of another kind"})
    assert "(it is of format 2; this hpcavg reads up to 1)" in refusal(run)
    found, passed_over = newest(run / "checkpoints")
    assert found.path == path_of(run, 5)
    assert passed_over == [(path_of(run), "it is of format 2; this hpcavg reads up to 1")]
    assert prune(run / "checkpoints", 1) == []
    assert (path_of(run) / MANIFEST).exists()


@pytest.mark.parametrize("place", [(), ("loop",), ("loop", "account")])
def test_content_of_a_later_version_is_named(run, place):
    """To go on without it would be to lose it."""
    tree = tensor_file.read(path_of(run) / store.rank_file(0), "resume")
    holder = tree
    for key in place:
        holder = holder[key]
    holder["ema"] = torch.ones(3)
    write_state(path_of(run), tree)
    if not place:
        values = read_manifest(path_of(run))
        values["parts"][0]["ema"] = 0
        write_manifest(path_of(run), values)
    allowed = "a checkpoint that this hpcavg can go on from ('ema' is unknown: perhaps of a newer hpcavg)"
    assert refusal(run) == f"--resume {path_of(run)}: must be {allowed}"


@pytest.mark.parametrize("is_later", [True, False])
def test_content_of_this_version_may_be_missing_if_it_is_later(run, monkeypatch, is_later):
    loaded = []
    entry = loop_state._Entry(lambda state: 1, lambda state, saved: loaded.append(saved), is_later)
    monkeypatch.setitem(loop_state._LOOP, "ema", entry)
    if is_later:
        resume(run)
        assert loaded == []
    else:
        assert "(it has no 'ema')" in refusal(run)


def test_a_manifest_may_have_more_keys(run):
    """Of a later version whose format is the same."""
    values = read_manifest(path_of(run))
    write_manifest(path_of(run), {**values, "written_by": "hpcavg 9"})
    resume(run)
    assert open_checkpoint(path_of(run)).manifest.step == 9


def resume_options(run, option, *more, **changes):
    """Resume where the run's options were others; with None, where there was no such option yet."""
    values = read_manifest(path_of(run))
    options = values["about"]["config"] | changes
    values["about"]["config"] = {name: value for name, value in options.items() if value is not None}
    write_manifest(path_of(run), values)
    with pytest.raises(InputError) as caught:
        resume(run, *more)
    assert caught.value.option == option
    return caught.value.as_option()


def test_an_option_that_came_since_has_its_default(run):
    line = resume_options(run, "drop_last", "--drop-last", drop_last=None)
    before = f"what the run that {path_of(run)} is of did before there was this option"
    assert line == f"--drop-last True: must be False, {before}"
    resume(run)
    line = resume_options(run, "image_shape", "--image-shape", "3x64x64", image_shape=None)
    assert line == f"--image-shape 3x64x64: must be 3x32x32, {before}"
    resume(run)


def test_an_option_that_was_unset_or_not_there_is_said_to_be_unset(run):
    line = resume_options(run, "clip_norm", "--clip-norm", "1")
    assert line == f"--clip-norm 1.0: must be unset, as in the run that {path_of(run)} is of"


def test_one_that_may_differ_may_have_come_since(run):
    values = read_manifest(path_of(run))
    del values["about"]["config"]["check_rounds"]
    write_manifest(path_of(run), values)
    resume(run, "--check-rounds", "3")


@pytest.mark.parametrize("value", [0.5, False, "a"])
def test_an_option_that_has_gone_since_is_named(run, value):
    line = resume_options(run, "resume", warp=value)
    without = f"a checkpoint of options that this hpcavg has; warp={value} is unknown: perhaps of a newer hpcavg"
    assert line == f"--resume {path_of(run)}: must be {without}"


def places(tree):
    """Yield where something can be changed in a tree: the container and the key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def crafted(tree, own):
    """Return a copy of `tree` with something taken away or replaced."""
    tree = copy.deepcopy(tree)
    holder, key = own.choice(list(places(tree)))
    if own.random() < 0.4:
        del holder[key]
    else:
        holder[key] = own.choice([*ODD, torch.ones(3), torch.tensor(-1)])
    return tree


def test_whatever_is_crafted_is_used_or_refused(made, tmp_path):
    refused = used = 0
    for seed in range(COUNT // 10):
        own, run = random.Random(seed), shutil.copytree(made, tmp_path / "run", symlinks=True)
        try:
            if own.random() < 0.4:
                odd = crafted(read_manifest(path_of(run)), own)
                write_manifest(path_of(run), json.loads(json.dumps(odd, default=str)))
            else:
                write_state(path_of(run), crafted(tensor_file.read(path_of(run) / store.rank_file(0), "x"), own))
            open_checkpoint(path_of(run))
            resume(run)
        except InputError as error:
            refused += error.as_option().isprintable()
        except Exception:
            pytest.fail(f"seed {seed}\n{traceback.format_exc(limit=-5)}")
        else:
            used += 1
        finally:
            shutil.rmtree(run)
    assert refused + used == COUNT // 10
    assert COUNT // 20 < refused < COUNT // 10
