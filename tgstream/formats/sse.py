"""SSE: the format that encodes items as server-sent events.

A value can only ever be the value of its own field. Text that contains line breaks is
split into several ``data`` lines, or rejected in fields that must be one line. So no
value can add a field or an event to the stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from threading import TIMEOUT_MAX
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from .json_encoder import Encoder, to_document


class JSONText(str):
    """The ``data`` of an event that was published as an object, a list or a number.

    It is a type of text, so that copies of an event keep it.
    """

    __slots__ = ()


class _EventBytes:
    """The encoded parts of an event.

    They are not dataclass fields of ``Event``, because other formats write its fields.
    """

    __slots__ = "_bytes", "_field_lines"
    _field_lines: bytes  # all fields but data
    _bytes: bytes | None  # the whole event, if it was encoded before


@dataclass(frozen=True, slots=True)
class Event(_EventBytes):
    """An event for :class:`SSE`, with the fields of the HTML standard, section 9.2.

    Browsers dispatch an event only if it has data, which may be ``''``:
    ``Event(event='done')`` reaches no listener. An event without data still sets the
    browser's last event ID by its ``id``, and the reconnection time by its ``retry``.
    ``Event()`` is an empty comment, which keeps a connection alive.

    :param data: a ``str`` is sent unchanged, any other value as JSON, and None means
        no data. Line breaks of every kind arrive as LF.
    :param event: the type of the event, which listeners register for. None for
        ``message``.
    :param id: a browser that reconnects sends it as ``Last-Event-ID``. ``''`` clears
        the last ID. A whole number is sent as its digits.
    :param retry: whole milliseconds to wait before reconnecting.
    :param comment: a line that clients ignore.
    :param channel: the name of the channel of an event that was published. It is not
        sent by ``SSE``.
    :raises TypeError: when ``event``, ``id`` or ``comment`` is not text, or ``data`` is
        bytes.
    :raises ValueError: when ``event`` or ``id`` contains CR, LF or NUL, ``comment``
        contains CR or LF, or any text a lone surrogate, and when ``retry`` is not a
        whole number >= 0.
    """

    data: Any = None
    event: str | None = None
    id: str | int | None = None
    retry: int | None = None
    comment: str | None = None
    channel: str | None = None

    def __post_init__(self) -> None:
        id: Any = self.id
        if _is_whole_number(id):
            id = str(int(id))
        lines = (
            _encode_line("comment", b": ", self.comment, b"\r\n")
            + _encode_line("event", b"event: ", self.event, b"\r\n\0")
            + _encode_line("id", b"id: ", id, b"\r\n\0")
            + _encode_retry(self.retry)
        )
        if self.data is None:
            lines = lines or b":\n"
        elif isinstance(self.data, str):
            _encode_utf8("Event: data", self.data)
        else:
            _reject_bytes("Event: data", self.data)
        object.__setattr__(self, "_field_lines", lines)
        object.__setattr__(self, "_bytes", None)

    if not TYPE_CHECKING:  # a type checker would accept any attribute name

        def __getattr__(self, name: str) -> Any:
            if name not in _EventBytes.__slots__:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            self.__post_init__()  # copy and pickle copy only the dataclass fields
            return getattr(self, name)

    def json(self) -> Any:
        """Return the value that was published: an object, a list, a number or a text.

        :returns: the value that JSON has of it, so a date is text. A published ``str``
            is returned unchanged, also if it contains JSON. ``data`` of any other event
            is returned unchanged: the name of the channel for ``reset``, and None for a
            comment.
        :raises ValueError: when another program has published invalid JSON.
        """
        return json.loads(self.data) if isinstance(self.data, JSONText) else self.data


_DONE_LINE = b"event: [DONE]\n"

REPLACED_RETRY = 3_600_000
"""Milliseconds that the browser of a replaced stream waits before it reconnects."""


class SSE:
    """Server-sent events, for a browser's ``EventSource``.

    An item is an :class:`Event` or the data of an event: a ``str`` is sent unchanged,
    any other value as JSON (None is ``null``). Bytes are rejected. Each item is sent as
    soon as it is yielded, after its changes are committed. If a generator waits for its
    first event, let it begin with ``yield Event(comment='open')``, after its checks.

    The stream follows the HTML standard, section 9.2
    (https://html.spec.whatwg.org/multipage/server-sent-events.html). It is always
    UTF-8, and is complete after any event. If a newer stream replaces it
    (``limit_action='replace'``), it ends with the event ``replaced``, except with
    ``done='[DONE]'``.

    :param heartbeat: seconds after which a comment is sent if the generator has yielded
        nothing, so that proxies keep the connection open and a disconnect is noticed.
        None for no heartbeat. The generator then runs on its own thread, with its
        request, session and transaction bound as usual. After a disconnect it is closed
        at its next yield: do not let it wait forever. ``listen()`` sends heartbeats
        itself and needs no thread. ``listen(comments=False)`` needs this option.
    :param retry: whole milliseconds that a browser waits before reconnecting, sent with
        the first event. None for the browser's default.
    :param done: the type of a last event of a complete stream, such as ``'done'``. Its
        data is the number of items. It is sent after the final commit. ``'[DONE]'``
        sends the line ``data: [DONE]`` without a type, like OpenAI. A stream that ends
        by ``max_seconds``, by :func:`drain` or because its listener is too far behind
        has no such event, because the browser must reconnect. None for no event.
    :param failed: the type of a last event of a failed stream, such as ``'failed'``.
        Its data is an incident id that the log line and the :class:`Report` of the
        failure have too. The transfer is aborted after it. A failure before the first
        chunk is an ordinary error page. None for no event.
    :raises ValueError: when an option is invalid.
    """

    content_type = "text/event-stream"
    charset = "utf-8"
    headers: Mapping[str, str] = MappingProxyType(
        # nginx reads the second one. Without it, nginx buffers the events.
        {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    endless = True
    commit = "each"
    chunk_size = 0

    def __init__(
        self,
        heartbeat: float | None = None,
        retry: int | None = None,
        *,
        done: str | None = None,
        failed: str | None = None,
    ) -> None:
        if heartbeat is not None and not (
            isinstance(heartbeat, int | float) and 0 < heartbeat <= TIMEOUT_MAX
        ):
            raise ValueError(
                "SSE: heartbeat must be None or a number of seconds > 0 and <= "
                f"{TIMEOUT_MAX:g}, got {heartbeat!r}"
            )
        self.heartbeat = heartbeat
        self._retry_line = b"" if retry is None else _encode_retry(retry, "SSE") + b"\n"
        self._done_line = None if done is None else _encode_type("done", done)
        self._failed_line = None if failed is None else _encode_type("failed", failed)

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """Yield the bytes of an event for each item.

        :raises TypeError: when an item is bytes, or JSON does not support it.
        :raises ValueError: when an item contains a lone surrogate, NaN or Infinity.
        """
        # An open stream keeps its generators, so there is a second one only if needed.
        events = self._encode_items(items)
        return self._add_retry(events) if self._retry_line else events

    def _add_retry(self, events: Iterator[bytes]) -> Iterator[bytes]:
        for event in events:
            yield self._retry_line + event
            break
        yield from events

    def encode_failure(self, incident: str) -> bytes:
        """Return the event of a failed stream, empty without ``failed``.

        :param incident: the id of the failure.
        """
        if self._failed_line is None:
            return b""
        return b"%bdata: %b\n\n" % (self._failed_line, incident.encode())

    def encode_replaced(self) -> bytes:
        """Return the event of a stream that a newer one replaces.

        It also has the browser wait for an hour before it reconnects. Otherwise two
        open tabs would replace each other forever.
        """
        if self._done_line == _DONE_LINE:  # clients of OpenAI do not reconnect
            return b""
        return b"event: replaced\nretry: %d\ndata: \n\n" % REPLACED_RETRY

    def _encode_items(self, items: Iterable[Any]) -> Iterator[bytes]:
        number, encoder = 0, None
        for item in items:
            number += 1
            lines, data = b"", item
            if isinstance(item, Event):
                if item._bytes is not None:
                    yield item._bytes
                    continue
                lines, data = item._field_lines, item.data
                if data is None:
                    yield lines + b"\n"
                    continue
            if encoder is None:  # a listener of a channel never needs one
                encoder = Encoder()
            text = _encode_item_data(data, number, encoder)
            yield b"%b%b\n" % (lines, _split_data(text))
        if self._done_line == _DONE_LINE:
            yield b"data: [DONE]\n\n"
        elif self._done_line is not None:
            yield b"%bdata: %d\n\n" % (self._done_line, number)


def _encode_item_data(data: Any, number: int, encoder: Encoder) -> bytes:
    if isinstance(data, str):
        return _encode_utf8(f"item {number}", data)
    _reject_bytes(f"item {number}", data)
    return encoder.encode(to_document(data), number)


# Events that are encoded once for many listeners.


def encode_data(data: Any, subject: str) -> bytes:
    """Return the text of an event's ``data`` in UTF-8.

    :param subject: for an error message: whose data it is.
    :raises TypeError: when it is bytes, or JSON does not support it.
    :raises ValueError: when it contains a lone surrogate, NaN or Infinity.
    """
    try:
        if isinstance(data, str):  # without the cost of an encoder
            return _encode_utf8("it", data)
        _reject_bytes("it", data)
        return Encoder().encode(to_document(data), "it")
    except (TypeError, ValueError) as error:
        error_type = TypeError if isinstance(error, TypeError) else ValueError
        raise error_type(f"{subject} cannot be sent as an event: {error}") from error


def check_event_type(event: str | None) -> None:
    """Check that the type of an event is one line of text, or None.

    :raises TypeError: when it is not a str.
    :raises ValueError: when it contains CR, LF, NUL or a lone surrogate.
    """
    _encode_line("event", b"event: ", event, b"\r\n\0")


class Message(NamedTuple):
    """An event to publish in a channel. It is encoded for all listeners at once.

    :param channel: the name of the channel.
    :param text: the data.
    :param event: the type of the event.
    :param is_json: whether ``text`` is JSON, and not the text that was published.
    :param data: ``text`` in UTF-8, if the caller has it.
    """

    channel: str
    text: str
    event: str | None = None
    is_json: bool = False
    data: bytes | None = None

    def with_id(self, id: str) -> Event:
        """Return the event with an id.

        It is created without the checks of ``Event``, which takes 0.9 us, not 2.9 us.

        :param id: one line of text, which is not checked.
        :raises ValueError: when the type or the data cannot be sent in an event. A back
            end may have them from another program.
        """
        data = self.data
        if data is None:
            data = _encode_utf8("Event: data", self.text)
        text = JSONText(self.text) if self.is_json else self.text
        return _make_event(text, self.event, id, self.channel, _split_data(data))


def replace_id(event: Event, id: str, channel: str) -> Event:
    """Return an event of a channel with another id. The bytes of its data are kept.

    :param id: one line of text, which is not checked.
    """
    if event._bytes is None:
        return replace(event, id=id, channel=channel)
    data_lines = event._bytes[len(event._field_lines) : -1]
    return _make_event(event.data, event.event, id, channel, data_lines)


def _make_event(
    text: str, type: str | None, id: str, channel: str | None, data_lines: bytes
) -> Event:
    event, set_field = object.__new__(Event), object.__setattr__
    type_line = _encode_line("event", b"event: ", type, b"\r\n\0")
    lines = b"%bid: %b\n" % (type_line, id.encode())
    set_field(event, "data", text)
    set_field(event, "event", type)
    set_field(event, "id", id)
    set_field(event, "retry", None)
    set_field(event, "comment", None)
    set_field(event, "channel", channel)
    set_field(event, "_field_lines", lines)
    set_field(event, "_bytes", b"%b%b\n" % (lines, data_lines))
    return event


# The lines of an event.


def _split_data(text: bytes) -> bytes:
    """Return ``data`` lines for a text, split where the standard ends a line."""
    text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return b"data: %b\n" % text.replace(b"\n", b"\ndata: ")


def _encode_line(name: str, start: bytes, value: Any, forbidden: bytes) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str):
        types = "a str, an int" if name == "id" else "a str"
        raise TypeError(
            f"Event: {name} must be {types} or None, got {type(value).__name__}: "
            f"{value!r:.80}"
        )
    text = _encode_utf8(f"Event: {name}", value)
    if any(byte in text for byte in forbidden):
        names = "CR, LF or NUL" if 0 in forbidden else "CR or LF"
        raise ValueError(
            f"Event: {name} must be one line without {names}, got {value!r:.80}. "
            "Remove these characters, or send the text as data"
        )
    return start + text + b"\n"


def _encode_type(option: str, value: Any) -> bytes:
    """Return the line of an event's type, which is an option of ``SSE``."""
    if (
        not isinstance(value, str)
        or not value
        or any(char in value for char in "\r\n\0")
    ):
        raise ValueError(
            f"SSE: {option} must be the type of an event, one line of text such as "
            f"{option!r}, or None, got {value!r:.80}"
        )
    return b"event: %b\n" % _encode_utf8(f"SSE: {option}", value)


def _encode_retry(retry: Any, where: str = "Event") -> bytes:
    if retry is None:
        return b""
    if not _is_whole_number(retry) or retry < 0:
        raise ValueError(
            f"{where}: retry must be a whole number of milliseconds >= 0 or None, got "
            f"{retry!r:.80}"
        )
    return b"retry: %d\n" % retry


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encode_utf8(where: str, text: str) -> bytes:
    try:
        return str.encode(text)  # a subclass may have another encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} contains a lone surrogate at character {error.start}, which "
            "UTF-8 cannot encode. Decode the text with its real charset, or replace "
            "the character"
        ) from None


def _reject_bytes(where: str, data: Any) -> None:
    if isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            f"{where} must be text or a JSON value, got {type(data).__name__}. Decode "
            "it to a str"
        )
