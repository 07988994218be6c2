"""Health of the learners: parameters that are not finite, and bits that differ but must be equal."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.reduction import Array
from hpcavg.errors import CorruptionError, InputError, SickLearnersError
from hpcavg.utils.text import fold_numbers

# Up to this size, NumPy takes less time than torch. Above it, its library may start threads.
_SMALL_ELEMENTS = 8192
_DISTANCE_CHUNK_ELEMENTS = 2**20
# A page costs more than the elements that are read of it: there are few stretches, and they are short.
_NUM_STRETCHES, _STRETCH_ELEMENTS = 256, 16
# The distance of smaller arrays is exact.
_SAMPLED_ELEMENTS = 65536
_DIGEST_BYTES = hashlib.sha256().digest_size


# -- sick learners ------------------------------------------------------------------------------------------------


class Excluded(NamedTuple):
    """The sick learners: a mean leaves them out, because their parameters are not finite.

    Attributes
    ----------
    learners : their indices.
    num_members : the number of learners that take part, sick ones included.
    rows : the rows of those that this rank holds.

    Examples
    --------
    >>> from hpcavg.averaging.health import Excluded
    >>> Excluded(learners=(2,), num_members=4, rows=()).num_well
    3
    """

    learners: tuple[int, ...]
    num_members: int
    rows: Sequence[int]

    @property
    def are_all(self) -> bool:
        """Whether all learners are sick."""
        return len(self.learners) == self.num_members

    def zero_contribution(self, arrays: Iterable[Tensor]) -> None:
        """Set the sick rows of `arrays` to zero: they then add nothing to a sum."""
        if self.rows:
            for array in arrays:
                array[list(self.rows)] = 0

    def rescale(self, means: list[Tensor], weights: Sequence[Mapping[int, float]]) -> list[Tensor]:
        """Turn weighted means in which sick learners added zeros into means of the others, in place.

        Parameters
        ----------
        means : each of shape (learners, numel).
        weights : for each row, the weight of each learner, by its index. Their sum is 1.
        """
        for row, of_row in enumerate(weights if self.learners else ()):
            well = sum(weight for learner, weight in of_row.items() if learner not in self.learners)
            for mean in means if well > 0 else ():
                mean[row].div_(well)
        return means

    @property
    def num_well(self) -> int | None:
        """The divisor of the sum, at least 1; None if no learner is sick. See `Engine.mean`."""
        return max(self.num_members - len(self.learners), 1) if self.learners else None


def raise_sick(excluded: Excluded, scope: Scope, topology: Topology, what: str, tensor: str) -> NoReturn:
    """Raise `SickLearnersError` with the name of a tensor. Collective over `scope`.

    Parameters
    ----------
    excluded : the sick learners.
    scope : the learners that raise.
    topology : all learners.
    what : the mean or checkpoint that cannot be taken.
    tensor : the name of this rank's first tensor that is not finite; "" if all are finite.
    """
    own = tensor if excluded.rows else ""
    # On a graph, other learners do not take part in this call, so a learner can name its own tensor only.
    tensors = [own] if isinstance(scope, Neighbours) else topology.comm(scope).allgather(own)
    raise SickLearnersError(excluded.learners, what, excluded.num_members, next(filter(None, tensors), ""))


def examine(arrays: Iterable[Array], num_learners: int) -> tuple[bool, bool]:
    """Return whether all elements of `arrays` are finite, and whether a sum over the learners may overflow.

    It reads the arrays once.

    Parameters
    ----------
    arrays : any shapes; real or complex.
    num_learners : the number of learners in the sum.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.averaging.health import examine
    >>> examine([torch.tensor([1.0, 3e38])], num_learners=2)
    (True, True)
    >>> examine([torch.tensor([1.0, torch.nan])], num_learners=2)
    (False, False)
    """
    is_finite, is_large = True, False
    for array in arrays:
        # If the sum of squares is finite, the sum of the values is, too. Squares overflow in half precision.
        if isinstance(array, np.ndarray):
            if array.size <= _SMALL_ELEMENTS and math.isfinite(np.vdot(array, array).real):
                continue
            array = torch.from_numpy(array)
        values = torch.view_as_real(array) if array.is_complex() else array
        if values.itemsize > 2 and math.isfinite(torch.linalg.vector_norm(values).item()):
            continue
        if values.numel():
            lowest, highest = (float(bound) for bound in values.aminmax())  # NaN if one value is NaN
            # Half precision is summed in float32; a sum of float16 never overflows in it.
            limit = torch.finfo(torch.float32 if values.itemsize == 2 else values.dtype).max / num_learners
            is_finite = is_finite and math.isfinite(lowest) and math.isfinite(highest)
            is_large = is_large or max(-lowest, highest) > limit
    return is_finite, is_large and is_finite


def examine_rows(arrays: Sequence[Array], num_learners: int) -> tuple[tuple[int, ...], bool]:
    """Return the rows in which an element is not finite, and whether a sum over the learners may overflow.

    It reads the arrays once if all elements are finite.

    Parameters
    ----------
    arrays : each of shape (learners, numel).
    num_learners : the number of learners in the sum.

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.averaging.health import examine_rows
    >>> examine_rows([np.array([[1.0], [np.nan], [2.0]])], num_learners=6)
    ((1,), False)
    """
    is_finite, is_large = examine(arrays, num_learners)
    if is_finite:
        return (), is_large
    looks = [examine([array[row : row + 1] for array in arrays], num_learners) for row in range(len(arrays[0]))]
    return tuple(row for row, (is_finite, _) in enumerate(looks) if not is_finite), any(large for _, large in looks)


def is_finite(arrays: Iterable[Tensor]) -> bool:
    """Return whether all elements of `arrays` are finite. It reads the arrays once."""
    return examine(arrays, 1)[0]


def sample_of(x: Array) -> Array:
    """Return the elements of `x` on which a distance is measured: a view of shape (learners, ...).

    Of an array of more than 65536 elements, these are 256 stretches of 16 elements, at equal distances. Parameters take
    part in proportion to their size.

    The squared distance on the sample has a relative error (root mean square) of sqrt(2 / 4096) = 2.2 % if the
    differences have a normal distribution. The differences of trained networks are larger in some layers than in
    others: 20 % for ResNet-18, 17 % for ResNet-20 and 14 % for MobileNetV2, after 8 steps on the digits.

    Parameters
    ----------
    x : shape (learners, numel).

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.averaging.health import sample_of
    >>> sample_of(np.zeros((1, 20_000))).shape, sample_of(np.zeros((1, 200_000))).shape
    ((1, 20000), (1, 256, 16))
    """
    num_learners, numel = x.shape
    if numel <= _SAMPLED_ELEMENTS:
        return x
    every = numel // _NUM_STRETCHES
    stretches = x[:, : _NUM_STRETCHES * every].reshape(num_learners, _NUM_STRETCHES, every)
    # From the middle: the first parameters of a network are few and move far.
    return stretches[:, :, every // 2 : every // 2 + _STRETCH_ELEMENTS]


def squared_distances(x: Array, mean: Array) -> list[float]:
    """Return ||x_j - mean||² of every learner, summed in float64.

    Parameters
    ----------
    x : shape (learners, numel), or its `sample_of`. The distance is then in proportion to the elements.
    mean : shape (numel,).

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.averaging.health import sample_of, squared_distances
    >>> x = np.ones((2, 100_000))
    >>> squared_distances(x, np.zeros(100_000)), squared_distances(sample_of(x), np.zeros(100_000))
    ([100000.0, 100000.0], [100000.0, 100000.0])
    """
    others = mean if x.ndim == 2 else sample_of(mean[None])[0]
    step = max(1, _DISTANCE_CHUNK_ELEMENTS // x.shape[0])
    if others.shape[0] <= step:
        squares = _squared_norms(x, others)
    else:  # less memory for the differences
        pieces = [slice(first, first + step) for first in range(0, others.shape[0], step)]
        squares = np.sum([_squared_norms(x[:, piece], others[piece]) for piece in pieces], axis=0).tolist()
    if x.ndim == 2:
        return squares
    scale = mean.shape[0] / math.prod(others.shape)
    return [square * scale for square in squares]


def _squared_norms(x: Array, others: Array) -> list[float]:
    """Return ||x_j - others||² of each row, summed in float64; infinity if it is too large for that."""
    if isinstance(x, Tensor):
        differences = cast(Tensor, x - others)
        real = torch.view_as_real(differences) if differences.is_complex() else differences
        return torch.linalg.vector_norm(real.flatten(1), dim=1, dtype=torch.float64).square().tolist()
    wide = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
    if x.dtype == wide.dtype:
        with np.errstate(over="ignore"):
            wide -= others
    else:  # narrow numbers cannot overflow in wide ones
        wide -= others
    if wide.shape[0] == 1:
        return [float(np.vdot(wide, wide).real)]
    flat = wide.reshape(wide.shape[0], -1)
    return np.einsum("ij,ij->i", flat.conj(), flat).real.tolist()


# -- silent corruption --------------------------------------------------------------------------------------------


def compare(parts: Mapping[str, Iterable[Tensor]], topology: Topology, when: str) -> None:
    """Raise `CorruptionError` on every learner unless all hold the same bits. Collective over all learners.

    Parameters
    ----------
    parts : the tensors to compare, by their name in the message.
    topology : the learners.
    when : the event that has made them equal, for the message.
    """
    num_ranks = topology.num_learner_ranks
    if num_ranks == 1 or not parts:
        return
    own = np.frombuffer(b"".join(map(digest, parts.values())), dtype=np.uint8)
    gathered = np.empty((num_ranks, len(parts), _DIGEST_BYTES), dtype=np.uint8)
    topology.learner_ranks.Allgather(own, gathered)
    digests = {name: [each.tobytes() for each in gathered[:, index]] for index, name in enumerate(parts)}
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
    """Compares what must be equal on all learners, after every N-th global mean.

    Parameters
    ----------
    topology : the learners.
    every : N; 0 compares nothing.
    frozen : tensors that training does not change, compared with the others.
    """

    def __init__(self, topology: Topology, every: int, frozen: Sequence[Tensor]) -> None:
        self._topology = topology
        self._every = every
        self._frozen = frozen
        self._alarm: CorruptionError | None = None

    def compare(self, number: int, step: int, parts: Callable[[], Mapping[str, Sequence[Tensor]]]) -> None:
        """Compare tensors if `number` is a multiple of N; see `raise_alarm`. Collective over all learners.

        Parameters
        ----------
        number : the number of the global mean; 0 is always compared.
        step : the step of the mean, for the message.
        parts : returns the tensors, by their name in the message.
        """
        if not self._every or number % self._every:
            return
        given = {name: tensors for name, tensors in {**parts(), "frozen parameters": self._frozen}.items() if tensors}
        try:
            self._topology.run_collective(
                lambda: compare(given, self._topology, f"at step {step}"), what=f"comparison at step {step}"
            )
        except CorruptionError as error:
            self._alarm = error

    def raise_alarm(self) -> None:
        """Raise `CorruptionError` if the last comparison found a difference. Called at the end of a step."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            raise alarm


def check_same_start(fingerprints: Sequence[int]) -> None:
    """Raise `InputError` unless all learners start from the same parameters.

    Parameters
    ----------
    fingerprints : the fingerprint of every learner's parameters.
    """
    if len(set(fingerprints)) > 1:
        odd = [learner for learner, other in enumerate(fingerprints) if other != fingerprints[0]]
        raise InputError(
            "model",
            f"other parameters on ranks {fold_numbers(odd)} than on rank 0",
            "the same on all ranks if anchors or servers start: load weights on all of them, or before the Averager",
        )


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Return a 64-bit hash of the bits of `tensors`."""
    return int.from_bytes(digest(tensors)[:8], "little")


def digest(tensors: Iterable[Tensor]) -> bytes:
    """Return the SHA-256 hash of the bits of `tensors`, on any device."""
    # Current processors have instructions for SHA-256, which make it more than twice as fast as BLAKE2.
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.digest()


def _most_frequent(values: list[bytes]) -> bytes | None:
    """Return the most frequent value; None if several values are equally frequent."""
    (most, count), *others = Counter(values).most_common(2)
    return None if others and others[0][1] == count else most
