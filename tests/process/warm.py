"""Ranks forked from a process that has imported torch: a job starts with a quarter of the processor time.

Importing torch is most of what a short job costs. `Server` imports it once, and never MPI. mpirun starts ``python
warm.py MODULE ...`` on every rank, which imports nothing. It asks the server to fork the rank and hands over its
environment, arguments and standard streams. Then it passes signals on, and ends as the rank ends. If mpirun kills it,
the server kills the rank.

Signals and kills reach the rank through the process that mpirun has started. A test starts fresh ranks where it stops
them from outside, looks at them in /proc or sends signals while they start, where it tests how Python ends, and where
mpirun leaves a stopped rank to the kernel, as it does with ULFM.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading

SOCKET = "HPCAVG_TEST_WARM_SOCKET"
MODULES = ("h5py", "numpy", "sklearn.datasets", "torch")
STREAMS = (0, 1, 2)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Server:
    """The process that forks ranks. It ends with the process that made it.

    path : of its socket
    environment : of the server. Ranks have their own.
    """

    def __init__(self, path, environment):
        self.path = str(path)
        command = [sys.executable, __file__, "--serve", self.path]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        ready = self._process.stdout.readline()
        assert ready == b"ready\n", ready

    def command(self, module, arguments):
        """Return the command that runs `module` in a forked process; it needs `variables`."""
        return [*self.prefix, module, *arguments]

    @property
    def prefix(self):
        """What stands before a module and its arguments, or before ``python -m`` with them."""
        return [sys.executable, "-SE", __file__]

    @property
    def variables(self):
        """Environment variables of the command."""
        return {SOCKET: self.path}

    def close(self):
        """End the server and all its ranks."""
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


def serve(path):
    """Fork a rank for every connection, and tell it how the rank ended, until standard input ends."""
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # no rank looks through these modules for garbage
    ranks = {}  # by connection: the process id
    waiting = selectors.DefaultSelector()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    woken, wake = socket.socketpair()
    for end in (woken, wake, listening):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for source in (0, listening, woken):
        waiting.register(source, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                signal.set_wakeup_fd(-1)
                for pid in ranks.values():
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fileobj is listening:
                connection, _ = listening.accept()
                connection.setblocking(True)
                ranks[connection] = fork(connection, [listening, woken, wake, waiting, *ranks])
                connection.sendall(f"{ranks[connection]}\n".encode())
                waiting.register(connection, selectors.EVENT_READ)
            elif key.fileobj is woken:
                woken.recv(4096)
                bury(ranks, waiting)
            elif key.fileobj in ranks:  # whom mpirun has killed says no more
                os.kill(ranks[key.fileobj], signal.SIGKILL)
                waiting.unregister(key.fileobj)


def bury(ranks, waiting):
    """Tell those whose rank has ended its status."""
    for connection, pid in list(ranks.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del ranks[connection]
            with contextlib.suppress(OSError):  # mpirun has killed it
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            with contextlib.suppress(KeyError):
                waiting.unregister(connection)
            connection.close()


def fork(connection, of_server):
    """Fork the rank that `connection` describes; return its process id."""
    size = 4 * len(STREAMS)
    head, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(size))
    streams = array.array("i", ancillary[0][2][:size])
    with connection.makefile("rb") as file:
        arguments, variables, folder = json.loads(file.read(int(head)))
    pid = os.fork()
    if pid == 0:
        for other in (connection, *of_server):
            other.close()
        for here, there in zip(streams, STREAMS, strict=True):
            os.dup2(here, there)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        be_python(arguments)
    for stream in streams:
        os.close(stream)
    return pid


def be_python(arguments):
    """Do what ``python -m`` does with `arguments`, and end the process as it does."""
    import numpy

    numpy.random.seed()  # noqa: NPY002  the old generator would be the same on all ranks
    sys.orig_argv[:] = [sys.executable, "-m", *arguments]
    sys.argv[:] = arguments
    sys.path[:] = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path[1:]]
    status = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and sys.modules["mpi4py"].rc.finalize is not False and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpi4py does so as the interpreter ends, which this process never comes to
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def be_rank(arguments):
    """Have the server fork a rank, and end as it ends."""
    # A signal that comes before the rank's number is known waits until it can be passed on.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    content = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[SOCKET])
    streams = array.array("i", STREAMS)
    server.sendmsg([f"{len(content):8}".encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(content)
    answers = server.makefile()
    pid = int(answers.readline())

    def pass_on(number, frame):
        with contextlib.suppress(ProcessLookupError):  # it has ended, and the answer is on its way
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    # The streams stay open until the end: some prteruns hang once ranks with closed streams end with a status.
    status = int(answers.readline())
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        be_rank(sys.argv[3:] if sys.argv[2:3] == ["-m"] else sys.argv[1:])
