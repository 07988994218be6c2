"""CIFAR-10: both versions, what is said of files that are wrong, pickles that mean harm, and augmentation."""

import codecs
import errno
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy._core.multiarray import _reconstruct

from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.data import cifar10
from hpcavg.data.augmentation import crop_and_flip
from hpcavg.errors import InputError
from hpcavg.tasks.cifar10 import MEAN, STD, transform
from tests.unit.training.alone import train_alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with both versions of the same 5 x 40 + 40 images."""
    path = tmp_path_factory.mktemp("cifar10")
    for version in ("binary", "python"):
        cifar10.synthesize(path, 0.004, 7, version)
    return path


def test_both_versions_hold_the_same_images_where_the_originals_have_them(folder):
    binary = cifar10.load(folder / "cifar-10-batches-bin")
    python = cifar10.load(folder / "cifar-10-batches-py")
    assert [array.shape for array in binary] == [(200, 3, 32, 32), (200,), (40, 3, 32, 32), (40,)]
    assert [array.dtype for array in binary] == [np.uint8, np.int64] * 2
    assert all(np.array_equal(a, b) for a, b in zip(binary, python, strict=True))
    assert np.bincount(binary[1]).tolist() == [20] * 10
    # A record is a label, then the red plane row by row, then green and blue.
    third = (folder / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()[2 * 3073 : 3 * 3073]
    assert third[0] == binary[1][42]
    assert third[1 + 1024 + 32 * 5 + 6] == binary[0][42, 1, 5, 6]
    assert all(np.array_equal(a, b) for a, b in zip(cifar10.load(folder), binary, strict=True))  # from the parent


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("key", [str, str.encode])
def test_pickles_of_other_pythons_are_read(tmp_path, protocol, key):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
    # Another order than the original's, and a second list of numbers.
    values = {"data": pixels, "filenames": ["a", "é", "a"], "labels": [1, 0, 9], "batch_label": "x"}
    for name in (*cifar10.TRAIN, cifar10.TEST):
        (tmp_path / name).write_bytes(pickle.dumps({key(name): value for name, value in values.items()}, protocol))
    *_, images, labels = cifar10.load(tmp_path)
    assert np.array_equal(images.reshape(3, -1), pixels)
    assert (labels.tolist(), labels.dtype) == ([1, 0, 9], np.int64)


def test_pickles_of_python_2_are_read(tmp_path):
    """Texts are strings of bytes there, and an array's bytes are one, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    written = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\teU\x04data"
        b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87q\x0bRq\x0c("
        b"K\x01\x8a\x01\x02M\x00\x0c\x86q\rcnumpy\ndtype\nq\x0eU\x02u1q\x0fK\x00K\x01\x87q\x10Rq\x11(K\x03U\x01|q\x12NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13b\x89T\x00\x18\x00\x00" + pixels.tobytes() + b"q\x14tq\x15bu."
    )
    for name in (*cifar10.TRAIN, cifar10.TEST):
        (tmp_path / name).write_bytes(written)
    images, labels, *_ = cifar10.load(tmp_path)
    assert np.array_equal(images[6:8].reshape(2, -1), pixels)
    assert labels.tolist() == [6, 9] * 5


class Harm:
    def __init__(self, function, *arguments):
        self.made_of = function, arguments

    def __reduce__(self):
        return self.made_of


