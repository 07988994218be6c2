"""Summaries: through the file and back, also those of runs that diverged, and the table."""

import json
import math
import typing

import pytest

from hpcavg import run_folder, summary
from hpcavg.errors import InputError


def example(**changes):
    kinds = {str: "k_avg", int: 3, float: 0.5, bool: True, list[int]: [3, 4, 3]}
    return {name: kinds.get(kind) for name, kind in typing.get_type_hints(summary.Summary).items()} | changes


def test_numbers_that_json_has_no_word_for(tmp_path):
    run_folder.write_json(tmp_path / "summary.json", example(train_loss=math.nan, test_loss=math.inf))
    assert json.loads((tmp_path / "summary.json").read_text())["train_loss"] is None
    read = summary.read(tmp_path)
    assert math.isnan(read["train_loss"])
    assert math.isnan(read["test_loss"])
    assert read["hidden_fraction"] is None
    assert ("train loss", "nan") in summary.rows(tmp_path, read)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"algorithm": "k_avg"}'])
def test_a_file_that_is_no_summary_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InputError) as caught:
        summary.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_top5_accuracy_has_a_row_where_it_was_measured(tmp_path, capsys):
    without = example(test_top5_accuracy=math.nan)
    summary.show([(tmp_path, without)])
    assert "top-5" not in capsys.readouterr().out
    summary.show([(tmp_path, without), (tmp_path, example(test_top5_accuracy=0.9125))])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "top-5" in line)
    assert row.split() == ["│", "top-5", "accuracy", "│", "│", "0.9125", "│"]


def test_the_table_has_a_column_per_run(tmp_path, capsys):
    summary.show([(tmp_path / "a", example()), (tmp_path / "b", example(algorithm="hier_avg"))])
    printed = capsys.readouterr().out
    assert "k-avg" in printed
    assert "hier-avg" in printed
    assert "3 learners in groups of 3 and 3 servers, 3 nodes" in printed
    assert summary.counted(1, "node") == "1 node"
