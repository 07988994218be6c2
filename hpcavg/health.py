"""Whether the learners are well: their parameters finite, and the same where they must be."""

from __future__ import annotations

import cmath
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.errors import CorruptionError
from hpcavg.schedule import Scope
from hpcavg.topology import Topology

POLICIES = ("exclude", "stop")

_CHUNK_ELEMENTS = 2**18
_DIGEST_BYTES = hashlib.sha256().digest_size


# -- sick learners ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sick:
    """The learners that a mean leaves out, because their parameters are not finite.

    Attributes
    ----------
    learners : their indices in the topology's `world`. num_members : how many learners the mean is over, with them.
    is_here : this rank's learner is one of them.
    """

    learners: tuple[int, ...]
    num_members: int
    is_here: bool

    @property
    def is_everyone(self) -> bool:
        """Whether nobody is left to take a mean of."""
        return len(self.learners) == self.num_members

    def withdraw(self, arrays: Iterable[Tensor]) -> None:
        """Make this learner's `arrays` zero if it is one of them: it then adds nothing to a sum."""
        if self.is_here:
            for array in arrays:
                array.zero_()

    @property
    def num_well(self) -> int | None:
        """How many learners the mean is over without them, as engines take it; None where nobody is sick."""
        return self.num_members - len(self.learners) if self.learners else None


def agree_on_sick(is_sick: bool, scope: Scope, topology: Topology) -> Sick:
    """Tell the learners of `scope` whether this one is sick, and learn which are. Collective over the scope."""
    comm = topology.comm(scope)
    num_members = comm.Get_size()
    told = bytearray([is_sick])
    if num_members > 1:
        own, told = told, bytearray(num_members)
        comm.Allgather([own, MPI.BYTE], [told, MPI.BYTE])
    if not any(told):
        return Sick((), num_members, False)
    members = [member for member, is_one in enumerate(told) if is_one]
    learners = comm.Get_group().Translate_ranks(members, topology.world.Get_group())
    return Sick(tuple(learners), num_members, is_sick)


def is_finite(arrays: Iterable[Tensor]) -> bool:
    """Return whether every element of `arrays`, each of shape (learners, numel), is finite. One pass over them."""
    # What is not finite stays in a sum for good. A sum can also overflow without, and only then is there more to do.
    return all(cmath.isfinite(array.sum().item()) or _is_all_finite(array) for array in arrays)


def _is_all_finite(array: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for row in array for part in row.split(_CHUNK_ELEMENTS))


# -- silent corruption --------------------------------------------------------------------------------------------


def compare(parts: Mapping[str, Iterable[Tensor]], topology: Topology, when: str) -> None:
    """Raise `CorruptionError` on every learner unless all of them hold the same bits. Collective over the learners.

    parts : what to compare, by the name it has in the message. when : what has made them equal, for the message.
    """
    num_learners = topology.num_learners
    if num_learners == 1 or not parts:
        return
    own = np.frombuffer(b"".join(map(digest, parts.values())), dtype=np.uint8)
    told = np.empty((num_learners, len(parts), _DIGEST_BYTES), dtype=np.uint8)
    topology.world.Allgather(own, told)
    digests = {name: [each.tobytes() for each in told[:, index]] for index, name in enumerate(parts)}
    differing = {name: of_learners for name, of_learners in digests.items() if len(set(of_learners)) > 1}
    if differing:
        odd: set[int] = set()
        is_known = True
        for of_learners in differing.values():
            most = _most_frequent(of_learners)
            is_known = is_known and most is not None
            odd.update(learner for learner, each in enumerate(of_learners) if each != most)
        raise CorruptionError(sorted(odd), is_known, list(differing), when)


def digest(tensors: Iterable[Tensor]) -> bytes:
    """Return a hash of the bits of `tensors`, wherever they are."""
    # SHA-256 is in the instruction sets of current processors, and there more than twice as fast as BLAKE2.
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.digest()


def _most_frequent(values: list[bytes]) -> bytes | None:
    """Return the value that is there more often than any other; None where there is none such."""
    (most, count), *others = Counter(values).most_common(2)
    return None if others and others[0][1] == count else most
