"""Whether the learners are well: their parameters finite, and the same where they must be."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.errors import CorruptionError, InputError, SickLearnersError
from hpcavg.utils.text import fold_numbers

_DISTANCE_CHUNK_ELEMENTS = 2**20
_DIGEST_BYTES = hashlib.sha256().digest_size


# -- sick learners ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Excluded:
    """The learners that a mean leaves out, because their parameters are not finite.

    Attributes
    ----------
    learners : their indices.
    num_members : the number of learners that take part, with them.
    is_here : whether this rank's learner is one of them.
    """

    learners: tuple[int, ...]
    num_members: int
    is_here: bool

    @property
    def is_everyone(self) -> bool:
        """Whether nobody is left to take a mean of."""
        return len(self.learners) == self.num_members

    def zero_contribution(self, arrays: Iterable[Tensor]) -> None:
        """Make this learner's `arrays` zero if it is left out: it then adds nothing to a sum."""
        if self.is_here:
            for array in arrays:
                array.zero_()

    def rescale(self, means: list[Tensor], weights: Mapping[int, float]) -> list[Tensor]:
        """Return weighted means of the others, in place.

        Parameters
        ----------
        means : each of shape (numel,), to which the excluded learners have added zeros.
        weights : by learner, its weight; together they are 1.
        """
        well = sum(weight for learner, weight in weights.items() if learner not in self.learners)
        if self.learners and well > 0:
            for mean in means:
                mean.div_(well)
        return means

    @property
    def num_well(self) -> int | None:
        """By how many an engine divides the sum without them; None if nobody is left out. At least 1."""
        return max(self.num_members - len(self.learners), 1) if self.learners else None


def raise_sick(excluded: Excluded, scope: Scope, topology: Topology, what: str, tensor: str) -> NoReturn:
    """Raise `SickLearnersError` on all of `scope`, with the first tensor that a sick learner names. Collective.

    Parameters
    ----------
    excluded : the sick learners.
    scope : the learners that raise.
    topology : all learners.
    what : what cannot be done.
    tensor : this learner's first tensor that is not finite, "" for none.
    """
    own = tensor if excluded.is_here else ""
    # Neighbours of other learners know nothing of it, so a learner on a graph can name its own tensor only.
    tensors = [own] if isinstance(scope, Neighbours) else topology.comm(scope).allgather(own)
    raise SickLearnersError(excluded.learners, what, excluded.num_members, next(filter(None, tensors), ""))


def examine(arrays: Iterable[Tensor], num_learners: int) -> tuple[bool, bool]:
    """Return whether all elements of `arrays` are finite, and whether some are so large that their sum may overflow.

    One pass. arrays : each of shape (learners, numel). num_learners : how many values are summed.
    """
    is_finite, is_large = True, False
    for array in arrays:
        values = torch.view_as_real(array) if array.is_complex() else array
        # Squares that can be summed are of values that can be. Half precision has too small a range for squares.
        if values.itemsize > 2 and math.isfinite(torch.linalg.vector_norm(values).item()):
            continue
        if values.numel():
            lowest, highest = (float(bound) for bound in values.aminmax())  # NaN where one value is
            # Half precision is summed in float32, in which no sum of float16 overflows.
            limit = torch.finfo(torch.float32 if values.itemsize == 2 else values.dtype).max / num_learners
            is_finite = is_finite and math.isfinite(lowest) and math.isfinite(highest)
            is_large = is_large or max(-lowest, highest) > limit
    return is_finite, is_large and is_finite


def is_finite(arrays: Iterable[Tensor]) -> bool:
    """Return whether every element of `arrays`, each of shape (learners, numel), is finite. One pass over them."""
    return examine(arrays, 1)[0]


def squared_distance(x: Tensor, mean: Tensor) -> float:
    """Return ||x_j - mean||², averaged over the rows of `x`, summed in float64."""
    parts = [
        (rows - part).abs().double().square().sum()
        for rows, part in zip(
            x.split(_DISTANCE_CHUNK_ELEMENTS, dim=1), mean.split(_DISTANCE_CHUNK_ELEMENTS), strict=True
        )
    ]
    return float(torch.stack(parts).sum()) / x.shape[0] if parts else 0.0


# -- silent corruption --------------------------------------------------------------------------------------------


def compare(parts: Mapping[str, Iterable[Tensor]], topology: Topology, when: str) -> None:
    """Raise `CorruptionError` on every learner unless all of them hold the same bits. Collective over the learners.

    parts : what to compare, by the name it has in the message. when : what has made them equal, for the message.
    """
    num_ranks = topology.num_learner_ranks
    if num_ranks == 1 or not parts:
        return
    own = np.frombuffer(b"".join(map(digest, parts.values())), dtype=np.uint8)
    told = np.empty((num_ranks, len(parts), _DIGEST_BYTES), dtype=np.uint8)
    topology.learner_ranks.Allgather(own, told)
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


class EqualityCheck:
    """Compares, after every N-th global mean, what must then be equal on all learners.

    Parameters
    ----------
    topology : the learners.
    every : N, counted in global means; 0 compares nothing.
    frozen : the tensors that no training changes, which are compared along with the others.
    """

    def __init__(self, topology: Topology, every: int, frozen: Sequence[Tensor]) -> None:
        self._topology = topology
        self._every = every
        self._frozen = frozen
        self._alarm: CorruptionError | None = None

    def compare(self, number: int, step: int, parts: Mapping[str, Sequence[Tensor]]) -> None:
        """Compare `parts`, by their names, if mean `number` is one to check after. Collective over all learners."""
        if not self._every or number % self._every:
            return
        given = {name: tensors for name, tensors in {**parts, "frozen parameters": self._frozen}.items() if tensors}
        try:
            self._topology.run_collective(
                lambda: compare(given, self._topology, f"at step {step}"), what=f"comparison at step {step}"
            )
        except CorruptionError as error:
            self._alarm = error

    def raise_alarm(self) -> None:
        """Raise what the last comparison has found, once all else is done that belongs to the step."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            raise alarm


def check_same_start(fingerprints: Sequence[int]) -> None:
    """Raise `InputError` unless all learners gave the same fingerprint of what they start from."""
    if len(set(fingerprints)) > 1:
        odd = [learner for learner, other in enumerate(fingerprints) if other != fingerprints[0]]
        raise InputError(
            "model",
            f"other parameters on ranks {fold_numbers(odd)} than on rank 0",
            "the same on all ranks where anchors or servers start: load weights on all of them, or before the Averager",
        )


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Return 64 bits that differ where the bits of `tensors` do."""
    return int.from_bytes(digest(tensors)[:8], "little")


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
