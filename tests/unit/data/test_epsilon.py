"""epsilon: lines of libsvm text, what is said of those that are wrong, conversions, and the arrays mapped from them."""

import bz2
import fcntl
import os
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.data import epsilon, libsvm
from hpcavg.data.mapped import MappedArray
from hpcavg.errors import InputError
from tests.unit.training.alone import train_alone

# -- lines --------------------------------------------------------------------------------------------------------

NUM_FEATURES = 12
INDICES = [b"%d" % index for index in range(1, NUM_FEATURES + 1)]
NUMBERS = st.one_of(
    st.floats(-1e30, 1e30).map(repr),
    st.floats(-1, 1).map("{:.7g}".format),
    st.sampled_from(["0", "-0", "+1", ".5", "5.", "1e-3", "1E+2", "007"]),
)
BLANKS = st.sampled_from([" ", "  ", "\t", " \t "])


@st.composite
def lines(draw):
    """Return a label, the pairs of index and value, and a line that says so in one of many ways."""
    indices = draw(st.one_of(st.just(range(1, NUM_FEATURES + 1)), st.sets(st.integers(1, NUM_FEATURES)).map(sorted)))
    pairs = [(index, draw(NUMBERS)) for index in indices]
    label = draw(st.sampled_from(["-1", "+1", "1", "1.0", "-1e0"]))
    text = label + "".join(draw(BLANKS) + f"{index}:{value}" for index, value in pairs)
    return label, pairs, draw(st.sampled_from(["", " "])) + text + draw(st.sampled_from(["", " ", " # 3:4", "\r", "#"]))


@given(lines())
def test_a_line_is_read_as_one_number_at_a_time_would_be(made):
    label, pairs, line = made
    row = np.full(NUM_FEATURES, np.nan, np.float32)
    assert libsvm.read_line(f"{line}\n".encode(), row, INDICES) == float(label)
    expected = np.zeros(NUM_FEATURES)
    for index, value in pairs:
        expected[index - 1] = float(value)
    assert np.array_equal(row, expected.astype(np.float32))


@given(st.text("01:. -#e\n", max_size=12))
def test_any_text_is_read_or_refused_with_a_reason(text):
    reason = "it "
    try:
        libsvm.read_line(text.encode(), np.empty(NUM_FEATURES, np.float32), INDICES)
    except ValueError as error:
        reason = str(error)
    assert reason.startswith("it ")


WRONG_LINES = [
    ("1 0:1", "its indices do not rise from 1: 0 comes after 0"),
    ("1 2:1 2:1", "its indices do not rise from 1: 2 comes after 2"),
    ("1 3:1 2:1", "its indices do not rise from 1: 2 comes after 3"),
    ("1 -3:1", "its indices do not rise from 1: -3 comes after 0"),
    ("1 13:1", "it has feature 13 of 12"),
    ("1 99999999999999999999:1", "it has feature 99999999999999999999 of 12"),
    ("1 1:2:3 0.5", "it is not: label index:value"),
    ("1:1 2:3 0.5", "it is not: label index:value"),
    ("1 1 0.5", "it is not: label index:value"),
    ("1 1: 2:3", "it is not: label index:value"),
    ("1 1:nan", "it is not: label index:value"),
    ("1 1:1_0", "it is not: label index:value"),
    ("1 1:1-2", "it has what is no number: b'1-2'"),
    ("1 1.0:1", "it has what is no number: b'1.0'"),
    ("1 1:1e40", "it has a value beyond those of float32"),
]


@pytest.mark.parametrize(("line", "says"), WRONG_LINES)
def test_a_line_that_is_wrong(line, says):
    with pytest.raises(ValueError, match="it") as caught:
        libsvm.read_line(f"{line}\n".encode(), np.empty(NUM_FEATURES, np.float32), INDICES)
    assert says in str(caught.value)


# -- files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a folder with texts of 200 and 100 samples, and what was made of them."""
    folder = tmp_path_factory.mktemp("epsilon")
    epsilon.synthesize(folder, 0.0005, 3)
    assert epsilon.prepare(folder, folder) == {"train": 200, "test": 100}
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """Return a folder with the texts alone."""
    for name in epsilon.TEXTS.values():
        os.link(original / name, tmp_path / name)
    return tmp_path


def rewrite(path, content):
    path.unlink()  # it is another folder's, too
    path.write_bytes(content)


