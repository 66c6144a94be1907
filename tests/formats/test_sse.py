"""``SSE`` and ``Event``: what is sent is what a client of the standard understands."""

from __future__ import annotations

import codecs
import copy
import dataclasses
import enum
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import tg
from httpx_sse import EventSource, connect_sse
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session
from tg import TGController, abort, expose

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, SSE, Event, Report, Stream, stream
from tgstream.formats.sse import sealed


class Message(NamedTuple):
    """What a listener is called with."""

    type: str
    data: str
    last_event_id: str


class Parser:
    """An event stream as a browser reads it: the WHATWG's HTML standard, 9.2.6."""

    def __init__(self) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.started = self.after_cr = False
        self.line = self.data = self.type = self.id = self.last_event_id = ""
        self.messages: list[Message] = []
        self.retry: int | None = None

    def feed(self, chunk: bytes) -> None:
        """Read a chunk, which may end anywhere."""
        for character in self.decode(chunk):
            first, self.started = not self.started, True
            if first and character == "\ufeff":
                continue  # one leading byte order mark is ignored
            if character == "\n" and self.after_cr:
                self.after_cr = False
                continue  # the second half of a CRLF
            self.after_cr = character == "\r"
            if character in "\r\n":
                line, self.line = self.line, ""
                self.interpret(line)
            else:
                self.line += character

    def interpret(self, line: str) -> None:
        """Process one line."""
        if line == "":
            self.dispatch()
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            self.process(name, value[1:] if value.startswith(" ") else value)

    def process(self, name: str, value: str) -> None:
        """Process a field."""
        if name == "event":
            self.type = value
        elif name == "data":
            self.data += value + "\n"
        elif name == "id" and "\0" not in value:
            self.id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)

    def dispatch(self) -> None:
        """Dispatch the event, if it is one."""
        self.last_event_id = self.id
        if self.data != "":
            message = Message(self.type or "message", self.data[:-1], self.id)
            self.messages.append(message)
        self.data = self.type = ""


def encoded(*items: Any) -> bytes:
    """The body that these items make."""
    return b"".join(SSE().encode(items))


def parsed(body: bytes) -> Parser:
    """What a client has read from a body."""
    parser = Parser()
    parser.feed(body)
    assert (parser.line, parser.type, parser.data) == ("", "", "")  # all is dispatched
    return parser


def event(field: str, value: Any) -> Event:
    """An event with this in one of its fields."""
    fields: dict[str, Any] = {"data": "x", field: value}
    return Event(**fields)


def messages(*items: Any) -> list[Message]:
    """What a listener hears of these items."""
    return parsed(encoded(*items)).messages


def pickled(event: Event) -> Event:
    """What another process is given."""
    made: Event = pickle.loads(pickle.dumps(event))
    return made


def data(*items: Any) -> list[str]:
    """The data of what a listener hears."""
    return [message.data for message in messages(*items)]


# What is sent.


MADE = [Event("x", id="3"), sealed("x", None, "3")]


@pytest.mark.parametrize("event", MADE, ids=["an item", "of a channel"])
def test_event_is_its_fields_in_other_formats(event: Event) -> None:
    """A feed may be NDJSON: what is made of an event for SSE is none of its fields."""
    fields = {"data": "x", "event": None, "id": "3", "retry": None, "comment": None}
    line = b"".join(NDJSON().encode([event]))
    assert json.loads(line) == fields
    assert [*CSV().encode([event])] == [",".join(fields) + "\r\nx,,3,,\r\n"]


@dataclasses.dataclass(frozen=True)
class Priced(Event):
    price: int = 0


def test_copy_of_an_own_event_has_its_own_fields() -> None:
    """Whoever adds fields to an event keeps them."""
    event = Priced("x", id="3", price=7)
    for made in copy.copy(event), copy.deepcopy(event), pickled(event):
        assert made == event
        assert encoded(made) == encoded(event) == b"id: 3\ndata: x\n\n"
    with pytest.raises(AttributeError, match="Priced has no attribute 'prices'"):
        event.prices  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("event", MADE, ids=["an item", "of a channel"])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copy_of_an_event_is_sent_as_the_event(
    event: Event, copied: Callable[[Event], Event]
) -> None:
    """It may come out of a cache, or from another process."""
    assert copied(event) == event
    assert encoded(copied(event)) == encoded(event)


def test_sse_sends_the_fields_that_are_there() -> None:
    """Each on its line, and a blank line after them; data comes last."""
    event = Event("hello", event="greeting", id="7", retry=1000, comment="hi")
    assert encoded(event) == (
        b": hi\nevent: greeting\nid: 7\nretry: 1000\ndata: hello\n\n"
    )
    assert encoded("hello", "world") == b"data: hello\n\ndata: world\n\n"


