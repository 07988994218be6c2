"""Summaries: through the file and back, also those of runs that diverged, and the table."""

import json
import math
import typing

import pytest

from hpcavg.results import summary
from hpcavg.utils.format_version import NewerFormatError


def example(**changes):
    kinds = {str: "k_avg", int: 3, float: 0.5, bool: True, list[int]: [3, 4, 3]}
    return {name: kinds.get(kind) for name, kind in typing.get_type_hints(summary.Summary).items()} | changes


def test_numbers_that_json_has_no_word_for(tmp_path):
    summary.write(tmp_path, example(train_loss=math.nan, test_loss=math.inf))
    assert json.loads((tmp_path / "summary.json").read_text())["train_loss"] is None
    read = summary.read(tmp_path)
    assert math.isnan(read["train_loss"])
    assert math.isnan(read["test_loss"])
    assert read["hidden_fraction"] is None
    assert ("train loss", "nan") in summary.rows(tmp_path, read)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("[]", "no summary"),
        ("{", "no JSON"),
        ('{"algorithm": "k_avg"}', "no averaging_blocked_s .and lacks 2. more fields"),
        (json.dumps(example(steps="3")), "a wrong steps"),
        (json.dumps(example(test_top5_accuracy="x")), "a wrong test_top5_accuracy"),
    ],
)
def test_a_file_that_is_no_summary_is_refused_in_one_line(tmp_path, text, why):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=why) as caught:
        summary.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_summaries_of_earlier_and_later_versions(tmp_path):
    whole = example()
    for name in summary.DEFAULTS:  # as a version wrote it that did not have the field, nor those after it
        del whole[name]
        (tmp_path / "summary.json").write_text(json.dumps({**whole, "a_later_field": {"of": ["any", "kind"]}}))
        read = summary.read(tmp_path)
        assert read.keys() == example().keys()
        assert all(read[given] == value for given, value in whole.items())
        assert read[name] == summary.DEFAULTS[name] or math.isnan(read[name])
        summary.show([(tmp_path, read)])
    for name in whole:
        (tmp_path / "summary.json").write_text(json.dumps({**example(), name: None} | {name: []}))
        with pytest.raises(ValueError, match=f"a wrong {name}"):
            summary.read(tmp_path)


def test_a_newer_format_is_named_and_an_earlier_one_has_none(tmp_path):
    summary.write(tmp_path, example())
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {"format": 1, **example()}
    del written["format"]
    (tmp_path / "summary.json").write_text(json.dumps(written))
    assert summary.read(tmp_path) == example()
    (tmp_path / "summary.json").write_text(json.dumps({"format": 2, "algorithm": ["k_avg"]}))
    with pytest.raises(NewerFormatError, match=r"^it is of format 2; this hpcavg reads up to 1$"):
        summary.read(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"format": "two", **written}))
    with pytest.raises(ValueError, match="'two' is no format"):
        summary.read(tmp_path)


def test_every_field_has_its_row_in_the_docs():
    rows = summary.markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(summary.Summary.__annotations__)
    assert all(field.text for field in summary.FIELDS.values())


def labels(**changes):
    return {label for label, text in summary.rows("run", example(**changes)) if text}


def test_rows_that_do_not_apply_are_left_out():
    plain = {"num_servers": 0, "exchanges": 0, "local_averages": 0}
    everywhere = {"algorithm", "task", "learners", "steps", "test accuracy", "test loss", "train loss", "folder"}
    everywhere |= {"evaluation", "checkpoints", "wall time", "top-5 accuracy"}
    several = {"samples per learner", "of the learners' own", "averaged per learner", "blocked by averaging"}
    assert labels(**plain) == everywhere | several | {"global averages"}
    assert labels(**plain | {"local_averages": 2}) - labels(**plain) == {"local averages"}
    assert labels(**plain | {"num_servers": 1}) == everywhere | several | {"exchanges with servers"}
    alone = {"num_learners": 1, "samples_per_learner": [4]}
    assert labels(**plain, **alone) == everywhere | {"global averages"}
    unmeasured = dict.fromkeys(("test_accuracy", "learner_test_accuracy", "evaluation_s"), math.nan)
    gone = {"test accuracy", "of the learners' own", "checkpoints", "evaluation"}
    assert labels(**plain) - labels(**plain, **unmeasured, checkpoint_s=0.0) == gone
    assert labels(**plain, completed=False) - labels(**plain) == {"state"}


def test_an_unfinished_run_has_a_column_of_what_is_known(tmp_path):
    known = {"state": "unfinished", "algorithm": "k_avg", "num_learners": 2, "steps": 7, "test_accuracy": 0.5}
    assert [text for _, text in summary.rows(tmp_path, known) if text] == [
        *("k-avg", "unfinished", "2 learners", "7 so far", "0.5000", str(tmp_path))
    ]


def test_a_terminal_gets_as_many_tables_as_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(summary, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    summary.show([(tmp_path / f"{number}", example(task=f"task{number}")) for number in range(5)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "task" in line]
    assert [word for row in rows for word in row if word[-1:].isdigit()] == [f"task{number}" for number in range(5)]
    assert len(rows) == 3


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
    assert "state" not in printed
