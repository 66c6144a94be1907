"""Processes that fork while a stream runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator

import pytest
from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.core.support import Words, fork, reasons
from tests.model import MakeModel, User
from tests.wsgi import Call
from tgstream import Report, flush, stream


@pytest.mark.parametrize("outcome", ["raises", "exits", "returns", "yields"])
@pytest.mark.parametrize("pulls", [0, 1])
def test_child_process_does_not_end_the_stream_of_its_parent(
    make_app: MakeApp,
    make_model: MakeModel,
    postgresql: str,
    reports: list[Report],
    outcome: str,
    pulls: int,
) -> None:
    """The child exits after the generator. The parent's response is complete."""
    model = make_model(postgresql)
    codes: list[int] = []

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            yield from ["one"] * pulls
            model.DBSession.add(User(name="ada"))
            flush()
            if child := fork():
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            elif outcome == "raises":
                raise LookupError
            elif outcome == "exits":
                sys.exit(7)
            elif outcome == "returns":
                return
            yield "two"

    parent = os.getpid()
    try:
        call = Call(make_app(Root(), model), "/words")
        assert call.read() == b"one" * pulls + b"two"
    finally:
        if os.getpid() != parent:
            os._exit(99)
    assert codes == [7 if outcome == "exits" else 1]
    assert [(r.reason, r.error) for r in reports] == [("completed", None)]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_child_process_that_drops_a_stream_does_not_end_it(
    make_app: MakeApp, make_model: MakeModel, postgresql: str, reports: list[Report]
) -> None:
    """The fork is between two pulls. The parent's transaction continues."""
    model = make_model(postgresql)

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            flush()
            yield "one"
            yield "two"

    call = Call(make_app(Root(), model), "/words", checked=False)
    assert next(call) == b"one"
    child = fork()
    if not child:
        try:
            call.close()
            call.drop()
            gc.collect()
            os._exit(len(reports))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call.read() == b"two"
    assert reasons(reports) == ["completed"]
    assert model.names() == ["ada"]
    assert_clean(model)


def test_child_process_has_its_own_monitor(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """Servers fork after streams have run. The streams of a child expire as well."""
    app = make_app(Words())
    call = Call(app, "/words")
    child = fork()
    if not child:
        try:
            forked = Call(app, "/words", checked=False)
            os._exit(0 if next_report().reason == "expired" and forked else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert next_report().reason == "expired"
    call.close()