def test_what_is_converted_is_what_the_text_says(original):
    data = tasks.load_data(tasks.load(Config(task="epsilon", data_dir=str(original), model="mlp")))
    for inputs, targets, name in ((*data[:2], epsilon.TEXTS["train"]), (*data[2:], epsilon.TEXTS["test"])):
        wanted = [line.split() for line in (original / name).read_text().splitlines()]
        values = np.array([[float(pair.partition(":")[2]) for pair in line[1:]] for line in wanted])
        assert np.array_equal(inputs[np.arange(len(inputs))], values.astype(np.float32))
        assert np.array_equal(targets, [int(line[0]) > 0 for line in wanted])
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, rtol=1e-6)
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((200, 2000), (100, 2000))
    assert sorted(path.name for path in original.iterdir()) == ["epsilon.h5", *epsilon.TEXTS.values()]


def test_compressed_sparse_and_commented_text_is_converted_too(original, folder, tmp_path):
    text = b"".join((folder / epsilon.TEXTS["train"]).read_bytes().splitlines(keepends=True)[:20])
    # Two streams, one after the other, as parallel compressors write them.
    compressed = bz2.compress(b"# a comment\n\n" + text[:10_000]) + bz2.compress(text[10_000:])
    (folder / f"{epsilon.TEXTS['train']}.bz2").write_bytes(compressed)
    (folder / epsilon.TEXTS["train"]).unlink()
    rewrite(folder / epsilon.TEXTS["test"], b"+1 3:0.5 2000:-2 \n" + b"\n" * 2**20 + b"-1\n#" + b" " * 2**19 + b"\n")
    output = tmp_path / "new" / "output"
    assert epsilon.prepare(folder, output) == {"train": 20, "test": 2}
    with h5py.File(output / epsilon.FILE) as made, h5py.File(original / epsilon.FILE) as plain:
        assert np.array_equal(made["train/inputs"], plain["train/inputs"][:20])
        assert np.array_equal(made["train/targets"], plain["train/targets"][:20])
        assert made["train"].attrs["source"] == f"{epsilon.TEXTS['train']}.bz2"
        test = made["test/inputs"][:]
        assert (test[0, 2], test[0, 1999], np.count_nonzero(test)) == (0.5, -2, 2)
        assert made["test/targets"][:].tolist() == [1, 0]


GOOD = b"+1 1:1\n"
WRONG_FILES = [
    ("", b"", "libsvm text with at least one sample"),
    ("", b"# nothing\n", "libsvm text with at least one sample"),
    ("", GOOD * 3 + b"2 1:1\n", "line 4: its label is 2, neither -1 nor +1"),
    ("", GOOD + b"1:1 2:1\n", "line 2: it is not: label index:value"),
    ("", b"\n" + GOOD + b"1 2001:1\n", "line 3: it has feature 2001 of 2000"),
    ("", GOOD + b"1 1:0.", "line 2: it has no end"),
    ("", GOOD + b" " * 2**21, "line 2: it is longer than 1048576 bytes"),
    ("", bytes(range(256)), "line 1: it "),
    (".bz2", bz2.compress(GOOD * 10**5)[:-30], "ended before the end-of-stream marker was reached after line"),
    # Gigabytes of them may be a file of a few bytes.
    (".bz2", bz2.compress(GOOD + b"\n" * 2**21), "line 1048578: more than 1048576 bytes up to its end hold no sample"),
    (".bz2", bz2.compress((b"#" + b" " * 2**16 + b"\n") * 32), "bytes up to its end hold no sample"),
    (".bz2", GOOD, "libsvm text that can be read to its end (Invalid data stream"),
]


@pytest.mark.parametrize(("end", "content", "says"), WRONG_FILES)
def test_text_that_is_wrong_is_named_with_its_line(folder, end, content, says):
    (folder / epsilon.TEXTS["test"]).unlink()
    path = folder / f"{epsilon.TEXTS['test']}{end}"
    path.write_bytes(content)
    rewrite(folder / epsilon.TEXTS["train"], GOOD)
    with pytest.raises(InputError) as caught:
        epsilon.prepare(folder, folder)
    assert (caught.value.option, caught.value.value) == ("data_dir", str(path))
    assert says in str(caught.value)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted([epsilon.TEXTS["train"], path.name])


def test_missing_text_and_a_missing_conversion_say_what_to_do(folder):
    with pytest.raises(InputError, match=r"makes of the text there") as caught:
        epsilon.locate(folder)
    assert f"python -m hpcavg data prepare epsilon --data-dir {folder}" in str(caught.value)
    (folder / epsilon.TEXTS["test"]).unlink()
    with pytest.raises(InputError, match=r"binary\.html; it has no epsilon_normalized\.t$"):
        epsilon.prepare(folder, folder)
    with pytest.raises(InputError, match=r"data prepare epsilon --data-dir DIR .*epsilon_normalized\(\.bz2\)"):
        tasks.load_data(tasks.load(Config(task="epsilon", model="mlp")))


