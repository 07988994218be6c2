"""What the MPI library in this process is and can do."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path

from mpi4py import MPI

THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}
# The variables that change how messages travel. mpirun sets many more that do not.
_SETTINGS = re.compile(
    r"UCX_\w+|OMPI_MCA_(pml|btl|mtl|osc|coll|smsc|accelerator)(_\w+)?|HPCAVG_\w+"
    r"|(MPIR_CVAR|FI)_\w+|I_MPI_(FABRICS|OFI|SHM)\w*|MPICH_(CH4|OFI|UCX|GPU|SMP)_\w+"
)
# Open MPI: the components that can send messages ("pml"). The library selects one at its start.
_PMLS = ("ob1", "ucx", "cm")
# MPICH and its relatives: the device they were built with, and the variables that select another network module.
_DEVICE = re.compile(r"^\w+ Device\s*:\s*(ch[34]:(\w+).*?)\s*$", re.MULTILINE)
_NETMODS = ("MPIR_CVAR_CH4_NETMOD", "MPIR_PARAM_CH4_NETMOD", "MPICH_CH4_NETMOD")
_MPI_SUCCESS = 0


def version(text: str | None = None) -> str:
    """Return the library's name and version in a few words.

    Parameters
    ----------
    text : str, optional
        The library's description of itself. Default: the one of the library in this process.
    """
    text = MPI.Get_library_version() if text is None else text
    first, *_ = text.partition("\0")[0].strip().splitlines() or ["unknown"]
    if named := re.fullmatch(r"(\w+) Version\s*:\s*(.*)", first):  # MPICH; the lines after it tell how it was built
        return f"{named[1]} {named[2]}"
    return " ".join(first.partition(",")[0].removeprefix("MPI VERSION").strip(" :").split())


def is_open_mpi(version: str) -> bool:
    """Return whether `version`, as `version()` returns it, is Open MPI's. Other libraries have other options."""
    return version.startswith("Open MPI")


def thread_level() -> str:
    """Return the thread level that MPI was started with."""
    return THREAD_LEVELS.get(MPI.Query_thread(), "unknown")


def messages_by(environ: Mapping[str, str], text: str | None = None) -> tuple[str | None, str]:
    """Return what sends messages, and how that is known.

    Parameters
    ----------
    environ : Mapping
        The environment variables.
    text : str, optional
        The library's description of itself, as for `version`. A text replaces all other sources.

    Returns
    -------
    sender : str or None
        Open MPI: the selected component (ob1, ucx or cm). MPICH: the network module (ucx, ofi, ...), which is the one
        that `environ` selects or else the first of the device. None: the library does not tell.
    source : str
        How the sender is known, in a few words.
    """
    component = _selected_pml() if text is None else None
    if component is not None:
        return component, "the library's choice, by its control variables"
    device = _DEVICE.search(MPI.Get_library_version() if text is None else text)
    if device is None:
        return None, "the library does not tell"
    for name in _NETMODS:
        if environ.get(name):
            return environ[name], f"{name}; the library's device is {device[1]}"
    return device[2], f"the library's device is {device[1]}"


def _selected_pml() -> str | None:
    """Return the component of Open MPI that sends messages; None for another library.

    Open MPI closes the components that it does not select, and then their control variables are gone. The MPI tools
    interface (MPI 4.1, section 15.3) tells which variables there are.
    """
    library, level, index = _library(), ctypes.c_int(), ctypes.c_int()
    if library.MPI_T_init_thread(MPI.THREAD_MULTIPLE, ctypes.byref(level)) != _MPI_SUCCESS:
        return None
    names = {pml: f"pml_{pml}_priority".encode() for pml in _PMLS}
    found = [
        pml for pml, name in names.items() if library.MPI_T_cvar_get_index(name, ctypes.byref(index)) == _MPI_SUCCESS
    ]
    library.MPI_T_finalize()
    return found[0] if len(found) == 1 else None


def ucx(maps: Path = Path("/proc/self/maps")) -> tuple[str, list[str]] | None:
    """Return the version of UCX and its loaded transports; None if UCX is not in this process.

    A loaded UCX need not send the messages; see `messages_by`.

    Parameters
    ----------
    maps : Path
        The file that lists what is mapped into this process.
    """
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "/libuc" in line}
    library = next((path for path in sorted(paths) if re.search(r"/libucp[-.\w]*\.so", path)), None)
    if library is None:
        return None
    transports = {match[1] for path in paths if (match := re.search(r"/libuct_(\w+)[-.\w]*\.so", path))}
    return _ucx_version(library), sorted(transports)


def _ucx_version(path: str) -> str:
    """Return the version that the loaded library `path` reports."""
    numbers = [ctypes.c_uint() for _ in range(3)]
    try:
        ctypes.CDLL(path).ucp_get_version(*map(ctypes.byref, numbers))
    except (OSError, AttributeError):
        return "of unknown version"
    return ".".join(str(number.value) for number in numbers)


def has_fault_tolerance() -> bool:
    """Return whether the library has Open MPI's ULFM; `shrinking.is_enabled` tells whether it is switched on."""
    return is_open_mpi(version()) and hasattr(_library(), "MPIX_Comm_revoke")


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in `environ` that change how messages travel."""
    return {name: environ[name] for name in sorted(environ) if _SETTINGS.fullmatch(name)}


def _library() -> ctypes.CDLL:
    """Return the MPI library. mpi4py's module is linked to it, so its functions are found there."""
    return ctypes.CDLL(MPI.__file__)
