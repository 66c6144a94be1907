"""``SSE`` and ``Event``: a client of the HTML standard receives what was sent."""

from __future__ import annotations

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
from tests.formats.support import (
    EventParser,
    Message,
    encode_events,
    parse_events,
)
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, SSE, Event, Report, Stream, stream
from tgstream.formats.sse import Message as PublishedMessage
from tgstream.formats.sse import replace_id


def make_event(field: str, value: Any) -> Event:
    """An event with a value in one of its fields."""
    fields: dict[str, Any] = {"data": "x", field: value}
    return Event(**fields)


def send_messages(*items: Any) -> list[Message]:
    """The messages that a listener receives for these items."""
    return parse_events(encode_events(*items)).messages


def pickle_copy(event: Event) -> Event:
    """The event as another process receives it."""
    copied: Event = pickle.loads(pickle.dumps(event))
    return copied


def send_data(*items: Any) -> list[str]:
    """The data that a listener receives for these items."""
    return [message.data for message in send_messages(*items)]


# Events and their bytes.

EVENTS = [Event("x", id="3"), PublishedMessage("channel", "x").with_id("3")]


@pytest.mark.parametrize("event", EVENTS, ids=["an item", "of a channel"])
def test_event_has_only_its_fields_in_other_formats(event: Event) -> None:
    """The bytes of an event for SSE are not one of its fields."""
    fields = {"data": "x", "event": None, "id": "3", "retry": None, "comment": None}
    fields["channel"] = event.channel
    line = b"".join(NDJSON().encode([event]))
    assert json.loads(line) == fields
    row = f"x,,3,,,{event.channel or ''}"
    assert [*CSV().encode([event])] == [",".join(fields) + f"\r\n{row}\r\n"]


@dataclasses.dataclass(frozen=True)
class Priced(Event):
    price: int = 0


def test_event_copy_of_a_subclass_keeps_added_fields() -> None:
    """A subclass may add fields."""
    event = Priced("x", id="3", price=7)
    for copied in copy.copy(event), copy.deepcopy(event), pickle_copy(event):
        assert copied == event
        assert encode_events(copied) == encode_events(event) == b"id: 3\ndata: x\n\n"
    with pytest.raises(AttributeError, match="Priced has no attribute 'prices'"):
        event.prices  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("event", EVENTS, ids=["an item", "of a channel"])
@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle_copy])
def test_event_copy_is_sent_as_the_event(
    event: Event, make_copy: Callable[[Event], Event]
) -> None:
    """An event may come from a cache, or from another process."""
    assert make_copy(event) == event
    assert encode_events(make_copy(event)) == encode_events(event)


@pytest.mark.parametrize(
    ("published", "data"),
    [({"a": [1]}, '{"a":[1]}'), ([], "[]"), (7, "7"), (None, "null"), ("7", "7")],
)
@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle_copy])
def test_event_json_is_what_was_published(
    published: object, data: str, make_copy: Callable[[Event], Event]
) -> None:
    """A published text is not parsed, even if it is JSON. ``data`` is always text."""
    is_json = not isinstance(published, str)
    event = PublishedMessage("channel", data, None, is_json).with_id("3")
    changed = dataclasses.replace(event, id="4")
    for each in event, make_copy(event), changed, replace_id(event, "4", "channel"):
        assert (each.json(), each.data) == (published, data)
        line = b"".join(NDJSON().encode([each]))
        assert json.loads(line)["data"] == data
    assert encode_events(changed) == encode_events(replace_id(event, "4", "channel"))
    assert dataclasses.replace(event, data="[").json() == "["


def test_event_json_of_other_events_is_their_data() -> None:
    """A comment has no data. Invalid JSON of another program raises."""
    assert Event(comment="open").json() is None
    assert Event({"a": 1}).json() == {"a": 1}
    event = PublishedMessage("channel", "{", None, True).with_id("3")
    with pytest.raises(ValueError, match="Expecting"):
        event.json()


def test_sse_sends_the_fields_that_are_set() -> None:
    """Each field is a line, data is the last one, and a blank line ends the event."""
    event = Event("hello", event="greeting", id="7", retry=1000, comment="hi")
    assert encode_events(event) == (
        b": hi\nevent: greeting\nid: 7\nretry: 1000\ndata: hello\n\n"
    )
    assert encode_events("hello", "world") == b"data: hello\n\ndata: world\n\n"


