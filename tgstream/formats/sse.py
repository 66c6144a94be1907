"""Server-sent events: items in, the lines of an event stream out.

Rule: what an item says stands behind the name of its own field, on every line; text
that could begin a line of its own is split there, or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import TIMEOUT_MAX
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .json_encoder import Encoder, document


class _Made:
    """What is made of an event, and is no field of it: other formats write fields."""

    __slots__ = "_head", "_piece"
    _head: bytes
    _piece: bytes | None


@dataclass(frozen=True, slots=True)
class Event(_Made):
    """An event of an event stream, as :class:`SSE` sends it.

    The fields are those of the WHATWG's HTML standard, section 9.2. Browsers dispatch
    what has data, were it ``''``: do not expect a listener to hear
    ``Event(event='done')``. Without data, an ``id`` still sets the client's last event
    ID, and a ``retry`` its waiting time. ``Event()`` alone is an empty comment, which
    keeps a connection alive.

    :param data: what the event says: a ``str`` as it is, anything else as JSON; None
        for an event without data. Line breaks of every kind arrive as LF.
    :param event: its type, which listeners are registered for; None for ``message``.
    :param id: what a client that comes back sends as ``Last-Event-ID``; ``''`` makes
        it forget the last one. A whole number is sent as its digits.
    :param retry: whole milliseconds to wait before coming back.
    :param comment: a line that clients ignore.
    :raises TypeError: when ``event``, ``id`` or ``comment`` is no text, or data is
        bytes.
    :raises ValueError: when a field cannot be said in a line: CR, LF or NUL in
        ``event`` and ``id``, CR or LF in ``comment``, a lone surrogate in any text;
        and when ``retry`` is no whole number from 0 on.
    """

    data: Any = None
    event: str | None = None
    id: str | int | None = None
    retry: int | None = None
    comment: str | None = None

    def __post_init__(self) -> None:
        id: Any = self.id
        if _is_whole(id):
            id = str(int(id))
        head = (
            _line("comment", b": ", self.comment, b"\r\n")
            + _line("event", b"event: ", self.event, b"\r\n\0")
            + _line("id", b"id: ", id, b"\r\n\0")
            + _retry(self.retry)
        )
        if self.data is None:
            head = head or b":\n"
        elif isinstance(self.data, str):
            _utf8("Event: data", self.data)
        else:
            _refuse_bytes("Event: data", self.data)
        object.__setattr__(self, "_head", head)
        object.__setattr__(self, "_piece", None)

    if not TYPE_CHECKING:  # which would take any name for one of its

        def __getattr__(self, name: str) -> Any:
            if name not in _Made.__slots__:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            self.__post_init__()  # it is a copy, which is made of its fields alone
            return getattr(self, name)


class SSE:
    """Server-sent events, for a browser's ``EventSource``.

    Items are :class:`Event`, or the data of an event alone: a ``str`` is sent as it is,
    anything else as JSON (None is ``null``). Do not yield bytes. Each item leaves as it
    comes, after its writes are committed. A generator that will wait for its first
    event begins with ``yield Event(comment='open')``, after its checks.

    The stream is the one of the WHATWG's HTML standard, section 9.2
    (https://html.spec.whatwg.org/multipage/server-sent-events.html): always UTF-8, and
    it may end after any event.

    :param heartbeat: seconds after which a comment is sent where the generator has
        yielded nothing, so that proxies keep the connection and a client that left is
        noticed; None for none. The generator then runs on a thread of its own, with its
        request, session and transaction bound as ever. When the client has gone it is
        closed at its next yield: do not let it wait for ever. ``Channel.listen()``
        beats by itself, and needs no thread.
    :param retry: whole milliseconds that a browser waits before it comes back; they are
        sent with the first event. None for the browser's own.
    :raises ValueError: when one of them makes no sense.
    """

    content_type = "text/event-stream"
    charset = "utf-8"
    headers: Mapping[str, str] = MappingProxyType(
        # The second is nginx's, which else keeps events back until it has a block.
        {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    endless = True
    commit = "each"
    chunk_size = 0

    def __init__(
        self, heartbeat: float | None = None, retry: int | None = None
    ) -> None:
        if heartbeat is not None and not (
            isinstance(heartbeat, int | float) and 0 < heartbeat <= TIMEOUT_MAX
        ):
            raise ValueError(
                f"SSE: heartbeat={heartbeat!r} makes no sense; it is a number of "
                "seconds above 0, or None for none"
            )
        self.heartbeat = heartbeat
        self._first = b"" if retry is None else _retry(retry, "SSE") + b"\n"

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """The events, one piece for each of ``items``.

        :raises TypeError: when an item is bytes, or nothing that JSON can say.
        :raises ValueError: when it has a lone surrogate, or a number JSON cannot say.
        """
        # An open stream keeps what it has begun: no generator around another.
        pieces = self._pieces(items)
        return self._begun(pieces) if self._first else pieces

    def _begun(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield self._first + piece
            break
        yield from pieces

    def _pieces(self, items: Iterable[Any]) -> Iterator[bytes]:
        number, encoder = 0, None
        for item in items:
            number += 1
            head, data = b"", item
            if isinstance(item, Event):
                if item._piece is not None:
                    yield item._piece
                    continue
                head, data = item._head, item.data
                if data is None:
                    yield head + b"\n"
                    continue
            if encoder is None:  # not before: one that listens has no use for it
                encoder = Encoder()
            yield b"%b%b\n" % (head, _data_lines(_encoded(data, number, encoder)))


def encoded(data: Any, what: str) -> bytes:
    """The text that an event has for ``data``, in UTF-8.

    :param what: it is, for the error.
    :raises TypeError: when it is bytes, or nothing that JSON can say.
    :raises ValueError: when it has a lone surrogate, or what JSON cannot say.
    """
    try:
        if isinstance(data, str):  # for which no encoder is made
            return _utf8("item 1", data)
        return _encoded(data, 1, Encoder())
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what} cannot be an event: {error}") from error


def check_type(event: str | None) -> None:
    """Refuse a type that no event can have.

    :raises TypeError: when it is not a str.
    :raises ValueError: when it cannot be said in a line.
    """
    _line("event", b"event: ", event, b"\r\n\0")


class Message:
    """An event that many will be sent, but for its id: its lines are made here, once.

    :param text: its data.
    :param event: its type.
    :param data: the text in UTF-8, where it is there already.
    :raises TypeError: when the type is not a str.
    :raises ValueError: when the type or the text cannot be said in an event.
    """

    __slots__ = ("_data", "_event", "_head", "_text")

    def __init__(self, text: str, event: str | None, data: bytes | None = None) -> None:
        self._text, self._event = text, event
        self._head = _line("event", b"event: ", event, b"\r\n\0")
        self._data = _data_lines(_utf8("Event: data", text) if data is None else data)

    def sealed(self, id: str) -> Event:
        """The event with an id of ours, without a look at what was looked at before."""
        made, set = object.__new__(Event), object.__setattr__
        head = b"%bid: %b\n" % (self._head, id.encode())
        set(made, "data", self._text)
        set(made, "event", self._event)
        set(made, "id", id)
        set(made, "retry", None)
        set(made, "comment", None)
        set(made, "_head", head)
        set(made, "_piece", b"%b%b\n" % (head, self._data))
        return made


def sealed(text: str, event: str | None, id: str) -> Event:
    """An event that many will be sent: its piece is made here, and once."""
    return Message(text, event).sealed(id)


def _encoded(data: Any, number: int, encoder: Encoder) -> bytes:
    if isinstance(data, str):
        return _utf8(f"item {number}", data)
    _refuse_bytes(f"item {number}", data)
    return encoder.encode(document(data), number)


def _data_lines(text: bytes) -> bytes:
    """``data`` lines: they end where the standard ends a line, and nowhere else."""
    text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return b"data: %b\n" % text.replace(b"\n", b"\ndata: ")


def _line(name: str, start: bytes, value: Any, forbidden: bytes) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str):
        raise TypeError(f"Event: {name}={value!r:.80} is no text; give it a str")
    text = _utf8(f"Event: {name}", value)
    if any(byte in text for byte in forbidden):
        what = "CR, LF or NUL" if 0 in forbidden else "CR or LF"
        raise ValueError(
            f"Event: {name}={value!r:.80} has a {what} in it, and must be one line; "
            "take it out, or send such text as data"
        )
    return start + text + b"\n"


def _retry(retry: Any, where: str = "Event") -> bytes:
    if retry is None:
        return b""
    if not _is_whole(retry) or retry < 0:
        raise ValueError(
            f"{where}: retry={retry!r:.80} makes no sense; it is whole milliseconds, "
            "from 0 on"
        )
    return b"retry: %d\n" % retry


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _utf8(where: str, text: str) -> bytes:
    try:
        return str.encode(text)  # a subclass may have an encode() of its own
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has a lone surrogate at character {error.start}, which UTF-8 "
            "cannot say; decode the text rightly, or replace it"
        ) from None


def _refuse_bytes(where: str, data: Any) -> None:
    if isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(
            f"{where} is {type(data).__name__}, and an event stream is text; "
            "decode it to a str"
        )
