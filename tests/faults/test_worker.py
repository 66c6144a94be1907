"""Real servers whose worker process is killed during a stream."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import (
    commits_wait,
    install_waits,
    path_of,
    wait_until,
    wait_until_blocked,
    write_line,
)
from tests.model import MakeModel, Model
from tests.test_servers import BROKEN, SEVERAL, Client, read


class Victim:
    """A server, and one of its streams, which waits."""

    def __init__(self, server: LiveServer, model: Model, pipe: Path) -> None:
        self.server, self.model, self.pipe = server, model, pipe
        self.process = json.loads(read(server, "/faulty/state"))["process"]
        self.client = Client(server, path_of("a", early="1", pipe=pipe))
        assert self.client.response.read(5) == b"early"
        ((self.backend,),) = model.fetch(
            "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction'"
            " AND datname = current_database()"
        )

    def kill(self) -> None:
        """Kill the worker like the kernel's out-of-memory killer.

        The client's response is incomplete.
        """
        os.kill(self.process, signal.SIGKILL)
        with pytest.raises(BROKEN):
            self.client.response.read()
        self.client.close()

    @property
    def backend_is_alive(self) -> bool:
        query = f"SELECT 1 FROM pg_stat_activity WHERE pid = {self.backend}"
        return self.model.fetch(query) != []

    def assert_recovers(self, *names: str) -> None:
        """Check that PostgreSQL ended the session, what is stored, and a new worker."""
        wait_until(lambda: not self.backend_is_alive, "the backend is still there")
        assert self.model.names() == [*names]
        if self.server.process.pid != self.process:  # gunicorn starts a new worker
            assert read(self.server, path_of("b")) == b"end"
            assert self.model.names() == [*names, "b stored", "b flushed"]


@pytest.fixture(scope="module", params=SEVERAL)
def start(
    request: pytest.FixtureRequest, postgresql: str
) -> Iterator[Callable[[], LiveServer]]:
    """Starts a server, unless it already runs: gunicorn survives its worker's death."""
    with ExitStack() as stack:
        servers: list[LiveServer] = []

        def start() -> LiveServer:
            if not servers or servers[-1].process.poll() is not None:
                server = LiveServer(request.param, "faulty", f"url={postgresql}")
                stack.callback(server.kill)
                servers.append(server)
            return servers[-1]

        yield start


@pytest.fixture
def victim(
    start: Callable[[], LiveServer],
    make_model: MakeModel,
    postgresql: str,
    pipe: Path,
) -> Victim:
    """A server with a waiting stream."""
    model = make_model(postgresql)
    install_waits(model)
    return Victim(start(), model, pipe)


def test_committed_changes_survive_a_worker_killed_during_a_stream(
    victim: Victim,
) -> None:
    """The response is incomplete, and PostgreSQL undoes the flushed changes."""
    victim.kill()
    victim.assert_recovers("a stored")


def test_worker_killed_in_the_final_commit_may_have_committed(victim: Victim) -> None:
    """The response is incomplete, although PostgreSQL completes the commit. So an
    incomplete response does not mean that nothing was stored."""
    with commits_wait(victim.model):
        write_line(victim.pipe, b"go on\n")
        wait_until_blocked(victim.model, victim.backend)
        victim.kill()
        assert victim.model.names() == ["a stored"]
    victim.assert_recovers("a stored", "a flushed")
