"""``Stream`` and ``current_stream``."""

from __future__ import annotations

from collections.abc import Iterator

from tg import TGController, expose

from tests.conftest import MakeApp, assert_clean
from tests.model import Model, User
from tests.wsgi import get
from tgstream import Report, stream


def test_stream_of_text_is_encoded(make_app: MakeApp) -> None:
    """A generator that yields str, as TG's cookbook has it, arrives in UTF-8."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def text(self) -> Iterator[str]:
            yield "é"
            yield "ß"

    call = get(make_app(Root()), "/text")
    assert call.status == "200 OK"
    assert call.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert call.text == "éß"


def test_stream_writes_are_committed_at_its_end(
    make_app: MakeApp, model: Model, reports: list[Report]
) -> None:
    """What the generator adds is there when it has run to its end."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def write(self) -> Iterator[str]:
            model.DBSession.add(User(name="ada"))
            yield "one"
            model.DBSession.add(User(name="bob"))
            yield "two"

    app = make_app(Root(), model)
    assert get(app, "/write").text == "onetwo"
    assert model.names() == ["ada", "bob"]
    assert [report.reason for report in reports] == ["completed"]
    assert_clean(model)