def test_sse_makes_one_piece_of_an_item() -> None:
    """So that each can leave as it comes, and none is empty."""
    items = ["a", Event(), Event("b\nc"), "", None]
    pieces = list(SSE().encode(items))
    assert len(pieces) == len(items)
    assert all(piece.endswith(b"\n\n") for piece in pieces)


def test_sse_may_end_after_any_event() -> None:
    """So a server that is stopped can end its streams cleanly."""
    assert SSE.endless
    assert data("a", "b") == data("a") + data("b")


def test_sse_takes_items_one_by_one() -> None:
    """No item is waited for before the one in front of it is encoded."""
    taken: list[int] = []

    def items() -> Iterator[str]:
        for number in (1, 2):
            taken.append(number)
            yield str(number)

    pieces = SSE().encode(items())
    assert next(pieces) == b"data: 1\n\n"
    assert taken == [1]


def test_event_is_an_event_of_its_type() -> None:
    """Listeners hear the type, the data and the last ID; without a type, a message."""
    heard = messages(Event("a", event="tick", id="1"), "b", Event("c", event=""))
    assert heard == [("tick", "a", "1"), ("message", "b", "1"), ("message", "c", "1")]


def test_event_without_data_has_no_data_line() -> None:
    """Nothing is dispatched, while ID and waiting time take effect."""
    body = encoded(Event(comment="c"), Event(event="e"), Event(id="9"), Event(retry=0))
    assert b"data" not in body
    parser = parsed(body)
    assert (parser.messages, parser.last_event_id, parser.retry) == ([], "9", 0)


def test_event_with_empty_data_is_dispatched() -> None:
    """Empty data is data: a line of it is there."""
    assert messages(Event(""), "") == [("message", "", "")] * 2
    assert parsed(encoded(Event("", event="done"))).messages == [("done", "", "")]


def test_event_with_nothing_at_all_is_a_heartbeat() -> None:
    """An empty comment: bytes for a proxy that watches, nothing for a listener."""
    assert encoded(Event()) == b":\n\n"
    assert data("a", Event(), "b") == ["a", "b"]


def test_event_with_an_empty_id_resets_it() -> None:
    """A client that comes back then sends none, as the standard has it."""
    heard = messages(Event("a", id="1"), Event("b", id=""), "c")
    assert [message.last_event_id for message in heard] == ["1", "", ""]


def test_event_takes_whole_numbers_for_an_id() -> None:
    """A key of the database is its digits, whatever kind of whole number it is."""

    class Key(int):
        def __str__(self) -> str:
            return "key\ndata: forged"

    assert encoded(Event(id=42), Event(id=Key(1))) == b"id: 42\n\nid: 1\n\n"


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\rb"], ids=["LF", "CRLF", "CR"])
def test_data_is_split_at_line_breaks(text: str) -> None:
    """Every kind of line break arrives, as LF."""
    assert data(text, Event(text)) == ["a\nb"] * 2


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\n", 2),
        ("\na", 2),
        ("\n", 2),
        ("\n\n", 3),
        ("\r\r\n", 3),
        ("\n\r", 3),
        ("a\n\nb", 3),
    ],
    ids=repr,
)
def test_data_keeps_its_empty_lines(text: str, lines: int) -> None:
    """A trailing line break is a line too, and an empty one ends no event."""
    assert encoded(text).count(b"data:") == lines
    assert data(text) == [re.sub("\r\n?", "\n", text)]


@pytest.mark.parametrize(
    "text",
    [
        " leading",
        "\ufeffmark",
        ": no comment",
        "id: 1",
        "a: b",
        "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
        "\0",
        "é 数据 👩‍🚀",
    ],
    ids=ascii,
)
def test_text_arrives_as_it_is(text: str) -> None:
    """Spaces, colons, marks, and what only Python takes for a line break."""
    assert data(text, Event(text)) == [text] * 2
    assert parsed(encoded(Event(text, comment=text))).messages[0].data == text


@pytest.mark.parametrize("text", [" a", "\ufeffa", "a:b", ":", "a\u2028b", " "])
def test_id_and_event_arrive_as_they_are(text: str) -> None:
    """Spaces and colons are no part of the standard's syntax behind the first."""
    assert messages(Event("x", event=text, id=text)) == [(text, "x", text)]


class Markup(str):
    """Text with methods of its own, as MarkupSafe's has."""

    def encode(self, *args: Any) -> bytes:
        return b"\n\nevent: forged\n\n"


