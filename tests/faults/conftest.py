"""Streams in process that meet a fault, and the checks that all such tests share."""

from __future__ import annotations

import logging
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
ErrorTypes = type[BaseException] | tuple[type[BaseException], ...]


def wait_until(condition: Callable[[], Any], message: str, seconds: float = 10) -> None:
    """Poll a condition that no event announces, until it is true.

    :param message: of the failure after ``seconds``.
    """
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, message
        pause.wait(0.01)


def path_of(name: str, **params: Any) -> str:
    """Return the path of a stream of ``tests.live_apps.faulty``."""
    return "/faulty/write?" + urlencode({"name": name, **params})


def write_line(pipe: Path, line: bytes) -> None:
    """Write a line to the process that waits at the other end of the pipe."""
    with pipe.open("wb") as file:
        file.write(line)


LOCK = 4711
WAITS = f"""
CREATE OR REPLACE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock({LOCK}); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON users
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_for_test();
"""
"""Makes the commit of a new user wait for a lock that the test holds."""


@contextmanager
def outside(model: Model) -> Iterator[psycopg.Connection[Any]]:
    """Connect without the application, in a transaction that the test ends."""
    with psycopg.connect(**model.connection_options()) as connection:
        yield connection


def install_waits(model: Model) -> None:
    """Prepare for ``commits_wait``, before the table is in use."""
    with outside(model) as other:
        other.execute(WAITS)


@contextmanager
def commits_wait(model: Model) -> Iterator[None]:
    """Let the commit of a new user wait until this context ends.

    Call ``install_waits`` before.
    """
    with outside(model) as other:
        other.execute(f"SELECT pg_advisory_lock({LOCK})".encode())
        yield


def wait_until_blocked(model: Model, backend: int) -> None:
    """Wait until a backend of PostgreSQL waits for a lock."""
    query = f"SELECT wait_event_type FROM pg_stat_activity WHERE pid = {backend}"
    wait_until(lambda: model.fetch(query) == [("Lock",)], "the backend does not wait")


class Root(TGController):
    """A stream of ``body``, and ordinary requests to the same database."""

    def __init__(self, model: Model, body: Generator, **options: Any) -> None:
        self.model, self.body, self.options = model, body, options
        for method in (Root.index, Root.add, Root.names):
            expose(content_type="text/plain")(method)  # fixtures reset TG's registry

    def index(self) -> Stream:
        return Stream(self.body(), **self.options)

    def add(self, name: str) -> str:
        self.model.DBSession.add(User(name=name))
        return "added"

    def names(self) -> Stream:
        query = self.model.DBSession.query(User).order_by(User.id)
        return Stream(f"{user.name}\n" for user in query)


class Fault:
    """An application whose stream meets a fault.

    :param body: makes the items of the stream.
    :param app: the options of the application.
    :param options: the options of the stream.
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
        """Make a request."""
        return Call(self.app, path)

    def assert_fails_at_once(self, error: ErrorTypes, match: str | None = None) -> None:
        """Check that the stream fails before its first chunk, with a status 500."""
        call = get(self.app)
        assert call.status.startswith("500 ")
        assert call.starts == 1
        self.assert_reported(error, match)

    def assert_aborts(
        self, call: Call, error: ErrorTypes, match: str | None = None
    ) -> None:
        """Check that the next pull raises an error to the server."""
        with pytest.raises(error, match=match) as raised:
            next(call)
        call.close()
        self.assert_reported(error, match)
        assert self.reports[0].error is raised.value

    def assert_reported(
        self, error: ErrorTypes, match: str | None = None, reason: str = "failed"
    ) -> None:
        """Check that one report and one log line have the error, and its traceback."""
        [report], [line] = self.reports, self.lines()
        assert report.reason == reason
        assert report.error is not None
        with pytest.raises(error, match=match):
            raise report.error
        assert line.levelname == "ERROR"
        assert line.exc_info is not None
        assert line.exc_info[:2] == (type(report.error), report.error)
        assert f"index at / {reason}: " in line.getMessage()
        assert self.noise() == set()

    def lines(self) -> list[logging.LogRecord]:
        """Return the log records of tgstream, of any level."""
        return [record for record in self.log.records if record.name == "tgstream"]

    def noise(self) -> set[str]:
        """Return the other loggers that wrote a warning or an error."""
        return {
            record.name.partition(".")[0]
            for record in self.log.records
            if record.name != "tgstream" and record.levelno >= logging.WARNING
        } - self.expected_noise

    def assert_leaves(self, *names: str) -> None:
        """Check the stored users, that nothing is left, and that requests work."""
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
    """Makes applications whose stream meets a fault."""
    caplog.set_level("DEBUG", "tgstream")

    def make(model: Model, body: Generator, **options: Any) -> Fault:
        return Fault(make_app, caplog, reports, model, body, **options)

    yield make
