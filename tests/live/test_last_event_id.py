"""``last_event_id()``: what a client that comes back may say, and what is believed."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.wsgi import get
from tgstream import SSE, StreamError, last_event_id, stream


class Ids(TGController):
    """What the controller sees, and what its generator."""

    def __init__(self) -> None:
        for each in Ids.body, Ids.generator:  # TG forgets it between tests
            expose()(each)
        stream(SSE)(Ids.generator)

    def body(self) -> str:
        return repr(last_event_id())

    def generator(self):  # type: ignore[no-untyped-def]
        yield repr(last_event_id())


def header(said: str) -> str:
    """A header's text as WSGI has it."""
    return said.encode().decode("latin-1")


@pytest.mark.parametrize("path", ["/body", "/generator"])
def test_last_event_id_is_that_of_the_header_or_the_query(
    make_app: MakeApp, path: str
) -> None:
    """The header is the standard's, and comes first."""
    app = make_app(Ids())

    def said(query: str = "", **environ: str) -> str:
        text = get(app, f"{path}{query}", **environ).text
        return text.removeprefix("data: ").rstrip("\n")

    assert said() == "None"
    assert said(HTTP_LAST_EVENT_ID="7-é".encode().decode("latin-1")) == "'7-é'"
    assert said("?lastEventId=8-%C3%A9") == "'8-é'"
    assert said("?lastEventId=8", HTTP_LAST_EVENT_ID="7") == "'7'"
    assert said("?lastEventId=8", HTTP_LAST_EVENT_ID="") == "'8'"


@pytest.mark.parametrize(
    "said", ["", "a\rb", "a\nb", "a\0b", "x" * 257, "x" * 10_000], ids=repr
)
def test_last_event_id_that_cannot_be_one_is_none(make_app: MakeApp, said: str) -> None:
    """As if the client had said nothing."""
    app = make_app(Ids())
    assert get(app, "/body", HTTP_LAST_EVENT_ID=said).text == "None"
    assert get(app, f"/body?lastEventId={quote(said)}").text == "None"


def test_last_event_id_may_have_256_characters(make_app: MakeApp) -> None:
    """Of any alphabet."""
    app, said = make_app(Ids()), "é" * 256
    assert get(app, "/body", HTTP_LAST_EVENT_ID=header(said)).text == repr(said)


def test_last_event_id_that_is_no_text_is_none(make_app: MakeApp) -> None:
    """Bytes that are no UTF-8 were sent by nobody who read our ids."""
    app = make_app(Ids())
    assert get(app, "/body", HTTP_LAST_EVENT_ID="\xff").text == "None"
    status = get(app, "/body?lastEventId=%FF").status_int
    assert status in (400, 500)  # as TG has it; from 2.5.1 on a 400


def test_last_event_id_belongs_in_a_request() -> None:
    """Elsewhere nobody has said anything."""
    with pytest.raises(
        StreamError, match=r"^last_event_id\(\) needs a running request"
    ):
        last_event_id()