def test_sse_yields_one_bytes_object_for_each_item() -> None:
    """So each event can be sent at once, and no bytes are empty."""
    items = ["a", Event(), Event("b\nc"), "", None]
    output = list(SSE().encode(items))
    assert len(output) == len(items)
    assert all(event.endswith(b"\n\n") for event in output)


def test_sse_stream_is_complete_after_any_event() -> None:
    """So a server that is stopped can end its streams normally."""
    assert SSE.endless
    assert send_data("a", "b") == send_data("a") + send_data("b")


def test_sse_takes_items_one_by_one() -> None:
    """An item is encoded before the next item is taken."""
    taken: list[int] = []

    def items() -> Iterator[str]:
        for number in (1, 2):
            taken.append(number)
            yield str(number)

    output = SSE().encode(items())
    assert next(output) == b"data: 1\n\n"
    assert taken == [1]


def test_event_is_dispatched_with_type_data_and_last_id() -> None:
    """An event without a type is a ``message``."""
    items = [Event("a", event="tick", id="1"), "b", Event("c", event="")]
    assert send_messages(*items) == [
        ("tick", "a", "1"),
        ("message", "b", "1"),
        ("message", "c", "1"),
    ]


def test_event_without_data_has_no_data_line() -> None:
    """Nothing is dispatched, but the ID and the reconnection time take effect."""
    body = encode_events(
        Event(comment="c"), Event(event="e"), Event(id="9"), Event(retry=0)
    )
    assert b"data" not in body
    parser = parse_events(body)
    assert (parser.messages, parser.last_event_id, parser.retry) == ([], "9", 0)


def test_event_with_empty_data_is_dispatched() -> None:
    """Empty data is sent as an empty ``data`` line."""
    assert send_messages(Event(""), "") == [("message", "", "")] * 2
    assert parse_events(encode_events(Event("", event="done"))).messages == [
        ("done", "", "")
    ]


def test_event_without_fields_is_a_heartbeat() -> None:
    """It is an empty comment, which listeners do not receive."""
    assert encode_events(Event()) == b":\n\n"
    assert send_data("a", Event(), "b") == ["a", "b"]


def test_event_with_an_empty_id_clears_the_last_id() -> None:
    """A client that reconnects then sends no ``Last-Event-ID``."""
    received = send_messages(Event("a", id="1"), Event("b", id=""), "c")
    assert [message.last_event_id for message in received] == ["1", "", ""]


def test_event_id_may_be_a_whole_number() -> None:
    """A subclass of int is sent as its digits too."""

    class Key(int):
        def __str__(self) -> str:
            return "key\ndata: forged"

    assert encode_events(Event(id=42), Event(id=Key(1))) == b"id: 42\n\nid: 1\n\n"


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\rb"], ids=["LF", "CRLF", "CR"])
def test_event_data_is_split_at_line_breaks(text: str) -> None:
    """Every kind of line break arrives as LF."""
    assert send_data(text, Event(text)) == ["a\nb"] * 2


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
def test_event_data_keeps_its_empty_lines(text: str, lines: int) -> None:
    """A trailing line break is kept, and an empty line does not end the event."""
    assert encode_events(text).count(b"data:") == lines
    assert send_data(text) == [re.sub("\r\n?", "\n", text)]


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
def test_event_text_arrives_unchanged(text: str) -> None:
    """Spaces, colons and characters that are line breaks only for Python are kept."""
    assert send_data(text, Event(text)) == [text] * 2
    assert (
        parse_events(encode_events(Event(text, comment=text))).messages[0].data == text
    )


@pytest.mark.parametrize("text", [" a", "\ufeffa", "a:b", ":", "a\u2028b", " "])
def test_event_id_and_type_arrive_unchanged(text: str) -> None:
    """Only the first colon and space of a line are syntax."""
    assert send_messages(Event("x", event=text, id=text)) == [(text, "x", text)]