HARMFUL = {
    "os.system": lambda path: pickle.dumps(Harm(os.system, f"touch {path}"), 2),
    "builtins eval": lambda path: pickle.dumps({"data": Harm(eval, f"open({str(path)!r}, 'w')")}, 4),
    "old opcodes": lambda path: b"(S'touch %s'\nios\nsystem\n." % bytes(path),
    "an object array": lambda path: pickle.dumps({"data": np.array([Harm(os.system, f"touch {path}")], object)}, 2),
    "a subtype": lambda path: pickle.dumps(Harm(_reconstruct, np.matrix, (0,), b"b"), 2),
    "another codec": lambda path: pickle.dumps(Harm(codecs.encode, "x" * 9, "bz2"), 2),
    "a state for a name": lambda path: b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.",
    "a class": lambda path: b"\x80\x02cbuiltins\nobject\n)\x81.",
    "memory by index": lambda path: b"\x80\x02K\x01r\xff\xff\xff\xffK\x02.",
    "memory by length": lambda path: b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "memory by copies": lambda path: (
        b"\x80\x02X\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x01" + b"c_codecs\nencode\nh\x01U\x06latin1\x86R" * 10 + b"."
    ),
    "memory by shape": lambda path: pickle.dumps(np.zeros(4, "u1"), 2).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "memory by number": lambda path: b"\x80\x02" + b"]" * 300_000 + b".",
    "time by nesting": lambda path: b"\x80\x02}K\x01" + b"q\x01h\x01\x86" * 10000 + b"K\x01s.",
    "bytes that are none": lambda path: pickle.dumps({"labels": [1], "data": np.full((1, 3072), 192, "u1")}, 2).replace(
        b"\xc3\x80", b"\xc4\x80"
    ),
    "an empty stack": lambda path: b"\x80\x02R.",
    "no memory": lambda path: b"\x80\x02h\x07.",
    "a list of itself": lambda path: b"\x80\x02]q\x00h\x00ah\x00b.",
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_pickle_that_means_harm_is_refused_and_nothing_is_executed(folder, tmp_path, harm):
    mark = tmp_path / "mark"
    target = shutil.copytree(folder / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    (target / "data_batch_3").write_bytes(HARMFUL[harm](mark))
    with pytest.raises(InputError) as caught:
        cifar10.load(tmp_path)
    assert caught.value.value == str(target / "data_batch_3")
    assert "a pickled dict of data, a uint8 array of shape (n, 3072)" in str(caught.value)
    assert "\n" not in caught.value.as_option()
    assert not mark.exists()


@pytest.mark.parametrize("harm", HARMFUL)
def test_nothing_is_executed_beside_a_whole_batch_either(folder, tmp_path, harm):
    mark = tmp_path / "mark"
    target = shutil.copytree(folder / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    harmful, whole = HARMFUL[harm](mark), (target / "data_batch_3").read_bytes()
    start = 2 if harmful.startswith(b"\x80") else 0
    (target / "data_batch_3").write_bytes(whole[:2] + harmful[start:-1] + whole[2:])
    tracemalloc.start()
    try:
        images, labels, *_ = cifar10.load(tmp_path)
        expected = cifar10.load(folder)
        assert np.array_equal(images, expected[0])
        assert np.array_equal(labels, expected[1])
    except InputError as error:
        refused = error.value
        assert refused == str(target / "data_batch_3")
    assert tracemalloc.get_traced_memory()[1] < 2**27  # a file is read into a buffer of half that
    tracemalloc.stop()
    assert not mark.exists()


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


def pickled(**values):
    return lambda path: path.write_bytes(pickle.dumps(values, 2))


PIXELS = np.zeros((3, 3072), np.uint8)
WRONG = [
    ("bin", cut, "records of 3073 bytes, a label of 0 to 9 and 3 x 32 x 32 pixels"),
    ("bin", lambda path: path.write_bytes(b""), "it has 0 bytes"),
    ("bin", lambda path: path.write_bytes(bytes([10]) + bytes(3072)), "some of its labels are not 0 to 9"),
    ("bin", lambda path: path.unlink(), "it cannot be read (No such file or directory)"),
    ("bin", lambda path: (path.unlink(), os.mkfifo(path)), "it cannot be read (Invalid argument)"),
    ("py", cut, "it cannot be read safely"),
    ("py", lambda path: path.write_bytes(b"\x1f\x8b\x08 an archive"), "it cannot be read safely"),
    ("py", pickled(data=PIXELS), "it has no data or no labels"),
    ("py", pickled(data=PIXELS, labels=[1, 2]), "its labels are not one for each image"),
    ("py", pickled(data=PIXELS, labels=[1, 2, "3"]), "its labels are no integers"),
    ("py", pickled(data=PIXELS, labels=[1, 2, 10]), "some of its labels are not 0 to 9"),
    ("py", pickled(data=PIXELS[:, 1:], labels=[1, 2, 3]), "its data are of shape (3, 3071)"),
    (
        "py",
        pickled(data=PIXELS.astype(float), labels=[1, 2, 3]),
        "its data are not a uint8 array of two axes in C order",
    ),
    ("py", pickled(data=PIXELS[0], labels=[1]), "its data are not a uint8 array of two axes"),
    (
        "py",
        pickled(data=np.asfortranarray(PIXELS), labels=[1, 2, 3]),
        "its data are not a uint8 array of two axes in C order",
    ),
    ("py", pickled(data=PIXELS, labels=[True, 2, 3]), "its labels are no integers"),
    ("py", pickled(data=PIXELS[:0], labels=[1]), "its data are not a uint8 array of two axes"),
    ("py", pickled(data=PIXELS, labels=np.arange(3)), "its labels are no integers"),
    ("py", pickled(data=PIXELS, labels=[1.0, 2, 3]), "its labels are not one for each image"),
    ("py", pickled(data=[1], labels=[1]), "its data are not a uint8 array"),
]


@pytest.mark.parametrize(("version", "spoil", "says"), WRONG)
def test_a_file_that_is_wrong_is_named(folder, tmp_path, version, spoil, says):
    target = shutil.copytree(folder / f"cifar-10-batches-{version}", tmp_path / "data")
    path = target / f"data_batch_4{'.bin' if version == 'bin' else ''}"
    spoil(path)
    with pytest.raises(InputError) as caught:
        cifar10.load(target)
    assert (caught.value.option, caught.value.value) == ("data_dir", str(path))
    assert says in str(caught.value)
    assert cifar10.WHERE in str(caught.value)


@pytest.mark.parametrize("given", [None, "empty", "absent"])
def test_no_data_set_says_where_to_get_it_and_what_is_expected(tmp_path, given):
    (tmp_path / "empty").mkdir()
    config = Config(task="cifar10", data_dir=given and str(tmp_path / given))
    with pytest.raises(InputError, match=r"cifar-10-batches-bin.*cifar-10-batches-py.*kriz/cifar.*data synthesize"):
        tasks.load_data(tasks.load(config))


def test_crops_and_flips_are_those_made_one_by_one():
    images = torch.randint(0, 256, (50, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = crop_and_flip(images, 2, torch.Generator().manual_seed(5))
    assert made.dtype == torch.uint8
    draws = torch.Generator().manual_seed(5)
    (tops, lefts), flips = torch.randint(0, 5, (2, 50), generator=draws), torch.randint(0, 2, (50,), generator=draws)
    assert {int(n) for n in tops} == {int(n) for n in lefts} == set(range(5))
    assert 10 < flips.sum() < 40
    for image, top, left, flip, one in zip(images.numpy(), tops, lefts, flips, made.numpy(), strict=True):
        expected = np.pad(image, ((0, 0), (2, 2), (2, 2)))[:, top : top + 6, left : left + 8]
        assert np.array_equal(one, expected[:, :, ::-1] if flip else expected)


def test_training_images_are_augmented_by_the_generator_and_test_images_only_normalised(folder):
    images = torch.from_numpy(cifar10.load(folder)[0][:32])
    plain = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert transform(images, None).dtype == torch.float32
    np.testing.assert_allclose(transform(images, None), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(transform(images, torch.Generator(), augment=False), transform(images, None))

    def augmented(seed):
        return transform(images, torch.Generator().manual_seed(seed))

    assert torch.equal(augmented(3), augmented(3))
    assert not torch.equal(augmented(3), augmented(4))
    assert not torch.equal(augmented(3), transform(images, None))


def test_a_small_network_learns_the_made_up_images(folder):
    config = Config(task="cifar10", data_dir=str(folder), batch_size=20, seed=1, model="mlp")
    feed, correct = train_alone(config, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), 8)
    assert np.array_equal(feed.about()["label_counts"], np.full(10, 20))
    assert correct > 0.6 * 40


def test_a_folder_that_may_not_be_searched_is_told_of(monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(InputError) as caught:
        tasks.load(Config(task="cifar10", data_dir="secret")).load_data()
    assert caught.value.option == "data_dir"
    assert caught.value.allowed == "a folder that can be read (Permission denied)"
