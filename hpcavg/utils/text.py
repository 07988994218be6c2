"""Text for people: counts, many names or numbers in short, and values of any kind on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

# A host's name: what comes before the last digits of its first part, these, and what comes after.
_NUMBERED = re.compile(r"([^.]*?)(\d+)([^.\d]*(?:\..*)?)")


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless it is one.

    >>> counted(1, "node"), counted(2, "node")
    ('1 node', '2 nodes')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def fold_names(names: Iterable[str]) -> str:
    """Return host names in the form of schedulers: names that differ in their last number share brackets.

    >>> fold_names(["node001", "node002", "node003", "node007", "login"])
    'node[001-003,007], login'
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
    """Return integers in ascending order, each run of them as its first and last.

    >>> fold_numbers([3, 0, 1, 2, 7])
    '0-3, 7'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def printable(value: object, max_length: int = 200) -> str:
    r"""Return `value` as one line of printable text.

    Parameters
    ----------
    value : object
        What to show.
    max_length : int
        Longer text is shortened in the middle, and its length is added.

    Examples
    --------
    >>> from hpcavg.utils.text import printable
    >>> print(printable("two\nlines"))
    two\nlines
    """
    try:
        text = str(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    if len(text) > max_length:
        text = f"{text[: max_length // 2]}...{text[-max_length // 4 :]} ({len(text)} characters)"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
