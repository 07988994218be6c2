"""Short names for many: nodes, ranks and cores as their first and their last."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A host's name: what comes before the last digits of its first part, these, and what comes after.
_NUMBERED = re.compile(r"([^.]*?)(\d+)([^.\d]*(?:\..*)?)")


def fold_names(names: Iterable[str]) -> str:
    """Return host names in brackets as schedulers write them: ``node[001-003,007], login``.

    Names that differ in one number are folded, in the order of these; ``node9`` and ``node10`` are, too.
    """
    digits_of: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(names):
        match = _NUMBERED.fullmatch(name)
        form, digits = ((match[1], match[3]), match[2]) if match else ((name, ""), "")
        digits_of.setdefault(form, []).append(digits)
    folded = []
    for (before, after), digits in digits_of.items():
        runs: list[list[str]] = []
        for text in sorted(digits, key=lambda text: (int(text or 0), len(text))):
            if runs and text == str(int(runs[-1][-1]) + 1).zfill(len(runs[-1][-1])):
                runs[-1][1:] = [text]
            else:
                runs.append([text])
        listed = ",".join("-".join(run) for run in runs)
        folded.append(f"{before}{listed if len(digits) == 1 else f'[{listed}]'}{after}")
    return ", ".join(folded)


def fold_numbers(numbers: Iterable[int]) -> str:
    """Return integers in their order, runs of them as the first and the last: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def printable(value: object, max_length: int = 200) -> str:
    """Return `value` as text of one line that any terminal takes, shortened where it is longer than `max_length`."""
    try:
        text = str(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    if len(text) > max_length:
        text = f"{text[: max_length // 2]}...{text[-max_length // 4 :]} ({len(text)} characters)"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
