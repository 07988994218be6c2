"""State files: every tree comes back bit for bit, and a damaged file is an input error and nothing else."""

import json
import math
import os
import random
import re
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcavg.checkpoints.tensor_file import chunks, digest, read
from hpcavg.errors import InputError
from hpcavg.utils.files import write_file
from tests.unit.cli.test_fuzz import COUNT

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.complex64, torch.complex128),
]


def save(path, tree):
    path.unlink(missing_ok=True)
    return write_file(path, chunks(tree))


def same(one, other):
    """Equal kinds, order, dtypes, shapes and bits, by another way than `digest`."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        bits = [x.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
        return torch.equal(*bits)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    return one == other


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    num_bytes = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    tensor = torch.frombuffer(data, dtype=dtype).reshape(shape) if num_bytes else torch.empty(shape, dtype=dtype)
    return tensor.movedim(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**300), 2**300)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
trees = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(-2, 9) | st.text("012", max_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(tree=trees)
@settings(max_examples=COUNT // 5, deadline=None)
def test_every_tree_comes_back_bit_for_bit(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    record = save(path, tree)
    again = read(path, "path")
    assert same(again, tree)
    assert digest(again) == digest(tree) == record.sha256
    assert record.num_bytes == path.stat().st_size


@given(one=trees, other=trees)
@settings(max_examples=COUNT // 10, deadline=None)
def test_digests_are_equal_exactly_when_trees_are(one, other):
    assert (digest(one) == digest(other)) == same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ([1], (1,)),
        ({0: 1}, {"0": 1}),
        ("1", b"1"),
        (math.nan, struct.unpack("<d", b"\1" + struct.pack("<d", math.nan)[1:])[0]),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(0, 3), torch.zeros(3, 0)),
        (torch.zeros(1), np.zeros(1, np.float32)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"dict": {}}, {}),
    ],
)
def test_what_differs_has_another_digest(one, other):
    assert digest(one) != digest(other)


def test_views_arrays_and_odd_dtypes(tmp_path):
    z = torch.randn(3, 4, dtype=torch.complex64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half-precision complex numbers are said to be experimental
        half = torch.zeros(2, dtype=torch.complex32)
    tree = {
        "transposed and conjugated": z.t().conj(),
        "negated": z.conj().imag,
        "expanded": torch.ones(1, 2).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.randn(2)).detach(),
        "half": half,
        "backwards": np.arange(6, dtype=np.uint16)[::-1],
        "number": np.array(3.5),
        "__metadata__": torch.tensor(True),
    }
    save(tmp_path / "tree", tree)
    assert same(read(tmp_path / "tree", "path"), tree)


def test_the_state_of_an_optimizer(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "adam", optimizer.state_dict())
    again = read(tmp_path / "adam", "path")
    assert same(again, optimizer.state_dict())
    optimizer.load_state_dict(again)


def test_only_some_keys(tmp_path):
    save(tmp_path / "tree", {"model": {"w": torch.ones(2)}, "loop": [torch.zeros(3), 4]})
    assert same(read(tmp_path / "tree", "path", ["loop"]), {"loop": [torch.zeros(3), 4]})


@pytest.mark.parametrize(
    "value", [{1}, object(), np.array(["a"]), np.float32(1), torch.ones(2, device="meta"), torch.eye(2).to_sparse()]
)
def test_what_cannot_be_saved_is_named(value):
    with pytest.raises(TypeError, match=r"^loop/sampler: "):
        digest({"loop": {"sampler": value}})


def test_the_header_is_that_of_safetensors(tmp_path):
    save(tmp_path / "tree", {"small": torch.ones(3, dtype=torch.int8), "layer.weight": torch.ones(2, 5)})
    data = (tmp_path / "tree").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(isinstance(text, str) for text in header.pop("__metadata__").values())
    assert header == {  # wide elements first, so that each is aligned
        "layer.weight": {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 40]},
        "small": {"dtype": "I8", "shape": [3], "data_offsets": [40, 43]},
    }
    assert data[8 + length :] == np.ones(10, np.float32).tobytes() + b"\1\1\1"


# -- damage -------------------------------------------------------------------------------------------------------

TREE = {"w": torch.arange(6.0).reshape(2, 3), "state": {0: (1, math.inf), 1: torch.ones(2).bfloat16()}}


def survives(path, data):
    """Write `data`; return what is read back, None where it was refused. Anything else fails the test."""
    path.write_bytes(data)
    try:
        return read(path, "resume")
    except InputError as error:
        line = str(error)
    assert line.startswith(f"resume={path!r}: must be a whole safetensors file")
    assert "\n" not in line
    return None


def test_every_shorter_or_longer_file_is_refused(tmp_path):
    path = tmp_path / "tree"
    save(path, TREE)
    data = path.read_bytes()
    for length in range(len(data)):
        assert survives(path, data[:length]) is None
    assert survives(path, data + b"\0") is None


def test_a_thousand_damages(tmp_path):
    path, draw = tmp_path / "tree", random.Random(3)
    save(path, TREE)
    data = path.read_bytes()
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            position = draw.randrange(len(damaged))
            kind = draw.randrange(4)
            if kind == 0:
                damaged[position] ^= 1 << draw.randrange(8)
            elif kind == 1:
                damaged[position] = draw.choice(b'{}[]"0189-,:\xff\0')
            elif kind == 2:
                del damaged[position : position + draw.randrange(1, 9)]
            else:
                damaged[position:position] = draw.randbytes(draw.randrange(1, 9))
        survives(path, bytes(damaged))


def header_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**62) + b"{}",
        header_of(b"[" * 200_000),
        header_of(b"{}"),
        header_of({"__metadata__": {"tree": "[" * 200_000}}),
        header_of({"__metadata__": {"tree": '{"tensor":"w"}'}}),
        header_of({"__metadata__": {"tree": '{"tensor":"w"}'}, "w": entry(0, 2**62, [2**60])}),
        header_of({"__metadata__": {"tree": '{"tensor":"w"}'}, "w": entry(0, 0, [2**62, 2**62, 0])}),
        header_of({"__metadata__": {"tree": '{"tensor":"w"}'}, "w": entry(0, 4, [-1, -1])}, b"1234"),
        header_of({"__metadata__": {"tree": '{"tensor":"w"}'}, "w": entry(0, 4, [1], "F99")}, b"1234"),
        header_of({"__metadata__": {"tree": "1"}, "a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234"),
        header_of({"__metadata__": {"tree": '[{"tensor":"a"},{"tensor":"a"}]'}, "a": entry(0, 4, [1])}, b"1234"),
        header_of({"__metadata__": {"tree": '{"pickle":"a"}'}}),
        header_of({"__metadata__": {"tree": '{"tuple":[],"list":[]}'}}),
        header_of({"__metadata__": {"tree": '{"items":[[[],1]]}'}}),
        header_of({"__metadata__": {"tree": '{"bits":["load",{"tensor":"a"}]}'}, "a": entry(0, 1, [1], "U8")}, b"1"),
        header_of({"__metadata__": {"tree": "1" * 10_000}}),
    ],
    ids=range(18),
)
def test_made_up_files_are_refused(data, tmp_path):
    assert survives(tmp_path / "tree", data) is None


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"version": "2", "tree": "of another kind"}, "it is of format 2; this hpcavg reads up to 1"),
        ({"tree": '{"set":[1]}'}, "a 'set' in its tree, perhaps of a newer hpcavg"),
    ],
)
def test_a_file_of_a_later_version_is_named(tmp_path, metadata, why):
    (tmp_path / "tree").write_bytes(header_of({"__metadata__": metadata}))
    with pytest.raises(InputError, match=re.escape(f"a whole safetensors file written by hpcavg ({why})")):
        read(tmp_path / "tree", "resume")


def test_the_first_format_is_not_written(tmp_path):
    """Equal models keep their checksums: this one is of before there were formats."""
    save(tmp_path / "tree", {"w": torch.arange(3.0)})
    (length,) = struct.unpack("<Q", (tmp_path / "tree").read_bytes()[:8])
    header = json.loads((tmp_path / "tree").read_bytes()[8 : 8 + length])
    assert header["__metadata__"].keys() == {"format", "tree"}
    assert digest({"w": torch.arange(3.0)}) == "1d9bfdd1e54cd7db414e6b6bde6b26f8a5dc304fb66f460e10bb007231372a51"


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", f"{tmp_path}/\0"):
        with pytest.raises(InputError, match="must be a whole safetensors file"):
            read(path, "resume")