def test_text_of_a_subclass_is_its_text() -> None:
    """Its own methods have no part in what is sent."""
    text = Markup("a")
    kind = enum.Enum("kind", {"A": "a"}, type=str)
    heard = messages(text, Event(text, event=text, id=text), kind.A)
    assert [tuple(message) for message in heard] == [
        ("message", "a", ""),
        ("a", "a", "a"),
        ("message", "a", "a"),
    ]


# JSON.


@pytest.mark.parametrize(
    "value",
    [{"a": [1, None, "é\n"]}, [], 1, 1.5, True, {}, [{"b": "\r\n\0"}]],
    ids=repr,
)
def test_data_that_is_no_text_is_json(value: Any) -> None:
    """On one line, in UTF-8."""
    assert [json.loads(text) for text in data(value, Event(value))] == [value] * 2
    assert encoded(value).count(b"\n") == 2


def test_none_is_null_as_an_item() -> None:
    """While an event with None has no data."""
    assert data(None, Event(None), "null") == ["null", "null"]


class Point(NamedTuple):
    x: int
    y: int


def test_row_is_an_object(sqlite_model: Model) -> None:
    """What has names is sent with them, as in the other JSON formats."""
    sqlite_model.seed("ada")
    with Session(sqlite_model.outside) as session:
        [row] = session.query(User.id, User.name)
    expected = [{"id": 1, "name": "ada"}] * 2 + [{"x": 1, "y": 2}]
    assert [json.loads(text) for text in data(row, Event(row), Point(1, 2))] == expected


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}], ids=repr)
def test_number_that_json_has_not_names_its_item(value: Any) -> None:
    """NaN and Infinity are refused, in an event and alone."""
    for item in (value, Event(value)):
        with pytest.raises(ValueError, match=r"^item 2 "):
            encoded("a", item)


def test_object_that_json_has_not_names_its_item() -> None:
    """So is what TG's encoder does not know."""
    with pytest.raises(TypeError, match=r"^item 3 "):
        encoded("a", "b", Event(object()))


@pytest.mark.parametrize("value", [b"a", bytearray(b"a"), memoryview(b"a")])
def test_bytes_are_refused(value: Any) -> None:
    """An event stream is text; the message names the item, or the event."""
    with pytest.raises(TypeError, match=r"^item 2 is \w+, .* decode it to a str$"):
        encoded("a", value)
    with pytest.raises(TypeError, match=r"^Event: data is \w+, .* decode it to a str$"):
        Event(value)


# What is refused.

ATTACK = "\ndata: forged\n\nevent: forged\ndata: x\n\n"


@pytest.mark.parametrize("field", ["event", "id", "comment"])
@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n"], ids=repr)
@pytest.mark.parametrize("value", ["a{}data: x", "{}", "a{}", "{}a", "a{0}{0}retry: 1"])
def test_line_break_in_a_field_is_refused(field: str, break_: str, value: str) -> None:
    """It would begin a field of the attacker's choice, or an event."""
    with pytest.raises(ValueError, match=f"^Event: {field}=.* must be one line; "):
        event(field, value.format(break_))


@pytest.mark.parametrize("field", ["event", "id"])
@pytest.mark.parametrize("value", ["\0", "a\0b"], ids=repr)
def test_nul_in_a_field_is_refused(field: str, value: str) -> None:
    """Clients would ignore an ID with a NUL in it."""
    with pytest.raises(ValueError, match=f"^Event: {field}=.* CR, LF or NUL in it"):
        event(field, value)


# GHSA-6hcq-hmm3-jj3c (Spring), CVE-2026-35515 (NestJS), GHSA-p6xx-57qc-3wxr (Hono),
# GHSA-4hxc-9384-m385 (h3).
@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n"], ids=repr)
@pytest.mark.parametrize(
    "value",
    [
        ATTACK,
        "legit" + ATTACK,
        "x\nevent: admin\ndata: {}\nid: 99\nretry: 1",
        "hello\n\nevent: system\ndata: owned",
        "a\nid: 1\n\n\n",
    ],
    ids=ascii,
)
def test_known_attacks_fail(value: str, break_: str) -> None:
    """What other frameworks let through is refused, or is data and nothing else."""
    value = value.replace("\n", break_)
    for field in ("event", "id", "comment"):
        with pytest.raises(ValueError):
            event(field, value)
    parser = parsed(encoded(value, Event(value), {"a": value}))
    text = re.sub("\r\n?", "\n", value)
    assert parser.messages[:2] == [("message", text, "")] * 2
    assert json.loads(parser.messages[2].data) == {"a": value}
    assert (len(parser.messages), parser.retry) == (3, None)