class Markup(str):
    """Text with its own methods, like that of MarkupSafe."""

    def encode(self, *args: Any) -> bytes:
        return b"\n\nevent: forged\n\n"


def test_event_text_of_a_subclass_is_its_text() -> None:
    """The methods of the subclass are not called."""
    text = Markup("a")
    letters = enum.Enum("letters", {"A": "a"}, type=str)
    received = send_messages(text, Event(text, event=text, id=text), letters.A)
    assert [tuple(message) for message in received] == [
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
def test_event_data_that_is_not_text_is_json(value: Any) -> None:
    """The document is one line in UTF-8."""
    assert [json.loads(text) for text in send_data(value, Event(value))] == [value] * 2
    assert encode_events(value).count(b"\n") == 2


def test_sse_item_none_is_null() -> None:
    """An event whose data is None has no data."""
    assert send_data(None, Event(None), "null") == ["null", "null"]


class Point(NamedTuple):
    x: int
    y: int


def test_sse_row_is_an_object(sqlite_model: Model) -> None:
    """A row with names is an object, as in the other JSON formats."""
    sqlite_model.seed("ada")
    with Session(sqlite_model.outside) as session:
        [row] = session.query(User.id, User.name)
    expected = [{"id": 1, "name": "ada"}] * 2 + [{"x": 1, "y": 2}]
    assert [
        json.loads(text) for text in send_data(row, Event(row), Point(1, 2))
    ] == expected


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}], ids=repr)
def test_sse_nan_and_infinity_are_rejected(value: Any) -> None:
    """The error has the number of the item."""
    for item in (value, Event(value)):
        with pytest.raises(ValueError, match=r"^item 2\b.* contains NaN"):
            encode_events("a", item)


def test_sse_object_that_json_does_not_support_is_rejected() -> None:
    """The error has the number of the item."""
    with pytest.raises(TypeError, match=r"^item 3 cannot be encoded as JSON"):
        encode_events("a", "b", Event(object()))


@pytest.mark.parametrize("value", [b"a", bytearray(b"a"), memoryview(b"a")])
def test_sse_bytes_are_rejected(value: Any) -> None:
    """The error names the item, or the field of the event."""
    expected = rf"must be .*, got {type(value).__name__}\. Decode it to a str$"
    with pytest.raises(TypeError, match=f"^item 2 {expected}"):
        encode_events("a", value)
    with pytest.raises(TypeError, match=f"^Event: data {expected}"):
        Event(value)


# Invalid events.

ATTACK = "\ndata: forged\n\nevent: forged\ndata: x\n\n"


@pytest.mark.parametrize("field", ["event", "id", "comment"])
@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n"], ids=repr)
@pytest.mark.parametrize("value", ["a{}data: x", "{}", "a{}", "{}a", "a{0}{0}retry: 1"])
def test_event_line_break_in_a_field_is_rejected(
    field: str, break_: str, value: str
) -> None:
    """An attacker could add a field or an event."""
    with pytest.raises(ValueError, match=f"^Event: {field} must be one line without "):
        make_event(field, value.format(break_))


@pytest.mark.parametrize("field", ["event", "id"])
@pytest.mark.parametrize("value", ["\0", "a\0b"], ids=repr)
def test_event_nul_in_a_field_is_rejected(field: str, value: str) -> None:
    """Clients would ignore an ID that contains NUL."""
    expected = f"^Event: {field} must be one line without CR, LF or NUL, got "
    with pytest.raises(ValueError, match=expected):
        make_event(field, value)


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
def test_event_injection_attacks_fail(value: str, break_: str) -> None:
    """Other frameworks were vulnerable. Here the text is rejected, or is only data."""
    value = value.replace("\n", break_)
    for field in ("event", "id", "comment"):
        with pytest.raises(ValueError):
            make_event(field, value)
    parser = parse_events(encode_events(value, Event(value), {"a": value}))
    text = re.sub("\r\n?", "\n", value)
    assert parser.messages[:2] == [("message", text, "")] * 2
    assert json.loads(parser.messages[2].data) == {"a": value}
    assert (len(parser.messages), parser.retry) == (3, None)


