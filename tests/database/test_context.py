"""The context of a stream that has a database."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import transaction
from tg import TGController, expose
from tg.request_local import context as tg_context

from tests.conftest import MakeApp, assert_thread_clean
from tests.wsgi import get
from tgstream.core.context import thread
from tgstream.database.database import StreamDatabase

BODY: Any = object()

InRequest = Callable[[Callable[[Any], None]], None]


@pytest.fixture
def in_request(make_app: MakeApp) -> InRequest:
    """Calls a function with the ``RequestLocals`` of a request."""

    def call(function: Callable[[Any], None]) -> None:
        class Root(TGController):
            @expose(content_type="text/plain")
            def index(self) -> str:
                function(tg_context._current_obj())
                return "called"

        assert get(make_app(Root())).text == "called"

    return call


def check_exchange(database: StreamDatabase, context: Any) -> None:
    """Bind the context on this thread, and unbind it."""
    outer = transaction.manager.manager
    for _ in range(2):
        record = context.bind(BODY)
        assert transaction.manager.manager is database.manager
        assert (record, record.body) == (thread.record, BODY)
        assert record.context[-1][0] is context.tg_locals
        context.unbind(record)
        assert transaction.manager.manager is outer
        assert record.body is None


def test_context_exchanges_the_manager_of_each_thread(in_request: InRequest) -> None:
    """A stream may be pulled on one thread, then on another, and again on the first."""

    def check(tg_locals: Any) -> None:
        database = StreamDatabase((), False)
        context = database.make_context(tg_locals)
        with ThreadPoolExecutor(1) as other:
            check_exchange(database, context)
            other.submit(check_exchange, database, context).result()
            check_exchange(database, context)
            other.submit(assert_thread_clean).result()

    in_request(check)


def test_context_restores_the_manager_of_the_outer_stream(
    in_request: InRequest,
) -> None:
    """A generator may send a request whose stream is pulled inside of it."""

    def check(tg_locals: Any) -> None:
        databases = StreamDatabase((), False), StreamDatabase((), False)
        outer, inner = (database.make_context(tg_locals) for database in databases)
        record = outer.bind(BODY)
        inner.bind(BODY)
        assert transaction.manager.manager is databases[1].manager
        inner.unbind(record)
        assert transaction.manager.manager is databases[0].manager
        assert record.body is BODY
        outer.unbind(record)

    in_request(check)


def test_context_removes_contexts_that_were_left_above_it(
    in_request: InRequest,
) -> None:
    """The thread is clean, whatever the generator has pushed and not popped."""

    def check(tg_locals: Any) -> None:
        context = StreamDatabase((), False).make_context(tg_locals)
        depth = len(thread.record.context)
        record = context.bind(BODY)
        record.context.append((tg_locals, False))
        record.config.append((tg_locals.config, False))
        context.unbind(record)
        assert len(record.context) == depth

    in_request(check)
