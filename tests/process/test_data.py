"""From files made up to models trained on them, as a user would."""

import json

import h5py
import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process


def train(folder, *options):
    """Train 2 ranks on the data in `folder`; return the test accuracy and the labels that each rank saw."""
    output = folder / "run"
    usual = "--model mlp --algorithm k-avg --k 4 --batch-size 10 --epochs 6"
    result = run(2, [*usual.split(), "--data-dir", folder, "--output", output, *options])
    assert result.status == 0, result.err
    summary = json.loads((output / "summary.json").read_text())
    counts = []
    for rank in range(2):
        with h5py.File(output / "metrics" / f"rank-{rank:05}.h5") as file:
            counts.append(file.attrs["label_counts"].tolist())
    return summary["test_accuracy"], counts


def prepare(folder, *commands):
    for command in commands:
        result = run(0, ["data", *command.split(), "--data-dir", folder])
        assert (result.status, result.err) == (0, "")


def test_cifar10_made_up_and_learned_from_parts_of_few_classes(tmp_path):
    prepare(tmp_path, "synthesize cifar10 --scale 0.004")
    accuracy, counts = train(tmp_path, "--task=cifar10", "--learning-rate=0.02", "--partition=by-class")
    assert accuracy > 0.3
    assert counts == [[20] * 5 + [0] * 5, [0] * 5 + [20] * 5]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("synthesize epsilon --data-dir d --scale 2", "--scale 2.0: must be a number above 0 and at most 1"),
        ("prepare epsilon --data-dir no/where", "--data-dir no/where: must be a folder with epsilon_normalized and "),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, line):
    result = run(0, ["data", *arguments.split()])
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"hpcavg: error: {line}")
    assert result.err.count("\n") == 1


def test_epsilon_made_up_prepared_and_learned(tmp_path):
    prepare(tmp_path, "synthesize epsilon --scale 0.0005", "prepare epsilon")
    accuracy, counts = train(tmp_path, "--task=epsilon", "--optimizer=adam", "--learning-rate=0.002")
    assert accuracy > 0.75
    assert [sum(of_rank) for of_rank in counts] == [100, 100]
