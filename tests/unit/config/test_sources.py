"""Formats of TOML files: those of runs carry one."""

import re

import pytest

from hpcavg.config.sources import from_sources, read_toml
from hpcavg.errors import InputError


def test_the_format_is_no_option(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('format = 1\nalgorithm = "sgd"\n')
    assert read_toml(path) == {"algorithm": "sgd"}
    assert from_sources(str(path), {}).algorithm == "sgd"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("format = 2\nwarp = 9\n", "a TOML file (it is of format 2; this hpcavg reads up to 1)"),
        ('format = "new"\n', "a TOML file ('new' is no format)"),
    ],
)
def test_another_format_is_named(tmp_path, text, why):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(InputError, match=re.escape(why)):
        from_sources(str(tmp_path / "config.toml"), {})


def test_an_unknown_option_may_be_a_newer_ones(tmp_path):
    (tmp_path / "config.toml").write_text("format = 1\nwarp = 9\n")
    with pytest.raises(InputError, match=r"'warp' is none of .*, perhaps of a newer hpcavg$"):
        from_sources(str(tmp_path / "config.toml"), {})


def test_an_engine_of_earlier_versions_is_auto(tmp_path):
    (tmp_path / "config.toml").write_text('engine = "cuda-ipc"\n')
    with pytest.warns(UserWarning, match=r"config\.toml: the engine cuda-ipc is no more; auto takes its place"):
        assert from_sources(str(tmp_path / "config.toml"), {}).averaging.engine == "auto"
    with pytest.raises(InputError, match="engine='cuda-ipc': must be one of auto, "):
        from_sources(None, {"engine": "cuda-ipc"})
