"""Send bytes between ranks over TCP and nothing else: the time that kernel and wire take for any sender."""

from __future__ import annotations

import socket
from concurrent.futures import Future, ThreadPoolExecutor

from mpi4py import MPI


class Ring:
    """Every rank sends `num_bytes` to the next rank and receives as many from the one before. Collective.

    Two threads of a rank do it, one for each connection. They stay in the kernel: the least work that a rank can do.
    """

    def __init__(self, comm: MPI.Comm, num_bytes: int) -> None:
        rank, num_ranks = comm.Get_rank(), comm.Get_size()
        with socket.create_server(("", 0)) as server:
            hosts = comm.allgather((socket.gethostname(), server.getsockname()[1]))
            self._next = socket.create_connection(hosts[(rank + 1) % num_ranks])
            self._last, _ = server.accept()
        self._sent, self._received = bytes(num_bytes), bytearray(num_bytes)
        self._pool = ThreadPoolExecutor(2)

    def start(self) -> tuple[Future[None], Future[None]]:
        """Start an exchange. It ends when both futures are done."""
        return self._pool.submit(self._next.sendall, self._sent), self._pool.submit(self._receive)

    def _receive(self) -> None:
        left = memoryview(self._received)
        while left:
            left = left[self._last.recv_into(left, 0, socket.MSG_WAITALL) :]