@pytest.mark.parametrize("field", ["data", "event", "id", "comment"])
def test_event_lone_surrogate_in_a_field_is_rejected(field: str) -> None:
    """UTF-8 cannot encode a lone surrogate."""
    with pytest.raises(ValueError, match=f"^Event: {field} contains a lone surrogate"):
        make_event(field, "ab\ud800")


def test_sse_lone_surrogate_in_an_item_is_rejected() -> None:
    """The error has the number of the item."""
    with pytest.raises(
        ValueError, match=r"^item 2 contains a lone surrogate at character 1"
    ):
        encode_events("a", "b\udfff")


@pytest.mark.parametrize("retry", [-1, True, False, 1.0, 1.5, "1", "1\ndata: x", b"1"])
def test_event_invalid_retry_is_rejected(retry: Any) -> None:
    """It must be a whole number of milliseconds."""
    expected = "^Event: retry must be a whole number of milliseconds >= 0 or None, got "
    with pytest.raises(ValueError, match=expected):
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
def test_event_field_that_is_not_text_is_rejected(field: str, value: Any) -> None:
    """The error has the field, the type and the value."""
    got = re.escape(f"got {type(value).__name__}: {value!r}")
    with pytest.raises(TypeError, match=f"^Event: {field} must be a str.* {got}$"):
        make_event(field, value)


def test_event_is_immutable() -> None:
    """A changed copy is checked again."""
    event = Event("a", id="1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.id = "1\ndata: forged"  # type: ignore[misc]
    assert encode_events(dataclasses.replace(event, id="2")) == b"id: 2\ndata: a\n\n"
    with pytest.raises(ValueError):
        dataclasses.replace(event, id="1\n2")


def test_event_has_a_repr_and_equality_by_its_fields() -> None:
    """Tests of controllers can compare events."""
    event = Event("a", id="1")
    assert repr(event) == (
        "Event(data='a', event=None, id='1', retry=None, comment=None, channel=None)"
    )
    assert event == Event("a", None, "1", None, None)
    assert event != Event("a", id="2")
    assert not hasattr(event, "__dict__")


# The last event.


def test_sse_done_event_is_the_last_one() -> None:
    """Its data is the number of items, comments included."""
    encode = SSE(done="all done").encode
    assert [*encode(["a", Event(comment="c")])] == [
        b"data: a\n\n",
        b": c\n\n",
        b"event: all done\ndata: 2\n\n",
    ]
    assert [*encode([])] == [b"event: all done\ndata: 0\n\n"]
    assert [*SSE().encode([])] == []


def test_sse_retry_is_sent_with_a_done_event_that_is_the_first() -> None:
    """An event stream without items has one event."""
    [event] = SSE(retry=5, done="done").encode([])
    assert event == b"retry: 5\n\nevent: done\ndata: 0\n\n"


def test_sse_done_in_the_form_of_openai_is_a_line_of_data() -> None:
    """Clients of OpenAI's API stop at this line."""
    assert b"".join(SSE(done="[DONE]").encode(["a"])) == b"data: a\n\ndata: [DONE]\n\n"


def test_sse_failed_event_has_the_incident() -> None:
    """Without the option there is no event."""
    assert SSE(failed="failed").encode_failure("1f") == b"event: failed\ndata: 1f\n\n"
    assert SSE().encode_failure("1f") == b""


@pytest.mark.parametrize("option", ["done", "failed"])
@pytest.mark.parametrize("value", ["", "a\nb", "a\rb", "a\0b", 5, b"done", True])
def test_sse_invalid_type_of_a_last_event_is_rejected(option: str, value: Any) -> None:
    """It must be one line of text, so that no value can add a field."""
    expected = re.escape(f"SSE: {option} must be the type of an event, one line of ")
    options: dict[str, Any] = {option: value}
    with pytest.raises(
        ValueError, match=f"^{expected}.*, got {re.escape(repr(value))}"
    ):
        SSE(**options)


def test_sse_lone_surrogate_in_the_type_of_a_last_event_is_rejected() -> None:
    """UTF-8 cannot encode it."""
    with pytest.raises(ValueError, match=r"^SSE: done contains a lone surrogate"):
        SSE(done="\ud800")


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


def is_invalid(fields: dict[str, Any]) -> bool:
    """Whether the standard or UTF-8 does not allow these fields."""
    texts = [value for value in fields.values() if isinstance(value, str)]
    lines = fields.get("event", "") + fields.get("id", "")
    return bool(
        any("\ud800" <= character <= "\udfff" for character in "".join(texts))
        or re.search("[\r\n]", lines + fields.get("comment", ""))
        or "\0" in lines
        or fields.get("retry", 0) < 0
    )


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.lists(fields, max_size=4), st.lists(st.integers(0, 200), max_size=8))
def test_event_text_arrives_or_is_rejected(
    candidates: list[dict[str, Any]], cuts: list[int]
) -> None:
    """The body may be split anywhere on its way."""
    events, expected, id, retry = [], [], "", None
    for fields in candidates:
        if is_invalid(fields):
            with pytest.raises(ValueError, match=r"^Event: \w+"):
                Event(**fields)
            continue
        events.append(Event(**fields))
        id, retry = fields.get("id", id), fields.get("retry", retry)
        if "data" in fields:
            lines = re.sub("\r\n?", "\n", fields["data"])
            expected.append((fields.get("event") or "message", lines, id))
    body, parser = encode_events(*events), EventParser()
    offsets = sorted({0, *cuts})
    for start, end in zip(offsets, [*offsets[1:], None], strict=True):
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
def test_event_json_data_arrives(values: list[Any]) -> None:
    """The document of each event is equal to the value."""
    assert [json.loads(text) for text in send_data(*values)] == values