@pytest.mark.parametrize("field", ["data", "event", "id", "comment"])
def test_lone_surrogate_in_an_event_is_refused(field: str) -> None:
    """UTF-8 cannot say it: a sentence, and no broken body."""
    with pytest.raises(ValueError, match=f"^Event: {field} has a lone surrogate"):
        event(field, "ab\ud800")


def test_lone_surrogate_in_an_item_is_refused() -> None:
    """With the item's number."""
    with pytest.raises(
        ValueError, match=r"^item 2 has a lone surrogate at character 1"
    ):
        encoded("a", "b\udfff")


@pytest.mark.parametrize("retry", [-1, True, False, 1.0, 1.5, "1", "1\ndata: x", b"1"])
def test_retry_is_whole_milliseconds(retry: Any) -> None:
    """Anything else is refused, however near."""
    with pytest.raises(
        ValueError, match=r"^Event: retry=.* whole milliseconds, from 0"
    ):
        Event(retry=retry)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("event", 1),
        ("event", b"a"),
        ("id", b"a"),
        ("id", 1.5),
        ("id", True),
        ("comment", 1),
        ("comment", ["a"]),
    ],
)
def test_field_that_is_no_text_is_refused(field: str, value: Any) -> None:
    """The message names the field and what to give instead."""
    with pytest.raises(
        TypeError, match=f"^Event: {field}=.* is no text; give it a str"
    ):
        event(field, value)


def test_event_cannot_be_changed_after_it_was_checked() -> None:
    """Nothing gets around the checks; a changed copy is checked again."""
    event = Event("a", id="1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.id = "1\ndata: forged"  # type: ignore[misc]
    assert encoded(dataclasses.replace(event, id="2")) == b"id: 2\ndata: a\n\n"
    with pytest.raises(ValueError):
        dataclasses.replace(event, id="1\n2")


def test_event_shows_its_fields_and_is_equal_by_them() -> None:
    """As tests of controllers want it."""
    event = Event("a", id="1")
    assert repr(event) == (
        "Event(data='a', event=None, id='1', retry=None, comment=None)"
    )
    assert event == Event("a", None, "1", None, None)
    assert event != Event("a", id="2")
    assert not hasattr(event, "__dict__")


# Any text.

TRICKY = "\r\n\0 :\ufeff\u2028\u2029\x85\x0b\x0c\x1e\ud800\U0001f600ad"
text = st.text(st.sampled_from(TRICKY) | st.characters(), max_size=12)
fields = st.fixed_dictionaries(
    {},
    optional={
        "data": text,
        "event": text,
        "id": text,
        "comment": text,
        "retry": st.integers(-1, 10**20),
    },
)


def refused(fields: dict[str, Any]) -> bool:
    """Whether the standard, or UTF-8, has no way to say this."""
    texts = [value for value in fields.values() if isinstance(value, str)]
    lines = fields.get("event", "") + fields.get("id", "")
    return bool(
        any("\ud800" <= character <= "\udfff" for each in texts for character in each)
        or re.search("[\r\n]", lines + fields.get("comment", ""))
        or "\0" in lines
        or fields.get("retry", 0) < 0
    )


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.lists(fields, max_size=4), st.lists(st.integers(0, 200), max_size=8))
def test_any_text_is_refused_or_arrives(
    wanted: list[dict[str, Any]], cuts: list[int]
) -> None:
    """Whatever is in any field, however the body is cut up on its way."""
    events, expected, id, retry = [], [], "", None
    for each in wanted:
        if refused(each):
            with pytest.raises(ValueError, match=r"^Event: \w+"):
                Event(**each)
            continue
        events.append(Event(**each))
        id, retry = each.get("id", id), each.get("retry", retry)
        if "data" in each:
            lines = re.sub("\r\n?", "\n", each["data"])
            expected.append((each.get("event") or "message", lines, id))
    body, parser = encoded(*events), Parser()
    places = sorted({0, *cuts})
    for start, end in zip(places, [*places[1:], None], strict=True):
        parser.feed(body[start:end])
    assert parser.messages == expected
    assert (parser.last_event_id, parser.retry) == (id, retry)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
    ),
    max_leaves=6,
).filter(lambda value: not isinstance(value, str))


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.lists(json_values, max_size=4))
def test_any_json_arrives(values: list[Any]) -> None:
    """A document an event, equal to what was yielded."""
    assert [json.loads(each) for each in data(*values)] == values


# In an application.


