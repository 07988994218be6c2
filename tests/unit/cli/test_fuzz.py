"""Generated input: whatever it is, there is one line to say about it, nothing hangs and nothing is written.

``HPCAVG_FUZZ=20000`` makes that many command lines and files, and a twentieth of it damaged runs. Other searches
through drawn input follow it, too.
"""

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import signal
import traceback

import numpy as np
import pytest
import tomli_w

from hpcavg import algorithms
from hpcavg.cli import main, parsers
from hpcavg.config.options import OPTIONS, Config
from hpcavg.config.sources import from_sources
from hpcavg.errors import InputError
from hpcavg.results import curves, report, summary
from hpcavg.results.metrics import Recorder
from hpcavg.results.view import file_name, write_view
from tests.unit.results.test_summary import example

COUNT = int(os.environ.get("HPCAVG_FUZZ", "1000"))
PNG = b"\x89PNG"

WORDS = [
    *("0", "1", "2", "3", "7", "64", "0.5", "1e-3", "-1", "true", "unset", "auto", "9,9,3", "3x32x32", "adam", "mlp"),
    *("", " ", "=", "-", "--", "---", "-h", "-hh", "--help", "--version", "--help=1", "-x", "@file", "None"),
    *("nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "9" * 5000, "-" + "9" * 400, "0x10", "1_0", "1.0", "٣", "²"),
    *(
        "a\nb",
        "a\0b",
        "\udcff\udc80",
        "\u2028",
        "\x1b[31m",
        "[red]",
        "{0}",
        "%s",
        "$x_{",
        "🦆",
        "é",
        "\ufeff",
        "x" * 10**6,
    ),
    *("1x" * 1000, "1," * 100_000, "/", "/dev/null/x", "/dev/zero", "..", "~", "nowhere/run", "x" * 300, "x.py:task"),
    *("mine.py:task", "folder", "pipe", "full", "\n.py:a", "a\0.py:a", f"{'x' * 300}.py:a", ":", ".py:", "folder.py:a"),
]
LITERALS = [
    *("0", "1", "-1", "3", "2.5", "nan", "inf", "-inf", "1e400", "true", "false", '""', '"auto"', '"unset"', "9" * 30),
    *("9" * 5000, "0x" + "f" * 5000, "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[]", "[1, 2]", "[[1], [2]]"),
    *("{}", "{a = 1}", '{"3" = 1}', '["3"]', "[1, 'a', nan]", '"a\\nb"', '"a\\u0000b"', "'''a\nb'''", '"🦆"', "[true]"),
    *("[" * 1000 + "]" * 1000, "{a=" * 300 + "1" + "}" * 300, '"' + "x" * 10**5 + '"', "[", '"', "", "= 1", "\\"),
]
ODD_LINES = [
    *(
        "[k1]",
        "[[k]]",
        "k1.k2 = 1",
        "'a\\nb' = 1",
        '"" = 1',
        '"k\\n1" = 1',
        "# é",
        "x" * 10**5,
        "[" + "a." * 2000 + "b]",
    ),
    *("steps = 1\nsteps = 2", "batch-size = 1\nbatch_size = 2", "\0", "k1 = 1 # \x01"),
]


@pytest.fixture(autouse=True)
def _parser_made_once(monkeypatch):
    monkeypatch.setattr(parsers, "train_parser", functools.cache(parsers.train_parser))


@contextlib.contextmanager
def deadline(seconds):
    def ring(*_):
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(arguments):
    """Do what a command does before it trains; return the configuration, or None where there is none."""
    command, rest = parsers.split_command(arguments)
    if command == "report" or parsers.wants_help(rest):
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main._without_mpi(command, rest)
        except SystemExit as end:  # argparse has printed a text that was asked for
            status = end.code
        assert (status, err.getvalue().count("\n")) in ((0, 0), (2, 1)), (status, err.getvalue())
        return None
    try:
        config = parsers.parse_train(rest)
        main._check_early(config, 4)
    except InputError as error:
        again = pickle.loads(pickle.dumps(error))  # as it travels to the other ranks
        line = again.as_option()
        assert line.isprintable(), line
        assert len(line) < 5000
        return None
    return config


def try_all(count, make, folder):
    """Try the arguments that `make` returns for each of `count` generators; return how many were accepted."""
    os.mkfifo("pipe")
    os.mkdir("full")
    for name in ("full/summary.json", "mine.py", "folder.py"):
        (folder / name).write_text("{}")
    accepted = 0
    before = sorted(folder.rglob("*"))
    for seed in range(count):
        arguments = make(np.random.default_rng(seed))
        try:
            with deadline(20):
                config = attempt(arguments)
        except Exception:
            shown = [argument[:200] for argument in arguments]
            pytest.fail(f"seed {seed}: {shown!r}\n{traceback.format_exc(limit=-4)[:5000]}")
        if config is not None:
            accepted += 1
            again = Config(**{**config.as_toml(), "output": None})
            assert from_text(tomli_w.dumps(again.as_toml()), folder.parent) == again, (seed, arguments)
        assert sorted(folder.rglob("*")) == before, (seed, arguments)
    return accepted


def from_text(text, folder):
    path = folder / "back.toml"
    path.write_text(text, encoding="utf-8")
    return from_sources(str(path), {})


def pick(rng, values):
    return values[rng.integers(len(values))]


def likely_value(rng, name):
    """Return a value that the option may well take, as text."""
    choices = OPTIONS[name].choices
    if choices:
        return pick(rng, choices)
    default = OPTIONS[name].default
    return pick(rng, ["1", "2", "4", "0.5"] if default is None or isinstance(default, tuple) else [str(default), "2"])


def command_line(rng):
    words = [pick(rng, ["train", "info", "report", pick(rng, WORDS)])] if rng.random() < 0.2 else []
    if rng.random() < 0.5:
        chosen = pick(rng, list(algorithms.ALGORITHMS))
        words += ["--algorithm", chosen]
        names = [*algorithms.option_names(chosen), "epochs", "task", "output", "batch_size"]
    else:
        names = list(OPTIONS)
    for _ in range(rng.integers(6)):
        name = pick(rng, names)
        flag = "--" + name.replace("_", pick(rng, ["-", "-", "-", "_"]))
        value = likely_value(rng, name) if rng.random() < 0.7 else pick(rng, WORDS)
        shape = rng.random()
        if shape < 0.6:
            words += [flag, value]
        elif shape < 0.75:
            words.append(f"{flag}={value}")
        elif shape < 0.85:
            words.append(
                pick(rng, [flag, flag[:-1], "--no-" + flag[2:], "--config", "--config="]) + pick(rng, ["", value])
            )
        elif isinstance(OPTIONS[name].default, bool):
            words.append(flag)
        elif shape < 0.95:
            words.append(pick(rng, WORDS))
    return words


def test_command_lines(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    accepted = try_all(COUNT, command_line, tmp_path / "cwd")
    assert accepted > COUNT // 20


def toml_text(rng):
    lines = []
    if rng.random() < 0.4:
        chosen = pick(rng, list(algorithms.ALGORITHMS))
        lines.append(f'algorithm = "{chosen}"')
        names = [*algorithms.option_names(chosen), "steps", "batch_size"]
    else:
        names = list(OPTIONS)
    for _ in range(rng.integers(6)):
        name = pick(rng, names)
        likely = likely_value(rng, name)
        value = pick(rng, [likely, f'"{likely}"']) if rng.random() < 0.7 else pick(rng, LITERALS)
        lines.append(f"{name} = {value}")
    if rng.random() < 0.2:
        lines.insert(rng.integers(len(lines) + 1), pick(rng, ODD_LINES))
    data = pick(rng, ["\n", "\n", "\r\n"]).join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        data = damaged(data, rng)
    return pick(rng, [b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]) + data if rng.random() < 0.2 else data


def damaged(data, rng):
    """Return `data` with bits flipped, bytes overwritten, a part cut out, zeroed, or copied to another place."""
    data = bytearray(data)
    # half of the damage where the structure is: at the start
    places = [int(rng.integers(max(1, len(data) if rng.random() < 0.5 else min(len(data), 3000)))) for _ in range(20)]
    length = int(rng.integers(1, 400))
    kind = rng.integers(6)
    first, second = places[:2]
    if kind == 0 and data:
        for place in places[: rng.integers(1, 20)]:
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[first:]
    elif kind == 2:
        del data[first : first + length]
    elif kind == 3:
        data[first : first + length] = bytes(len(data[first : first + length]))
    elif kind == 4:
        data[first : first + 8] = rng.bytes(8)
    else:
        data[first : first + length] = data[second : second + length]
    return bytes(data)


def test_files_of_options(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    path = tmp_path / "run.toml"

    def arguments(rng):
        if rng.random() < 0.02:
            return ["--config", pick(rng, WORDS)]
        path.write_bytes(toml_text(rng))
        return ["--config", str(path), *(command_line(rng) if rng.random() < 0.1 else [])]

    accepted = try_all(COUNT, arguments, tmp_path / "cwd")
    assert accepted > COUNT // 20


@pytest.mark.parametrize("name", ["folder", "pipe", "/dev/zero", "/dev/null/x", "", "\0", "\udcff", "x" * 300, "huge"])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    with open("huge", "wb") as file:
        file.truncate(10**10)
    with deadline(10), pytest.raises(InputError) as caught:
        parsers.parse_train(["--config", name])
    assert caught.value.as_option().isprintable()
    for arguments in ([name], ["folder", "--output", name]):
        with deadline(10), pytest.raises(InputError) as caught:
            report.main(arguments, None)
        assert caught.value.as_option().isprintable()


# -- damaged runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two runs, one that ended in order and one whose ranks were killed, each resumed once."""
    folders = []
    for name in ("ended", "killed"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "metrics").mkdir()
        positions = [{"step": 20, "averaging": 10, "arrival": 0, "evaluation": 2}] * 2
        for segment, before in ((0, {}), (1, positions[0])):
            for rank in range(2):
                path = folder / "metrics" / file_name(rank, segment)
                recorder = Recorder(path, {"algorithm": "k_avg"}, 3600, before)
                for step in range(1, 31):
                    recorder.record("step", step, 1, 1 / step, 0.1, 0.1, 0.1, 0.1)
                    if step % 2 == 0:
                        recorder.record("averaging", step, "global", 2, 0.1, 0.1, 0.1, 400, 1.0)
                    if step % 10 == 0:
                        recorder.record("evaluation", step, step // 10, *[0.5] * 6)
                recorder.flush()
                if name == "killed":
                    shutil.copy(path, f"{path}.copy")
                recorder.close()
                if name == "killed":
                    os.replace(f"{path}.copy", path)
        write_view(folder / "metrics", 2, [positions])
        summary.write(folder, example(num_ranks=2))
        folders.append(folder)
    return folders


def test_damaged_metrics(tmp_path, monkeypatch, runs, capsys):
    monkeypatch.setattr(curves, "DEADLINE_S", 1.0)
    count, batch = COUNT // 20, 50
    drawn = 0
    for first in range(0, count, batch):
        folders = []
        for seed in range(first, min(first + batch, count)):
            rng = np.random.default_rng(seed)
            folder = shutil.copytree(runs[seed % 50 == 0], tmp_path / f"run-{seed}")
            path = pick(rng, sorted((folder / "metrics").iterdir()))
            path.write_bytes(damaged(path.read_bytes(), rng))
            if seed % 3 == 1:
                (folder / "summary.json").unlink()
            elif seed % 3 == 2:
                data = (folder / "summary.json").read_bytes()
                (folder / "summary.json").write_bytes(damaged(data, rng))
            folders.append(folder)
        with deadline(300):
            report.main([str(folder) for folder in folders], str(tmp_path / "curves.png"))
        out = capsys.readouterr().out
        told = [line for line in out.splitlines() if line.startswith(f"{tmp_path}/run-")]
        assert len({line.partition(":")[0] for line in told}) == len(told)
        drawn += len(folders) - sum("its metrics " in line for line in told)
        assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
        assert not list(tmp_path.glob("*.partial"))
        for folder in folders:
            shutil.rmtree(folder)
    assert count // 10 < drawn < count  # some damage hurts nothing that is drawn


def test_damaged_summaries(runs):
    data = (runs[0] / "summary.json").read_bytes()
    values = [None, True, -1, 0, 2**70, 1e300, "a\nb", "", [], ["a"], [2**70], {}, [[]]]
    refused = 0
    for seed in range(COUNT // 4):
        rng = np.random.default_rng(seed)
        if seed % 2:
            changed = damaged(data, rng)
        else:
            field = pick(rng, list(example()))
            changed = json.dumps(json.loads(data) | {field: pick(rng, values)}).encode()
        (runs[0] / "summary.json").write_bytes(changed)
        try:
            with deadline(20), contextlib.redirect_stdout(io.StringIO()):
                read = summary.read(runs[0])
                summary.show([(runs[0], read)])
            line = ""
        except ValueError as error:
            line = str(error)
        except Exception:
            pytest.fail(f"seed {seed}: {changed!r}\n{traceback.format_exc(limit=-4)}")
        refused += bool(line)
        assert not line or line.isprintable()
    (runs[0] / "summary.json").write_bytes(data)
    assert 0 < refused < COUNT // 4
