"""A stream in process that meets a fault, and what must hold of it in every case."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import Report, Stream

Generator = Callable[[], Any]
Kind = type[BaseException] | tuple[type[BaseException], ...]


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 10) -> None:
    """Ask again and again, until it holds; what nobody can be told of is asked for."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, what
        pause.wait(0.01)


def path_of(name: str, **params: Any) -> str:
    """A stream of ``tests.live_apps.faulty`` that writes under this name."""
    return "/faulty/write?" + urlencode({"name": name, **params})


def say(pipe: Path, line: bytes) -> None:
    """Write a line to who waits for it."""
    with pipe.open("wb") as file:
        file.write(line)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A named pipe, for which a stream waits."""
    os.mkfifo(tmp_path / "pipe")
    yield tmp_path / "pipe"


LOCK = 4711
WAITS = f"""
CREATE OR REPLACE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock({LOCK}); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON users
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_for_test();
"""
"""Makes a commit of a user wait for a lock, for as long as another one holds it."""


@contextmanager
def outside(model: Model) -> Iterator[psycopg.Connection[Any]]:
    """A connection of somebody else, in a transaction that the test ends."""
    with psycopg.connect(**model.connection_options()) as connection:
        yield connection


def install_waits(model: Model) -> None:
    """Prepare for ``commits_wait``, before anybody uses the table."""
    with outside(model) as other:
        other.execute(WAITS)


@contextmanager
def commits_wait(model: Model) -> Iterator[None]:
    """Whoever commits a user waits until this ends, where ``WAITS`` was installed."""
    with outside(model) as other:
        other.execute(f"SELECT pg_advisory_lock({LOCK})".encode())
        yield


def wait_until_blocked(model: Model, backend: int) -> None:
    """Until a backend waits for a lock."""
    asks = f"SELECT wait_event_type FROM pg_stat_activity WHERE pid = {backend}"
    wait_until(lambda: model.look(asks) == [("Lock",)], "the backend waits for no lock")


class Root(TGController):
    """A stream of ``body``, and beside it what ordinary requests do."""

    def __init__(self, model: Model, body: Generator, **options: Any) -> None:
        self.model, self.body, self.options = model, body, options
        for method in (Root.index, Root.add, Root.names):
            expose(content_type="text/plain")(method)  # TG forgets it between tests

    def index(self) -> Stream:
        return Stream(self.body(), **self.options)

    def add(self, name: str) -> str:
        self.model.DBSession.add(User(name=name))
        return "added"

    def names(self) -> Stream:
        query = self.model.DBSession.query(User).order_by(User.id)
        return Stream(f"{user.name}\n" for user in query)


class Fault:
    """An application whose stream a fault meets.

    :param body: makes what is streamed.
    :param options: of the stream; ``app`` are those of the application.
    """

    def __init__(
        self,
        make_app: MakeApp,
        log: pytest.LogCaptureFixture,
        reports: list[Report],
        model: Model,
        body: Generator,
        app: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model, self.log, self.reports = model, log, reports
        self.expected_noise: set[str] = set()
        self.app = make_app(Root(model, body, **options), model, **(app or {}))

    def call(self, path: str = "/") -> Call:
        """One more request."""
        return Call(self.app, path)

    def assert_fails_at_once(self, kind: Kind, match: str | None = None) -> None:
        """Before its first chunk, the client sees an ordinary error."""
        call = get(self.app)
        assert call.status.startswith("500 ")
        assert call.starts == 1
        self.assert_told(kind, match)

    def assert_breaks(self, call: Call, kind: Kind, match: str | None = None) -> None:
        """The next pull gives the server an error, after which it closes."""
        with pytest.raises(kind, match=match) as raised:
            next(call)
        call.close()
        self.assert_told(kind, match)
        assert self.reports[0].error is raised.value

    def assert_told(
        self, kind: Kind, match: str | None = None, reason: str = "failed"
    ) -> None:
        """One report, and one line of the log with the traceback; no other error."""
        [report], [line] = self.reports, self.lines()
        assert report.reason == reason
        assert report.error is not None
        with pytest.raises(kind, match=match):
            raise report.error
        assert line.levelname == "ERROR"
        assert line.exc_info is not None
        assert line.exc_info[:2] == (type(report.error), report.error)
        assert f"index at / {reason}: " in line.getMessage()
        assert self.noise() == set()

    def lines(self) -> list[logging.LogRecord]:
        """What the library has logged, at any level."""
        return [each for each in self.log.records if each.name == "tgstream"]

    def noise(self) -> set[str]:
        """The loggers of others that wrote an error or a warning."""
        return {
            each.name.partition(".")[0]
            for each in self.log.records
            if each.name != "tgstream" and each.levelno >= logging.WARNING
        } - self.expected_noise

    def assert_leaves(self, *names: str) -> None:
        """These users are stored, nothing is left behind, and all else goes on."""
        assert self.model.names() == [*names]
        assert_clean(self.model)
        assert get(self.app, "/add?name=next").text == "added"
        assert get(self.app, "/names").text.split() == [*names, "next"]
        assert_clean(self.model)


MakeFault = Callable[..., Fault]


@pytest.fixture
def make_fault(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, reports: list[Report]
) -> Iterator[MakeFault]:
    """Makes applications whose stream a fault meets."""
    caplog.set_level("DEBUG", "tgstream")

    def make(model: Model, body: Generator, **options: Any) -> Fault:
        return Fault(make_app, caplog, reports, model, body, **options)

    yield make