def spoiled(change):
    def spoil(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return spoil


def without_inputs(file):
    del file["train/inputs"]


def in_chunks(file):
    del file["train/inputs"]
    file.create_dataset("train/inputs", (200, 2000), np.float32, chunks=(10, 2000))


DAMAGED = "it is cut off or damaged: remove it and prepare it again"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), DAMAGED),
        (lambda path: os.truncate(path, 700), DAMAGED),
        (lambda path: path.write_bytes(path.read_bytes()[:512] + bytes(4096)), DAMAGED),
        (lambda path: path.write_bytes(b"another file"), DAMAGED),
        (lambda path: path.write_bytes(b""), DAMAGED),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (spoiled(lambda file: file.attrs.clear()), "it is another file"),
        (spoiled(lambda file: file["test/targets"].write_direct(np.full(100, 2))), "its targets are not 0 and 1"),
        (spoiled(without_inputs), DAMAGED),
        (spoiled(in_chunks), "its inputs are not all there"),
    ],
)
def test_a_prepared_file_that_is_wrong_is_named(original, tmp_path, spoil, why):
    path = tmp_path / epsilon.FILE
    path.write_bytes((original / epsilon.FILE).read_bytes())
    spoil(path)
    with pytest.raises(InputError) as caught:
        epsilon.locate(tmp_path)
    allowed = f"an HDF5 file as python -m hpcavg data prepare epsilon makes it; {why}"
    assert (caught.value.value, caught.value.allowed) == (str(path), allowed)


# -- conversions that are interrupted, repeated, at the same time -------------------------------------------------


def test_a_conversion_is_not_repeated_unless_the_text_has_changed(folder):
    epsilon.prepare(folder, folder)
    first = (folder / epsilon.FILE).stat().st_ino
    assert epsilon.prepare(folder, folder) == {"train": 200, "test": 100}
    assert (folder / epsilon.FILE).stat().st_ino == first
    rewrite(folder / epsilon.TEXTS["test"], GOOD)
    assert epsilon.prepare(folder, folder) == {"train": 200, "test": 1}


def test_two_conversions_at_a_time_do_not_spoil_each_other(folder):
    partial = folder / f"{epsilon.FILE}.partial"
    with open(partial, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="no other process prepares epsilon"):
            epsilon.prepare(folder, folder)
        assert partial.exists()
    epsilon.prepare(folder, folder)  # it is free again, and what was in it is no matter
    assert not partial.exists()


@pytest.mark.parametrize("moment", ["progress._Tenths.advance", "epsilon._sync_file"])
def test_a_conversion_that_is_killed_leaves_nothing_in_the_way(original, folder, moment):
    program = (
        "import os, pathlib, sys\n"
        "from hpcavg.utils import progress\nfrom hpcavg.data import epsilon\n"
        "epsilon._ROWS = 8\n"
        f"{moment} = lambda *arguments: os.kill(os.getpid(), 9)\n"
        "epsilon.prepare(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", program, folder], timeout=60).returncode == -9
    left = {"epsilon.h5.partial", *epsilon.TEXTS.values()}
    assert {entry.name for entry in folder.iterdir()} == left
    assert epsilon.prepare(folder, folder) == {"train": 200, "test": 100}
    assert (folder / epsilon.FILE).read_bytes() == (original / epsilon.FILE).read_bytes()
    assert {entry.name for entry in folder.iterdir()} == {epsilon.FILE, *epsilon.TEXTS.values()}


# -- training -----------------------------------------------------------------------------------------------------


def test_mapped_arrays_are_small_to_send_and_notice_a_file_that_is_cut_off(tmp_path):
    path = tmp_path / "array"
    values = np.arange(60, dtype=np.int32).reshape(20, 3)
    path.write_bytes(b"abc" + values.tobytes())  # at any offset
    array = pickle.loads(pickle.dumps(MappedArray(path, 3, (20, 3), "<i4")))
    assert len(array) == 20
    read = array[np.array([7, 3, 7])]
    assert np.array_equal(read, values[[7, 3, 7]])
    assert read.flags.writeable
    assert len(pickle.dumps(array)) < 300 + len(str(path))  # also after it was read
    os.truncate(path, 200)
    with pytest.raises(InputError, match="a file of at least 243 bytes; it is cut off"):
        pickle.loads(pickle.dumps(array))[np.array([0])]


def test_a_model_learns_which_side_of_the_plane_samples_are_on(original):
    config = Config(task="epsilon", data_dir=str(original), batch_size=20, model="mlp")
    feed, correct = train_alone(config, lambda p: torch.optim.Adam(p, lr=0.003), 5)
    assert isinstance(feed.data.train_inputs, MappedArray)
    assert correct > 80  # of 100
