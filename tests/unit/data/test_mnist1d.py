"""MNIST-1D: the package's signals, the cache that keeps them, and the task."""

import importlib.metadata
import random

import numpy as np
import pytest

from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.data import mnist1d
from hpcavg.errors import InputError


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Fewer samples, and a cache of the test's own."""
    monkeypatch.setattr(mnist1d, "NUM_TRAIN", 80)
    monkeypatch.setattr(mnist1d, "NUM_TEST", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def cached(tmp_path):
    (path,) = (tmp_path / "hpcavg").iterdir()
    return path


def test_they_are_the_packages_signals_and_the_global_generators_stay():
    np.random.seed(5)  # noqa: NPY002
    random.seed(6)
    expected = np.random.random(), random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    random.seed(6)
    signals, classes = mnist1d.load()
    assert (np.random.random(), random.random()) == expected  # noqa: NPY002
    assert (signals.shape, signals.dtype, classes.dtype) == ((100, 1, 40), np.float32, np.int64)
    assert np.bincount(classes).tolist() == [10] * 10
    assert signals.std() == pytest.approx(1, abs=1e-5)
    assert signals.mean() == pytest.approx(0, abs=1e-5)


def test_they_are_made_once(tmp_path, monkeypatch):
    made = mnist1d.load()
    assert cached(tmp_path).name == f"mnist1d-{importlib.metadata.version('mnist1d')}-100.npz"
    monkeypatch.setattr(mnist1d, "_make", lambda num_samples: pytest.fail("made again"))
    assert all(np.array_equal(a, b) for a, b in zip(made, mnist1d.load(), strict=True))


def cut(data):
    return data[:-2000]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b"", lambda data: b"no archive"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    made = mnist1d.load()
    whole = cached(tmp_path).read_bytes()
    cached(tmp_path).write_bytes(damage(whole))
    assert all(np.array_equal(a, b) for a, b in zip(made, mnist1d.load(), strict=True))
    with np.load(cached(tmp_path)) as arrays:
        assert np.array_equal(arrays["signals"], made[0])


@pytest.mark.parametrize("blocked", ["hpcavg", f"hpcavg/mnist1d-{importlib.metadata.version('mnist1d')}-100.npz"])
def test_a_cache_that_cannot_be_written_is_none(tmp_path, blocked):
    """A file stands where the folder would, or a folder where the file would."""
    if "/" in blocked:
        (tmp_path / blocked).mkdir(parents=True)
    else:
        (tmp_path / blocked).touch()
    signals, _ = mnist1d.load()
    assert len(signals) == 100
    assert [path.name for path in tmp_path.rglob("*")] == blocked.split("/")


def test_no_cache_without_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mnist1d._cache() == tmp_path / ".cache" / "hpcavg"

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(mnist1d.Path, "home", fail)
    assert mnist1d._cache() is None


def test_the_test_samples_are_the_same_for_every_number_of_training_samples():
    task = tasks.load(Config(task="mnist1d", model="cnn1d", num_samples=80))
    whole, part = tasks.load_data(task), tasks.load_data(tasks.load(Config(task="mnist1d", num_samples=30)))
    assert len(whole.train_inputs) == 80
    assert np.array_equal(part.train_inputs, whole.train_inputs[:30])
    assert np.array_equal(part.train_targets, whole.train_targets[:30])
    assert np.array_equal(part.test_inputs, whole.test_inputs)
    assert not {row.tobytes() for row in whole.train_inputs} & {row.tobytes() for row in whole.test_inputs}
    with pytest.raises(InputError, match=r"^num_samples=81: must be an integer of at least 1 and at most 80$"):
        tasks.load(Config(task="mnist1d", num_samples=81))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(mnist1d, "PACKAGE", "mnist1d-that-is-not-there")
    with pytest.raises(InputError) as caught:
        tasks.load_data(tasks.load(Config(task="mnist1d", num_samples=80)))
    assert "mnist1d-that-is-not-there" in str(caught.value)
    assert str(caught.value).endswith("pip install hpcavg[paper]")


def test_defaults_of_the_number_of_samples():
    names = ("synthetic", "digits", "mnist1d", "made-up-epsilon")
    assert [Config(task=name).num_samples for name in names] == [10_000, 10_000, 40_000, 4000]
    assert Config(task="mnist1d", num_samples=7).num_samples == 7