def test_sse_sets_its_headers(make_app: MakeApp) -> None:
    """Decorated with the class or an object, or returned by the helper."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def by_class(self) -> Iterator[str]:
            yield "é"

        @expose()
        @stream(SSE(), charset="latin-1")
        def by_object(self) -> Iterator[str]:
            yield "é"

        @expose()
        def helper(self) -> Any:
            return Stream(["é"], SSE)

    app = make_app(Root())
    for path in ("/by_class", "/by_object", "/helper"):
        call = get(app, path)
        assert call.text == "data: é\n\n"
        assert call.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert call.headers["Cache-Control"] == "no-cache"
        assert call.headers["X-Accel-Buffering"] == "no"


def test_headers_that_the_user_sets_win(make_app: MakeApp) -> None:
    """What a controller says of caching is left as it is."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[str]:
            tg.response.headers["Cache-Control"] = "no-store"
            tg.response.headers["X-Accel-Buffering"] = "yes"
            yield "a"

    headers = get(make_app(Root()), "/events").headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "yes"


def test_each_event_is_a_chunk_and_stored_before_it_leaves(
    make_app: MakeApp, model: Model
) -> None:
    """A client never sees an event that is not in the database."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Any]:
            yield Event(comment="open")
            for name in ("ada", "bob"):
                model.DBSession.add(User(name=name))
                yield {"name": name}

    call = Call(make_app(Root(), model), "/events")
    assert next(call) == b": open\n\n"
    assert next(call) == b'data: {"name":"ada"}\n\n'
    assert model.names() == ["ada"]
    call.close()
    assert model.names() == ["ada"]
    assert_clean(model)


def test_error_before_the_first_event_is_an_ordinary_response(
    make_app: MakeApp,
) -> None:
    """A browser comes back for ever after a broken 200, and stops at a 404."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Event]:
            abort(404)
            yield Event(comment="open")

    call = get(make_app(Root()), "/events")
    assert call.status == "404 Not Found"
    assert "event-stream" not in call.headers["Content-Type"]
    assert "X-Accel-Buffering" not in call.headers


def test_event_that_cannot_be_sent_breaks_the_stream(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The events before it have left; nothing of it has."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Any]:
            yield "a"
            yield {"a": float("nan")}

    call = Call(make_app(Root()), "/events")
    assert next(call) == b"data: a\n\n"
    with pytest.raises(ValueError, match=r"^item 2 "):
        next(call)
    call.close()
    assert [(report.reason, report.chunks) for report in reports] == [("failed", 1)]


# Over a socket, read by a client of others.


@pytest.fixture
def live(live_server: Callable[..., LiveServer]) -> Iterator[Callable[..., Any]]:
    """Asks a real server for events."""
    server = live_server("waitress", "stream_app")
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:

        def ask(path: str, last: str | None = None, **params: str) -> Any:
            headers = {} if last is None else {"Last-Event-ID": last}
            url = f"/traced/{path}"
            return connect_sse(client, "GET", url, params=params, headers=headers)

        yield ask


def heard(source: EventSource) -> list[tuple[str, str, str]]:
    """What the client has dispatched."""
    return [(each.event, each.data, each.id) for each in source.iter_sse()]


def test_real_client_understands_events(live: Callable[..., Any]) -> None:
    """httpx-sse reads what was sent, and comes back for what it has not had."""
    sent = [
        {"id": 1, "data": "a\nb\rc\r\nd"},
        {"id": 2, "event": "a: b", "data": " \u2028 é 👩‍🚀"},
        {"id": 3, "comment": "c", "data": {"a": ATTACK}},
        {"id": 4, "retry": 10, "data": ""},
    ]
    expected = [
        ("message", "a\nb\nc\nd", "1"),
        ("a: b", " \u2028 é 👩‍🚀", "2"),
        ("message", json.dumps({"a": ATTACK}, separators=(",", ":")), "3"),
        ("message", "", "4"),
    ]
    with live("events", of=json.dumps(sent)) as source:
        assert heard(source) == expected
    with live("events", last="2", of=json.dumps(sent)) as source:
        assert heard(source) == expected[2:]


def test_real_client_hears_an_event_when_it_comes(
    live: Callable[..., Any], tmp_path: Path
) -> None:
    """The response is open before there is an event, and the event does not wait."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with live("ticks", pipe=str(pipe)) as source:
        assert source.response.headers["X-Accel-Buffering"] == "no"
        go = os.open(pipe, os.O_RDWR)  # which does not wait for the other side
        os.write(go, b"now\n")
        assert heard(source) == [("tick", "now", "")]
        os.close(go)
