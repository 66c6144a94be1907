"""``last_event_id()``: the id that a client sends when it reconnects."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.wsgi import get
from tgstream import SSE, StreamError, last_event_id, stream


class EventIds(TGController):
    """Responses with the id, from a controller and from the generator of a stream."""

    def __init__(self) -> None:
        for method in EventIds.body, EventIds.generator:  # TG forgets it between tests
            expose()(method)
        stream(SSE)(EventIds.generator)

    def body(self) -> str:
        return repr(last_event_id())

    def generator(self):  # type: ignore[no-untyped-def]
        yield repr(last_event_id())


def header(text: str) -> str:
    """The text of a header in a WSGI environ."""
    return text.encode().decode("latin-1")


@pytest.mark.parametrize("path", ["/body", "/generator"])
def test_last_event_id_is_in_the_header_or_in_the_query(
    make_app: MakeApp, path: str
) -> None:
    """The header is of the standard, and has priority."""
    app = make_app(EventIds())

    def id_of_request(query: str = "", **environ: str) -> str:
        text = get(app, f"{path}{query}", **environ).text
        return text.removeprefix("data: ").rstrip("\n")

    assert id_of_request() == "None"
    assert id_of_request(HTTP_LAST_EVENT_ID=header("7-é")) == "'7-é'"
    assert id_of_request("?lastEventId=8-%C3%A9") == "'8-é'"
    assert id_of_request("?lastEventId=8", HTTP_LAST_EVENT_ID="7") == "'7'"
    assert id_of_request("?lastEventId=8", HTTP_LAST_EVENT_ID="") == "'8'"


@pytest.mark.parametrize(
    "id", ["", "a\rb", "a\nb", "a\0b", "x" * 257, "x" * 10_000], ids=repr
)
def test_invalid_last_event_id_is_ignored(make_app: MakeApp, id: str) -> None:
    """The result is None, as if the client had sent no id."""
    app = make_app(EventIds())
    assert get(app, "/body", HTTP_LAST_EVENT_ID=id).text == "None"
    assert get(app, f"/body?lastEventId={quote(id)}").text == "None"


def test_last_event_id_may_have_256_characters(make_app: MakeApp) -> None:
    """They may be characters of any alphabet."""
    app, id = make_app(EventIds()), "é" * 256
    assert get(app, "/body", HTTP_LAST_EVENT_ID=header(id)).text == repr(id)


def test_last_event_id_that_is_not_utf8_is_ignored(make_app: MakeApp) -> None:
    """The ids of a channel are always valid UTF-8."""
    app = make_app(EventIds())
    assert get(app, "/body", HTTP_LAST_EVENT_ID="\xff").text == "None"
    status = get(app, "/body?lastEventId=%FF").status_int
    assert status in (400, 500)  # TurboGears answers: from 2.5.1 on with 400


def test_last_event_id_outside_of_a_request_raises() -> None:
    """The error names the places to call it."""
    with pytest.raises(
        StreamError, match=r"^last_event_id\(\) needs a running request"
    ):
        last_event_id()
