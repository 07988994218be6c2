"""Items made ahead by threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Position = TypeVar("Position")
Item = TypeVar("Item")


class Prefetch(Generic[Position, Item]):
    """Makes items one after the other: threads make the next ones while the last is in use.

    Parameters
    ----------
    make : callable
        Makes the item of a position. It must not depend on the order of calls, nor on the thread.
    following : callable
        Returns the position after another.
    num_threads : int
        How many threads make items; 0: `get` makes them.

    Examples
    --------
    >>> prefetch = Prefetch(lambda n: n * n, following=lambda n: n + 1, num_threads=1)
    >>> [prefetch.get(n) for n in (0, 1, 5)]
    [0, 1, 25]
    >>> prefetch.forget()
    """

    def __init__(
        self, make: Callable[[Position], Item], following: Callable[[Position], Position], num_threads: int
    ) -> None:
        self._make = make
        self._following = following
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "prefetch") if num_threads else None
        self._ahead: deque[tuple[Position, Future[Item]]] = deque()

    def get(self, position: Position) -> Item:
        """Return the item of `position`. Raises the error of making it, if any."""
        if self._pool is None:
            return self._make(position)
        if self._ahead and self._ahead[0][0] != position:
            self.forget()
        while len(self._ahead) <= self._num_threads:
            last = self._following(self._ahead[-1][0]) if self._ahead else position
            self._ahead.append((last, self._pool.submit(self._make, last)))
        return self._ahead.popleft()[1].result()

    def forget(self) -> None:
        """Drop the items that were made ahead. Returns when no thread is making one."""
        unfinished = [item for _, item in self._ahead if not item.cancel()]
        self._ahead.clear()
        for item in unfinished:
            item.exception()
