"""What the MPI library in this process is and can do, as far as it can be known, and how it is."""

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
# What changes how messages travel; mpirun sets many more variables that do not.
_SETTINGS = re.compile(
    r"UCX_\w+|OMPI_MCA_(pml|btl|mtl|osc|coll|smsc|accelerator)(_\w+)?|HPCAVG_\w+"
    r"|(MPIR_CVAR|FI)_\w+|I_MPI_(FABRICS|OFI|SHM)\w*|MPICH_(CH4|OFI|UCX|GPU|SMP)_\w+"
)
# Of MPICH and its kin: what sends messages, in the order in which it is preferred, and what chooses another.
_DEVICE = re.compile(r"^\w+ Device\s*:\s*(ch[34]:(\w+).*?)\s*$", re.MULTILINE)
_NETMODS = ("MPIR_CVAR_CH4_NETMOD", "MPIR_PARAM_CH4_NETMOD", "MPICH_CH4_NETMOD")
# Where Open MPI keeps a component's type and name: `mca_base_component_t`, the same since 2012.
_TYPE, _NAME, _COMPONENT_BYTES = 40, 84, 148


def version(text: str | None = None) -> str:
    """Return the library's name and version, of the same length on all that are alike.

    text : what it says of itself, which is asked for where it is None.
    """
    text = MPI.Get_library_version() if text is None else text
    first, *_ = text.partition("\0")[0].strip().splitlines() or ["unknown"]
    if named := re.fullmatch(r"(\w+) Version\s*:\s*(.*)", first):  # MPICH's kin, which tell how they were built, too
        return f"{named[1]} {named[2]}"
    return " ".join(first.partition(",")[0].removeprefix("MPI VERSION").strip(" :").split())


def is_open_mpi(version: str) -> bool:
    """Return whether `version`, as above, is of Open MPI, whose options others do not know."""
    return version.startswith("Open MPI")


def thread_level() -> str:
    """Return the thread level that MPI was started with."""
    return THREAD_LEVELS.get(MPI.Query_thread(), "unknown")


def messages_by(environ: Mapping[str, str], text: str | None = None) -> tuple[str | None, str]:
    """Return what sends messages, None where the library does not tell, and how that is known.

    That is a component of Open MPI (ob1, ucx or cm), read from the library's memory, whatever was asked for; or MPICH's
    network module (ucx or ofi), the first of its device or the one that `environ` asks for. text : as in `version`.
    """
    component = _pml_component()
    if component is not None and text is None:
        return component, "the library's choice, read from its memory"
    device = _DEVICE.search(MPI.Get_library_version() if text is None else text)
    if device is None:
        return None, "the library does not tell"
    for name in _NETMODS:
        if environ.get(name):
            return environ[name], f"{name}; the library's device is {device[1]}"
    return device[2], f"the library's device is {device[1]}"


def _pml_component() -> str | None:
    try:
        component = bytes((ctypes.c_char * _COMPONENT_BYTES).in_dll(_library(), "mca_pml_base_selected_component"))
    except ValueError:  # no such symbol
        return None
    kind, name = (component[start:].partition(b"\0")[0] for start in (_TYPE, _NAME))
    return name.decode(errors="replace") if kind == b"pml" else None


def ucx(maps: Path = Path("/proc/self/maps")) -> tuple[str, list[str]] | None:
    """Return the version of UCX and the transports that it has loaded; None where UCX is not in this process.

    That it is there says nothing of whether it is used; see `messages_by`. maps : the file that lists what is.
    """
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "/libuc" in line}
    library = next((path for path in sorted(paths) if re.search(r"/libucp[-.\w]*\.so", path)), None)
    if library is None:
        return None
    transports = {match[1] for path in paths if (match := re.search(r"/libuct_(\w+)[-.\w]*\.so", path))}
    return _ucx_version(library), sorted(transports)


def _ucx_version(path: str) -> str:
    """Return what the library that is already loaded from `path` says."""
    numbers = [ctypes.c_uint() for _ in range(3)]
    try:
        ctypes.CDLL(path).ucp_get_version(*map(ctypes.byref, numbers))
    except (OSError, AttributeError):
        return "of unknown version"
    return ".".join(str(number.value) for number in numbers)


def has_fault_tolerance() -> bool:
    """Return whether the library has Open MPI's ULFM; `shrinking.is_enabled` tells whether it is on."""
    return is_open_mpi(version()) and hasattr(_library(), "MPIX_Comm_revoke")


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in `environ` that have a say in how messages travel."""
    return {name: environ[name] for name in sorted(environ) if _SETTINGS.fullmatch(name)}


def _library() -> ctypes.CDLL:
    """Return the MPI library, through mpi4py, which is linked to it."""
    return ctypes.CDLL(MPI.__file__)
