"""The process that streams is killed, on real servers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import LiveServer
from tests.faults.conftest import (
    commits_wait,
    install_waits,
    path_of,
    say,
    wait_until,
    wait_until_blocked,
)
from tests.model import MakeModel, Model
from tests.test_servers import BROKEN, SEVERAL, Client, read


class Victim:
    """A server, and a stream of it that waits."""

    def __init__(self, server: LiveServer, model: Model, pipe: Path) -> None:
        self.server, self.model, self.pipe = server, model, pipe
        self.process = json.loads(read(server, "/faulty/state"))["process"]
        self.client = Client(server, path_of("a", early="1", pipe=pipe))
        assert self.client.response.read(5) == b"early"
        ((self.backend,),) = model.look(
            "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction'"
            " AND datname = current_database()"
        )

    def kill(self) -> None:
        """End it as the kernel does that has no memory left; the client sees it."""
        os.kill(self.process, signal.SIGKILL)
        with pytest.raises(BROKEN):
            self.client.response.read()
        self.client.close()

    @property
    def backend_lives(self) -> bool:
        asks = f"SELECT 1 FROM pg_stat_activity WHERE pid = {self.backend}"
        return self.model.look(asks) != []

    def assert_recovers(self, *names: str) -> None:
        """PostgreSQL has noticed; these are stored; what serves on serves a stream."""
        wait_until(lambda: not self.backend_lives, "the back end is still there")
        assert self.model.names() == [*names]
        if self.server.process.pid != self.process:  # gunicorn has another worker
            assert read(self.server, path_of("b")) == b"end"
            assert self.model.names() == [*names, "b stored", "b flushed"]


@pytest.fixture(params=SEVERAL)
def victim(
    request: pytest.FixtureRequest,
    live_server: Callable[..., LiveServer],
    make_model: MakeModel,
    postgresql: str,
    pipe: Path,
) -> Victim:
    """A server that is going to be killed."""
    model = make_model(postgresql)
    install_waits(model)
    server = live_server(request.param, "faulty", f"url={postgresql}")
    return Victim(server, model, pipe)


def test_worker_killed_in_mid_stream_leaves_what_was_committed(victim: Victim) -> None:
    """The client sees a break; what was flushed is undone by PostgreSQL."""
    victim.kill()
    victim.assert_recovers("a stored")


def test_worker_killed_in_the_final_commit_is_in_doubt(victim: Victim) -> None:
    """The client sees a break, though PostgreSQL goes on with a commit that it has got:
    a break means that not all was told, and not that nothing was stored."""
    with commits_wait(victim.model):
        say(victim.pipe, b"go on\n")
        wait_until_blocked(victim.model, victim.backend)
        victim.kill()
        assert victim.model.names() == ["a stored"]
    victim.assert_recovers("a stored", "a flushed")
