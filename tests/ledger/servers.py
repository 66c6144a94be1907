"""The processes of the application: real servers, and a script. They are restarted."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from contextlib import suppress
from itertools import cycle

import psutil  # type: ignore[import-untyped]

from tests.conftest import LiveServer
from tests.ledger.stores import send_signal

KINDS = ["gunicorn-gthread", "gunicorn-gevent", "waitress"]
SCRIPT = "script"
END_SECONDS = 10.0
START_SECONDS = 20.0


class Process:
    """A server or a script, which is started again when it ends.

    :param kinds: the kinds of server, one after the other.
    :param options: the options of ``ledger_app``.
    """

    def __init__(self, kinds: list[str], *options: str) -> None:
        self.name, self._kinds, self._options = kinds[0], cycle(kinds), options
        self._closing = False
        self._live: LiveServer | None = None
        self.log: list[str] = []
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._closing:
            kind = next(self._kinds)
            run = "tests.ledger.script" if kind == SCRIPT else "tests.live_apps.run"
            options = "threads=64", "drains=yes", *self._options
            try:
                live = LiveServer(kind, "ledger_app", *options, run=run)
            except RuntimeError as error:  # it was killed before it had a port
                self.log.append(str(error))
                continue
            self._live = live
            live.process.wait()
            self._live = None
            self.log.append(live.stop())

    @property
    def port(self) -> int | None:
        """The port, which changes with each start. None while it does not run."""
        live = self._live
        return None if live is None else live.port

    def kill(self, worker: bool = False) -> None:
        """Kill it, or only the worker of gunicorn, which gunicorn replaces."""
        if (live := self._live) is not None:
            with suppress(psutil.NoSuchProcess):
                main = psutil.Process(live.process.pid)
                children = main.children()
                if not (worker and children):
                    # It must not replace a worker meanwhile, which would outlive it.
                    main.suspend()
                    children = main.children()
                    live.process.kill()
                    live.process.wait()
                for child in children:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()

    def wait(self) -> None:
        """Wait until it runs, but not forever."""
        until = time.monotonic() + START_SECONDS
        while self.port is None and time.monotonic() < until:
            time.sleep(0.05)

    def pause(self, seconds: float) -> None:
        """Stop it, and let it go on after so many seconds."""
        if (live := self._live) is not None:
            send_signal(live.process.pid, signal.SIGSTOP)
            time.sleep(seconds)
            send_signal(live.process.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """End it properly. Kill it if it takes too long."""
        if (live := self._live) is not None:
            live.process.terminate()
            try:
                live.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.log.append(f"{self.name} did not end within {END_SECONDS} s\n")
                self.kill()

    def close(self) -> None:
        """End it for good."""
        self._closing = True
        while self._thread.is_alive():
            self.terminate()
            self._thread.join(0.1)
