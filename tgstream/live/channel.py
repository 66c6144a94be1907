"""Named channels: a request publishes an event, and streams of other requests send it.

A channel is only a name. The option ``tgstream.channels`` determines the back end that
stores its events. It is read from the running application each time a channel is used,
so that modules can create channels at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import tg

from ..core import context as _context
from ..core.errors import StreamError
from ..core.heartbeat import shorten_wait
from ..core.report import log
from ..core.settings import read_option
from ..database.on_commit import send_on_commit
from ..formats.sse import Event, Message, check_event_type, encode_data
from .backends import DATABASE, create_backend
from .listener import INVALID_ID, without_comments
from .listener import listen as listen_to_one
from .merged import listen_to_all
from .places import MAX_LENGTH, read_position
from .protocols import Backend, ChannelSettings, ConnectionLost

_WARNED = "tgstream.told_of_memory"


@dataclass(frozen=True, slots=True, repr=False)
class Channel:
    """A named channel of events. Any stream can listen to it.

    .. code-block:: python

        orders = Channel("orders")

    Create one wherever you need it. Channels with the same name are equal, and are the
    same channel. A channel does not check who publishes or listens: your controllers
    must do that. If a channel is for one user, do not let users choose its name.

    :param name: 1 to 256 characters, without CR, LF or NUL.
    :raises TypeError: if the name is not a ``str``.
    :raises ValueError: if the name is not valid.
    """

    name: str

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str):
            raise TypeError(
                f"Channel name must be a str, got {type(name).__name__}: {name!r:.80}"
            )
        if not _is_short_line(name):
            raise ValueError(
                f"Channel name must be 1 to {MAX_LENGTH} characters without CR, LF or "
                f"NUL, got {len(name)} characters: {name!r:.80}"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                "Channel name must not contain a lone surrogate, which UTF-8 cannot "
                f"encode, got {name!r:.80}"
            ) from None

    def __repr__(self) -> str:
        return f"Channel({self.name!r})"

    def publish(self, data: Any, event: str | None = None, now: bool = False) -> None:
        """Send an event to all listeners when the transaction commits.

        That is the transaction of the stream, of the request, of the thread, or of the
        application's session. Without a transaction, and in the hook
        ``tgstream.finished``, the event is sent at once. The event is encoded in this
        call, so that invalid data raises here.

        :param data: the data of the event: a ``str`` as it is, anything else as JSON.
        :param event: its type, by which browsers choose their handlers. None means
            ``message``. Do not use ``reset``: :meth:`listen` reports gaps by it.
        :param now: send the event at once, even if the transaction aborts later.
        :raises TypeError: if ``data`` is bytes, if JSON cannot encode it, or if
            ``event`` is not a ``str``.
        :raises ValueError: if an event cannot contain ``data`` or ``event``.
        """
        encoded = encode_data(data, f"data published to {self!r}")
        check_event_type(event)
        text, is_json = encoded.decode(), not isinstance(data, str)
        message = Message(self.name, text, event, is_json, encoded)
        _warn_without_application()
        backend = _running_backend()
        if now or not send_on_commit(message, backend):
            backend.publish([message])

    def listen(
        self,
        after: str | None = None,
        since: float | None = None,
        comments: bool = True,
    ) -> Iterator[Event]:
        """The events of the channel, for a stream with ``SSE``.

        It is :func:`tgstream.listen` for one channel.
        """
        return _listen((self.name,), after, since, comments)

    def position(self) -> str:
        """The id of the newest event, for a page that then listens after it.

        It is :func:`tgstream.position` for one channel.
        """
        return position(self)


def listen(
    *channels: str | Channel,
    after: str | None = None,
    since: float | None = None,
    comments: bool = True,
) -> Iterator[Event]:
    """The events of one or several channels as one stream, for ``SSE``.

    .. code-block:: python

        return listen("orders", "chat", after=last_event_id())

    It contains every event that is published after this call, in the order of its
    channel. ``channel`` of an event is the name of its channel, ``data`` is always a
    ``str``, and ``id`` holds the place in all channels. The stream begins with a
    comment, and sends a comment after ``tgstream.heartbeat_seconds`` without an event.
    If the client falls so far behind that the next event of a channel is no longer
    stored, the stream ends, and the browser reconnects.

    :param channels: channels, or their names.
    :param after: the id of the last event that the client received, from
        :func:`last_event_id`, or of :func:`position`. The events that were published
        since then are sent first. If some events of a channel may be missing, an event
        of the type ``reset`` is sent instead, whose ``data`` is the name of the
        channel: the page must then reload this data. None begins with new events.
    :param since: maximum age of these events in seconds. If an older event would be
        sent, a ``reset`` is sent instead. None for the history of the channel.
    :param comments: False for a generator that chooses among the events, and would
        otherwise have to pass on the comments. The stream must have a heartbeat of its
        own, ``SSE(heartbeat=15)``, which sends the comments instead. The response
        begins when the generator takes the first event.
    :raises TypeError: if no channel is given, or a parameter has a wrong type.
    :raises ValueError: if a name or ``since`` is not valid.
    """
    return _listen(_find_names("listen", channels), after, since, comments)


def position(*channels: str | Channel) -> str:
    """The place of the newest events of one or several channels.

    Call it before you read the data of a page, and begin the page's ``EventSource``
    there, by the query parameter ``lastEventId``. Then the page misses no event that is
    published while it is loaded.

    :param channels: those of the :func:`listen` that the page uses, in any order.
    :returns: an id for ``listen(after=...)``: letters, digits and ``-_.~``. While the
        server of ``tgstream.channels`` cannot be reached, it is an id that causes a
        ``reset``.
    :raises TypeError: if no channel is given, or a name is not a ``str``.
    :raises ValueError: if a name is not valid.
    """
    names, backend = _find_names("position", channels), _running_backend()
    if len(names) > 1:
        return read_position(backend, names)
    try:
        return backend.position(*names) or INVALID_ID
    except ConnectionLost:
        return INVALID_ID


def _find_names(where: str, channels: tuple[str | Channel, ...]) -> tuple[str, ...]:
    """The names of channels, each once."""
    if not channels:
        raise TypeError(f"{where}() needs at least one channel, or the name of one")
    names = [
        each.name if isinstance(each, Channel) else Channel(each).name
        for each in channels
    ]
    return tuple(dict.fromkeys(names))


def _listen(
    names: tuple[str, ...], after: str | None, since: float | None, comments: bool
) -> Iterator[Event]:
    if not isinstance(after, str | None):
        raise TypeError(
            f"listen(): after must be a str or None, got {type(after).__name__}: "
            f"{after!r:.80}. Pass the result of last_event_id()"
        )
    if since is not None and not (
        isinstance(since, int | float) and 0 < since < float("inf")
    ):
        raise ValueError(
            f"listen(): since must be a number of seconds > 0 or None, got {since!r}"
        )
    seconds = read_option(tg.config, "tgstream.heartbeat_seconds")
    if not comments:
        seconds = shorten_wait(seconds)
    backend = _running_backend()
    if len(names) == 1:
        events = listen_to_one(backend, *names, after, seconds, since)
    else:
        events = listen_to_all(backend, names, after, seconds, since)
    return events if comments else without_comments(events)


def last_event_id() -> str | None:
    """The id of the last event that the client received.

    Browsers send the id in the header ``Last-Event-ID`` when they reconnect. Polyfills
    that cannot set headers send it in the query parameter ``lastEventId``. A client can
    forge it, so do not trust it. ``Channel.listen(after=...)`` accepts any id.

    :returns: 1 to 256 characters without CR, LF or NUL. None if the client sent no id,
        or an invalid one.
    :raises StreamError: outside of a request.
    """
    try:
        request = _context.current().request
    except TypeError:
        raise StreamError(
            "last_event_id() needs a running request. Call it in a controller, or in "
            "the generator of its stream"
        ) from None
    try:
        # WSGI decodes headers as latin-1, but browsers send UTF-8.
        id = request.headers.get("Last-Event-ID", "").encode("latin-1").decode()
        id = id or request.GET.get("lastEventId", "")
    except ValueError:  # the base class of UnicodeError
        return None
    return id if _is_short_line(id) else None


def _is_short_line(text: str) -> bool:
    """True if a text is a possible name of a channel, or a possible event id."""
    return 0 < len(text) <= MAX_LENGTH and not any(char in text for char in "\r\n\0")


_backends: dict[tuple[Any, ...], Backend] = {}

_SETTINGS = (
    "tgstream.channels",
    "tgstream.channel_history",
    "tgstream.channel_seconds",
    "tgstream.channel_backlog",
    "tgstream.publish_timeout",
    "tgstream.channel_poll_seconds",
    "tgstream.channel_listen_url",
)
"""The options of channels: the URL, and the fields of ``ChannelSettings``."""


def _running_backend() -> Backend:
    """The back end of the running application."""
    config = tg.config
    values = tuple([config.get(name) for name in _SETTINGS])
    try:
        url, settings = _read_settings(values)
    except TypeError:  # an invalid value that has no hash
        url, settings = _read_settings.__wrapped__(values)
    if url == DATABASE:
        # Imported only when used: it needs SQLAlchemy.
        from .backends.database import find_backend

        return find_backend(config, settings)
    _warn_of_multiple_processes(url)
    key = os.getpid(), url, settings  # a forked process needs its own back end
    # setdefault(), so that two threads get the same back end.
    return _backends.get(key) or _backends.setdefault(
        key, create_backend(url, settings)
    )


@lru_cache(64)
def _read_settings(values: tuple[Any, ...]) -> tuple[str, ChannelSettings]:
    given = zip(_SETTINGS, values, strict=True)
    config = {name: value for name, value in given if value is not None}
    url, *settings = [read_option(config, name) for name in _SETTINGS]
    return url, ChannelSettings(*settings)


@cache
def _warn_without_application() -> None:
    """Warn, once in a process, that no other process receives its events."""
    if "tg.configurator" not in tg.config and "tgstream.channels" not in tg.config:
        log.warning(
            "publish() was called without a loaded application, so tgstream.channels "
            "is memory:// and no other process receives the event. Load the "
            "application first, for example with paste.deploy.loadapp()"
        )


def _warn_of_multiple_processes(url: str) -> None:
    """Warn, once in an application, that other processes do not receive its events."""
    try:
        tg_locals = _context.current()
    except TypeError:
        return
    config = tg_locals.config
    if url != "memory://" or config.get(_WARNED):
        return
    if tg_locals.request.environ.get("wsgi.multiprocess"):
        config[_WARNED] = True
        log.warning(
            "The server runs several processes, but tgstream.channels is memory://, so "
            "other processes do not receive the events of this one. Set it to "
            "redis://host:6379/0 (Redis or Valkey) or database://, or run one process"
        )