# In a response.


def test_sse_sets_its_headers(make_app: MakeApp) -> None:
    """The decorator accepts a class or an object, and so does ``Stream``."""

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


def test_sse_keeps_headers_that_the_controller_sets(make_app: MakeApp) -> None:
    """A controller may set its own ``Cache-Control``."""

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


def test_sse_event_is_committed_before_its_chunk_is_sent(
    make_app: MakeApp, model: Model
) -> None:
    """A client never receives an event whose changes are not in the database."""

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


def test_sse_error_before_the_first_event_is_an_ordinary_response(
    make_app: MakeApp,
) -> None:
    """Browsers reconnect forever after an interrupted 200, but stop after a 404."""

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


def test_sse_invalid_event_aborts_the_response(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The events before it have been sent, and no part of it."""

    class Root(TGController):
        @expose()
        @stream(SSE)
        def events(self) -> Iterator[Any]:
            yield "a"
            yield {"a": float("nan")}

    call = Call(make_app(Root()), "/events")
    assert next(call) == b"data: a\n\n"
    with pytest.raises(ValueError, match=r'^item 2, field "a": '):
        next(call)
    call.close()
    assert [(report.reason, report.chunks) for report in reports] == [("failed", 1)]


# Over a socket, read by another client.


@pytest.fixture
def live(live_server: Callable[..., LiveServer]) -> Iterator[Callable[..., Any]]:
    """Requests events from a real server."""
    server = live_server("waitress", "stream_app")
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:

        def connect(path: str, last: str | None = None, **params: str) -> Any:
            headers = {} if last is None else {"Last-Event-ID": last}
            url = f"/traced/{path}"
            return connect_sse(client, "GET", url, params=params, headers=headers)

        yield connect


def read_events(source: EventSource) -> list[tuple[str, str, str]]:
    """The events that the client has dispatched."""
    return [(event.event, event.data, event.id) for event in source.iter_sse()]


def test_sse_is_read_by_httpx_sse(live: Callable[..., Any]) -> None:
    """When it reconnects, it gets the events that it has not received."""
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
        assert read_events(source) == expected
    with live("events", last="2", of=json.dumps(sent)) as source:
        assert read_events(source) == expected[2:]


def test_sse_event_is_received_when_it_is_yielded(
    live: Callable[..., Any], tmp_path: Path
) -> None:
    """The response starts before the first event, and events are not buffered."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with live("ticks", pipe=str(pipe)) as source:
        assert source.response.headers["X-Accel-Buffering"] == "no"
        writer = os.open(pipe, os.O_RDWR)  # does not wait for the reader
        os.write(writer, b"now\n")
        assert read_events(source) == [("tick", "now", "")]
        os.close(writer)
