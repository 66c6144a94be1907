"""Controllers and helpers that several files of tests use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tg
from tg import TGController, expose

from tests.conftest import assert_thread_clean
from tests.model import Model, User
from tests.wsgi import Call
from tgstream import Report, Stream, stream

SHORT = 0.1
"""Seconds after which a stream of a test expires."""


def run_on_another_thread(function: Callable[[], Any]) -> Any:
    """Call a function on a new thread. Return its result, or raise its error."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result(10)


def leave_clean(function: Callable[[], Any]) -> Any:
    """Call a function, and check that it leaves this thread clean."""
    try:
        return function()
    finally:
        assert_thread_clean()


def pull(call: Call) -> bytes:
    """Return the next chunk, and check that the pull leaves this thread clean."""
    return bytes(leave_clean(call.__next__))


def reasons(reports: list[Report]) -> list[str]:
    return [report.reason for report in reports]


class NamesController(TGController):
    """Streams the names of the users.

    :param closed: gets an entry when a generator is closed.
    """

    def __init__(self, model: Model, closed: list[str] | None = None) -> None:
        self.model = model
        self.closed = [] if closed is None else closed
        # Not at import: the fixture make_app resets the milestones of TG.
        expose(content_type="text/plain")(NamesController.names)

    @stream
    def names(self, fail: bool = False) -> Iterator[str]:
        try:
            for user in self.model.DBSession.query(User).order_by(User.id):
                yield f"{tg.request.params.get('prefix', '')}{user.name}"
            if fail:
                raise LookupError("no more names")
        finally:
            self.closed.append(f"{tg.request.path} {self.model.DBSession().is_active}")


class Words(TGController):
    """Streams two words, until the duration of the request is over."""

    def __init__(self) -> None:
        # Not at import: the fixture make_app resets the milestones of TG.
        expose(content_type="text/plain")(Words.words)

    def words(self, seconds: str = str(SHORT)) -> Stream:
        return Stream(iter(["one", "two"]), max_seconds=float(seconds))


def fork() -> int:
    """Fork this process, without the warning of Python 3.12 about its threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
