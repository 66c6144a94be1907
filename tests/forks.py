"""Processes that are forked from a process that has already imported TurboGears.

These imports take a second of CPU, and the tests start about a hundred servers. Only
packages are imported before the fork, nothing of tgstream or of the tests.

    python -m tests.forks 3

It serves the requests that arrive on the socket with this file descriptor.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from importlib import import_module
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

PACKAGES = [
    *("gunicorn.app.base", "psutil", "psycopg", "waitress.server", "zope.sqlalchemy"),
    *("tg", "tg.appwrappers.caching", "tg.appwrappers.session"),
    *("tg.renderers.genshi", "tg.renderers.jinja", "tg.renderers.kajiki"),
    *("tg.renderers.mako", "backlash", "backlash.tracing.slowrequests"),
]
ROOT = Path(__file__).parents[1]
REQUEST_BYTES = 1 << 20
STATUS_BYTES = 16
_lock = threading.Lock()


@functools.cache
def _start_template() -> socket.socket:
    """Start the process that forks, and return the socket for requests to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = theirs.fileno()
    command = [sys.executable, "-m", "tests.forks", str(number)]
    with theirs:
        template = subprocess.Popen(command, pass_fds=[number], cwd=ROOT)

    def stop() -> None:
        ours.close()
        template.wait()

    atexit.register(stop)
    return ours


class ForkedProcess:
    """A Python process with the attributes of ``Popen``.

    Like with ``Popen``, the ended process is a zombie until its status is read.

    :param arguments: those of ``python``: ``-m MODULE``, ``-c SCRIPT`` or a file, and
        the arguments of the program.
    :param stderr: a file for the errors. By default ``stdout`` has them too.
    :param variables: of the environment, beside those of this process.
    """

    def __init__(
        self, *arguments: str, stderr: IO[str] | None = None, **variables: str
    ) -> None:
        request = {
            "arguments": arguments,
            "environ": {**os.environ, **variables},
            "folder": os.getcwd(),
        }
        reader, writer = os.pipe()
        self.stdout: IO[str] = os.fdopen(reader)
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors = writer if stderr is None else stderr.fileno()
        with theirs, open(writer, "wb"), _lock:
            message = json.dumps(request).encode()
            files = [theirs.fileno(), writer, errors]
            socket.send_fds(_start_template(), [message], files)
        self.pid = int(self._status.recv(STATUS_BYTES))
        self.returncode: int | None = None
        self._reading = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended, and return its status like ``Popen``.

        Several threads may wait.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._reading.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        try:
            if self.returncode is None:
                if deadline is not None:
                    timeout = max(0.0, deadline - time.monotonic())
                self._status.settimeout(timeout)
                self.returncode = int(self._status.recv(STATUS_BYTES))
                self._status.close()
        except (BlockingIOError, TimeoutError):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
        finally:
            self._reading.release()
        return self.returncode

    def poll(self) -> int | None:
        """Return the status, or None while the process runs."""
        # The process that sends the status may not have run since the end.
        if (
            self.returncode is None
            and psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        ):
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a ``ForkedProcess`` for at most 60 seconds, and return its result."""
    with tempfile.TemporaryFile("w+") as errors:
        process = ForkedProcess(*arguments, stderr=errors)
        timer = threading.Timer(60, process.kill)
        timer.start()
        with process.stdout:
            output = process.stdout.read()
        timer.cancel()
        timer.join()
        status = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, status, output, errors.read())


# In the process that forks.


def supervise(status: socket.socket, pid: int) -> None:
    """Send the process id and the status of a child, and wait until it is read."""
    status.send(b"%d" % pid)
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    with contextlib.suppress(OSError):  # nobody waits for it
        status.send(b"%d" % code)
        status.recv(STATUS_BYTES)


def wait_for_request(requests: socket.socket) -> list[str] | None:
    """Fork for each request.

    :returns: in the forked process, the arguments of the request. In the process that
        forks, None when the tests have ended.
    """
    while True:
        message, files, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 3)
        if not message:
            return None
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status, outputs = socket.socket(fileno=files[0]), files[1:]
    if pid := os.fork():
        for output in outputs:
            os.close(output)
        supervise(status, pid)
        os._exit(0)
    status.close()
    for standard, output in enumerate(outputs, start=1):
        os.dup2(output, standard)
        os.close(output)
    request = json.loads(message)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    arguments: list[str] = request["arguments"]
    return arguments


def run(arguments: list[str]) -> None:
    """Run a program like the interpreter does with these arguments."""
    option, *rest = arguments
    sys.argv[:] = rest if option == "-m" else arguments
    if option == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        del sys.argv[1]
        main_module = types.ModuleType("__main__")
        sys.modules["__main__"] = main_module
        exec(compile(rest[0], "<string>", "exec"), vars(main_module))
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(option)))
        runpy.run_path(option, run_name="__main__")


def main(number: str) -> None:
    """Import the packages, then fork for each request."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PACKAGES:
            import_module(name)
    assert not [name for name in sys.modules if name.startswith("tgstream")]
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, which end it
    with socket.socket(fileno=int(number)) as requests:
        arguments = wait_for_request(requests)
    if arguments is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(arguments)


if __name__ == "__main__":
    main(sys.argv[1])
