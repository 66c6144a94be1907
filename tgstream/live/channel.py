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
from ..core.report import log
from ..core.settings import read_option
from ..database.on_commit import send_on_commit
from ..formats.sse import Event, Message, check_event_type, encode_data
from .backends import DATABASE, create_backend
from .listener import listen
from .protocols import Backend, ChannelSettings

MAX_LENGTH = 256
"""Maximum number of characters of a channel's name and of an event id."""
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

        This applies to requests of TurboGears with ``tm.enabled``, and to running
        streams. Elsewhere, and in the hook ``tgstream.finished``, the event is sent at
        once. The event is encoded in this call, so that invalid data raises here.

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

    def listen(self, after: str | None = None) -> Iterator[Event]:
        """The events of the channel, for a stream with ``SSE``.

        It contains every event that is published after this call. It begins with a
        comment, and sends a comment after ``tgstream.heartbeat_seconds`` without an
        event. If the client falls so far behind that its next event is no longer
        stored, the stream ends, and the browser reconnects. ``data`` of an event is
        always a ``str``.

        :param after: the id of the last event that the client received, from
            :func:`last_event_id`. The events that were published since then are sent
            first. If some of them may be missing, ``Event('', event='reset')`` is sent
            instead: the page must then reload its data. None begins with new events.
        :raises TypeError: if ``after`` is neither a ``str`` nor None.
        """
        if not isinstance(after, str | None):
            raise TypeError(
                f"{self!r}.listen(): after must be a str or None, got "
                f"{type(after).__name__}: {after!r:.80}. Pass the result of "
                "last_event_id()"
            )
        heartbeat_seconds = read_option(tg.config, "tgstream.heartbeat_seconds")
        return listen(_running_backend(), self.name, after, heartbeat_seconds)


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
            "redis://host:6379/0 (Redis or Valkey), or run one process"
        )
