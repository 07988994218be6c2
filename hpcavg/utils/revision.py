"""The git revision of the checkout that hpcavg runs from."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path


@functools.cache
def git_revision() -> str | None:
    """Return the git revision of this checkout, followed by ``+`` if files differ from it; None if there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
