"""The page on async generators: its code runs, and does what the page describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tg import TGController

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, Note
from tests.pages import DOCS, provide, run_blocks
from tests.upstream import TOKENS, Upstream
from tests.wsgi import get


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


@pytest.fixture
def pages(make_app: MakeApp, sqlite_model: Model) -> dict[str, Any]:
    """The names that the page defines. Its orders are notes."""
    provide("myapp.model", DBSession=sqlite_model.DBSession, Order=Note)
    return run_blocks((DOCS / "async.rst").read_text())


def test_page_streams_an_upstream(
    make_app: MakeApp, sqlite_model: Model, upstream: Upstream, pages: dict[str, Any]
) -> None:
    """With HTTPX on the event loop, and with requests in a thread of the server."""

    class Root(TGController):
        answers = pages["RootController"]()
        lines = pages["LinesController"]()

    options = {"chat__upstream": f"{upstream.url}/tokens/"}
    app = make_app(Root(), sqlite_model, **options)
    events = get(app, "/answers/answer?text=hello").text.replace(":\n\n", "")
    tokens = [f"/tokens/?text=hello {number}" for number in range(TOKENS)]
    assert [
        json.loads(event[6:])["token"] for event in events.split("\n\n")[:-1]
    ] == tokens
    lines = get(app, "/lines/lines").text.replace(":\n\n", "")
    assert lines == "".join(f"data: /tokens/ {number}\n\n" for number in range(TOKENS))
    app = make_app(Root(), sqlite_model, chat__upstream=f"{upstream.url}/missing/")
    assert get(app, "/answers/answer?text=hello").status.startswith("502")
    assert_clean(sqlite_model)


def test_page_runs_a_statement_in_a_thread(
    make_app: MakeApp, sqlite_model: Model, pages: dict[str, Any]
) -> None:
    """The thread has the session of the stream."""
    sqlite_model.execute("INSERT INTO notes (text) VALUES ('a')")
    app = make_app(pages["OrdersController"](), sqlite_model)
    assert get(app, "/summary").text == '{"orders":1,"path":"/summary"}\n'
    assert_clean(sqlite_model)
