"""``python -m hpcavg data``: its options, what it writes and tells, and that it never overwrites."""

import errno
import os
import sys
import types

import pytest

from hpcavg.cli import data_command, parsers
from hpcavg.data import cifar10, epsilon
from hpcavg.errors import InputError
from hpcavg.utils import files


def run(*arguments, rank=0, connect=None):
    data_command.run(parsers.parse_data(list(map(str, arguments))), connect, rank)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "the following arguments are required: {prepare,check,synthesize}"),
        ("fetch", "data fetch: must be one of prepare, check, synthesize"),
        ("prepare", "the following arguments are required: {epsilon,imagenet}, --data-dir"),
        ("prepare cifar10 --data-dir d", "data prepare cifar10: must be one of epsilon, imagenet"),
        ("synthesize mnist --data-dir d", "data synthesize mnist: must be one of cifar10, epsilon, imagenet"),
        ("synthesize epsilon", "the following arguments are required: --data-dir"),
        ("synthesize epsilon --data-dir=", "--data-dir : must be the name of a folder"),
        ("synthesize epsilon --data-dir d --scale abc", "--scale abc: must be a number above 0 and at most 1"),
        ("synthesize epsilon --data-dir d --seed 1.5", "--seed 1.5: must be an integer of at least 0"),
        ("synthesize cifar10 --data-dir d --format zip", "--format zip: must be one of binary, python"),
        ("prepare imagenet --data-dir d --size big", "--size big: must be an integer of at least 16"),
        ("check epsilon --data-dir d", "data check epsilon: must be one of imagenet"),
        ("prepare epsilon --data-dir d --scale 1", "--scale: no such option; --help lists them"),
        ("prepare epsilon --data-dir", "argument --data-dir: expected one argument"),
        ("synthesize epsilon --data-dir d --scale 0", "--scale 0.0: must be a number above 0 and at most 1"),
        ("synthesize epsilon --data-dir d --scale nan", "--scale nan: must be a number above 0 and at most 1"),
        ("synthesize epsilon --data-dir d --seed -1", "--seed -1: must be an integer of at least 0"),
        ("synthesize cifar10 --data-dir d --compress", "--compress True: must be unset for cifar10; it is for epsilon"),
        ("synthesize epsilon --data-dir d --format binary", "--format binary: must be unset for epsilon"),
        ("prepare epsilon --data-dir d --size 9", "--size 9: must be unset for epsilon; it is for imagenet"),
        ("prepare imagenet --data-dir d --size 0", "--size 0: must be an integer of at least 16"),
    ],
)
def test_options_that_are_wrong(arguments, line):
    with pytest.raises(InputError) as caught:
        parsers.parse_data(arguments.split())
    assert caught.value.as_option().startswith(line)
    assert "\n" not in caught.value.as_option()


def test_made_up_cifar10_goes_through_the_loader_and_is_never_overwritten(tmp_path, capsys):
    run("synthesize", "cifar10", "--data-dir", tmp_path, "--scale", 0.001)
    assert "cifar10, 0.001 of the original's size, synthetic, seed 0" in capsys.readouterr().out
    assert len(cifar10.load(tmp_path)[0]) == 100
    first = (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").read_bytes()
    with pytest.raises(InputError, match="a folder without cifar-10-batches-bin, which is never overwritten"):
        run("synthesize", "cifar10", "--data-dir", tmp_path, "--scale", 0.001, "--seed", 1)
    assert (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").read_bytes() == first
    for seed, is_same in ((0, True), (1, False)):
        again = tmp_path / str(seed)
        run("synthesize", "cifar10", "--data-dir", again, "--scale", 0.001, "--seed", seed)
        assert ((again / "cifar-10-batches-bin" / "test_batch.bin").read_bytes() == first) == is_same


def test_made_up_epsilon_is_prepared_and_never_overwritten(tmp_path, capsys):
    run("synthesize", "epsilon", "--data-dir", tmp_path, "--scale", 1e-9, "--compress")
    assert sorted(os.listdir(tmp_path)) == ["epsilon_normalized.bz2", "epsilon_normalized.t.bz2"]
    assert f"next: python -m hpcavg data prepare epsilon --data-dir {tmp_path}\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"a folder without epsilon_normalized\.bz2, which is never overwritten"):
        run("synthesize", "epsilon", "--data-dir", tmp_path)
    run("prepare", "epsilon", "--data-dir", tmp_path, "--output", tmp_path / "made", rank=1)  # it is rank 0's work
    assert not (tmp_path / "made").exists()
    run("prepare", "epsilon", "--data-dir", tmp_path, "--output", tmp_path / "made")
    shown = capsys.readouterr().out
    assert "epsilon_normalized.t.bz2: 100 % of" in shown
    assert f"{tmp_path}/made/epsilon.h5: 100 training and 100 test samples\n" in shown
    assert "the original has 400,000 training and 100,000 test samples\n" in shown
    assert len(epsilon.locate(tmp_path / "made")["train"].targets) == 100


@pytest.mark.parametrize(
    "arguments", ["synthesize cifar10 --data-dir", "synthesize epsilon --data-dir", "prepare epsilon --output"]
)
def test_folders_that_cannot_be_written(tmp_path, arguments):
    (tmp_path / "file").write_text("")
    if "--output" in arguments:
        epsilon.synthesize(tmp_path, 1e-9, 0)
        arguments = arguments.replace("--output", f"--data-dir {tmp_path} --output")
    with pytest.raises(InputError) as caught:
        run(*arguments.split(), tmp_path / "file" / "new")
    option = arguments.rpartition(" ")[2]
    assert caught.value.as_option().startswith(f"{option} {tmp_path}/file/new: must be a folder that can be written")


def test_imagenet_is_prepared_and_checked_by_all_ranks_and_made_up_by_the_first(tmp_path, monkeypatch):
    calls = []
    module = types.SimpleNamespace(
        prepare=lambda *arguments: calls.append(arguments),
        check=lambda *arguments: calls.append(arguments),
        synthesize=lambda *arguments: calls.append(arguments),
    )
    monkeypatch.setitem(sys.modules, "hpcavg.data.imagenet", module)
    run("prepare", "imagenet", "--data-dir", tmp_path, "--size", 64, rank=3, connect=lambda: "all ranks")
    run("prepare", "imagenet", "--data-dir", tmp_path, "--output", tmp_path / "out", connect=lambda: "all ranks")
    run("check", "imagenet", "--data-dir", tmp_path, rank=3, connect=lambda: "all ranks")
    run("synthesize", "imagenet", "--data-dir", tmp_path, rank=3)
    run("synthesize", "imagenet", "--data-dir", tmp_path, "--seed", 5)
    assert calls == [
        (tmp_path, tmp_path / "prepared", 64, "all ranks"),
        (tmp_path, tmp_path / "out", 256, "all ranks"),
        (str(tmp_path), "all ranks"),
        (tmp_path, 0.01, 5),
    ]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch, error):
    def third_fails(call, *arguments):
        nonlocal calls
        calls += call is os.fsync
        if calls == 3:
            raise error
        return call(*arguments)

    (tmp_path / "mine").write_text("")
    monkeypatch.setattr(files, "perform", third_fails)
    for folder in (tmp_path, tmp_path / "new"):
        calls = 0
        with pytest.raises((InputError, KeyboardInterrupt)):
            run("synthesize", "cifar10", "--data-dir", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
