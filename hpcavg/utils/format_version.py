"""The formats of the files of a run: each file carries a number, and readers refuse numbers above the one they know.

Four files carry one: ``config.toml`` and ``summary.json`` as ``format``, the HDF5 files of ``metrics/`` as an attribute
of that name, a checkpoint's ``manifest.json`` as ``format``. Tensor files carry none as long as their format is 1, so
that equal models keep equal checksums.

A file without a number has format 1. A new option, column or field leaves the number as it is: for what is absent, a
reader takes the default. The number goes up when an older reader would misread the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

FIRST = 1
NEWER = "perhaps of a newer hpcavg"
"""What messages say of a name that is unknown."""


class NewerFormatError(ValueError):
    """A file, or a part of one, that a later hpcavg wrote."""


def check(found: object, known: int) -> None:
    """Raise `NewerFormatError` if a file's format `found` is later than `known`, `ValueError` if it is no format.

    Examples
    --------
    >>> from hpcavg.utils import format_version
    >>> format_version.check(1, known=2)
    >>> format_version.check(3, known=2)
    Traceback (most recent call last):
    hpcavg.utils.format_version.NewerFormatError: it is of format 3; this hpcavg reads up to 2
    """
    if type(found) is not int or found < FIRST:
        raise ValueError(f"{found!r} is no format")
    if found > known:
        raise NewerFormatError(f"it is of format {found}; this hpcavg reads up to {known}")


def refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Raise `NewerFormatError` for the first of `names` that is not `known`.

    Examples
    --------
    >>> from hpcavg.utils import format_version
    >>> format_version.refuse_unknown(["epoch", "ema"], known=["epoch", "losses"])
    Traceback (most recent call last):
    hpcavg.utils.format_version.NewerFormatError: 'ema' is unknown: perhaps of a newer hpcavg
    """
    for name in names:
        if name not in known:
            raise NewerFormatError(f"{name!r} is unknown: {NEWER}")
