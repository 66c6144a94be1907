"""A stream in process that meets a fault, and what must hold of it in every case."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

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
        with pytest.raises(kind, match=match):
            raise report.error or AssertionError("no error is reported")
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
