"""The formats of the files of a run: each file carries a number, and readers refuse numbers above the one they know.

Four files carry one: ``config.toml`` and ``summary.json`` as ``format``, the HDF5 files of ``metrics/`` as an attribute
of that name, a checkpoint's ``manifest.json`` as ``format``. Tensor files carry none as long as their format is 1, so
that equal models keep equal checksums.

A file without a number has format 1. A new option, column or field leaves the number as it is: for what is absent, a
reader takes the default. The number goes up when an older reader would misread the file.
"""

from __future__ import annotations

FIRST = 1
NEWER = "perhaps of a newer hpcavg"
"""What messages say of a name that is unknown."""


class NewerFormatError(ValueError):
    """A file in a format of a later hpcavg.

    Parameters
    ----------
    found : int
        The file's format.
    known : int
        The last format that this hpcavg reads.
    """

    def __init__(self, found: int, known: int) -> None:
        super().__init__(f"it is of format {found}; this hpcavg reads up to {known}")


def check(found: object, known: int) -> None:
    """Raise `NewerFormatError` if a file's format `found` is later than `known`, `ValueError` if it is no format.

    Examples
    --------
    >>> from hpcavg.utils import format_version
    >>> format_version.check(1, 2)
    >>> format_version.check(3, 2)
    Traceback (most recent call last):
    hpcavg.utils.format_version.NewerFormatError: it is of format 3; this hpcavg reads up to 2
    """
    if type(found) is not int or found < FIRST:
        raise ValueError(f"{found!r} is no format")
    if found > known:
        raise NewerFormatError(found, known)
