"""Channels: what is published in one request is heard in the streams of all others.

Rule: a channel is a name; where its events are kept is the application's to say, by
the option ``tgstream.channels``, when the channel is used and not when it is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import tg

from ..core import context as _context
from ..core.report import log
from ..core.settings import option
from ..database.on_commit import send_on_commit
from ..formats.sse import Event, check_type, encoded
from .backends.memory import Memory

__all__ = ["Channel"]

LONGEST = 256
REDIS = "redis://", "rediss://", "unix://"
"""How a URL begins that names a Redis or a Valkey."""
OWN = {"protocol", "decode_responses", "encoding", "encoding_errors"} | {
    *("socket_timeout", "socket_connect_timeout", "max_connections", "timeout"),
    *("retry_on_timeout", "retry_on_error", "single_connection_client"),
}
"""What a URL may not say behind its ``?``, for it is tgstream's to say."""
_TOLD = "tgstream.told_of_memory"


class Channel:
    """A named channel of events, which any stream may listen to.

    .. code-block:: python

        orders = Channel("orders")

    Make one where you need it, as often as you like: those of one name are one channel.
    Who may publish and who may listen is for your controllers to say, so give a user's
    own channel a name that nobody chooses but you.

    :param name: up to 256 characters, without CR, LF or NUL.
    :raises TypeError: when the name is no text.
    :raises ValueError: when it cannot be a name.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"Channel: {name!r:.80} is no text; give its name as a str")
        if not 0 < len(name) <= LONGEST or any(each in name for each in "\r\n\0"):
            raise ValueError(
                f"Channel: {name!r:.80} cannot be a name; it is 1 to {LONGEST} "
                "characters, without CR, LF or NUL"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"Channel: {name!r:.80} has a lone surrogate, which UTF-8 cannot say"
            ) from None
        self.name = name

    def __repr__(self) -> str:
        return f"Channel({self.name!r})"

    def publish(self, data: Any, event: str | None = None, now: bool = False) -> None:
        """Send an event to all who listen, when the transaction commits.

        In a request of TurboGears with ``tm.enabled``, and in a running stream, it goes
        out when the transaction commits, and only then; elsewhere at once, also in the
        hook ``tgstream.finished``. It is encoded here, so that what cannot be sent is
        refused here.

        :param data: what the event says: a ``str`` as it is, anything else as JSON.
        :param event: its type, which listeners are registered for; None for
            ``message``. ``reset`` is what :meth:`listen` says of a gap.
        :param now: send it at once, whatever becomes of the transaction.
        :raises TypeError: when ``data`` is bytes or has no JSON, or ``event`` is no
            text.
        :raises ValueError: when one of them cannot be said in an event.
        """
        encoded_data = encoded(data, f"what is published to {self!r}")
        check_type(event)
        text = data if type(data) is str else encoded_data.decode()
        _warn_of_script()
        publish = partial(_hub().publish, self.name, text, event, encoded_data)
        if now:
            publish()
        else:
            send_on_commit(f"an event of {self!r}", publish)

    def listen(self, after: str | None = None) -> Iterator[Event]:
        """The events of the channel, as they come, for a stream with ``SSE``.

        What is published from this call on is in it. It begins with a comment, and
        says another when nothing was sent for ``tgstream.heartbeat_seconds``; it ends
        when the client is so far behind that its next event is kept no more, and the
        client then comes back by itself. ``data`` of an event is text.

        :param after: the id of the last event that the client has had, which
            :func:`last_event_id` knows; None to begin now. What was published since is
            sent first. Where the channel cannot tell that it has all of it, there is
            ``Event('', event='reset')`` instead, and it goes on from now: the client
            then reads anew what it shows.
        :raises TypeError: when ``after`` is no text.
        """
        if not isinstance(after, str | None):
            raise TypeError(
                f"{self!r}: after={after!r:.80} is no text; give what last_event_id() "
                "returns"
            )
        beat = option(tg.config, "tgstream.heartbeat_seconds")
        return _hub().listen(self.name, after, beat)


class Hub(Protocol):
    """A back end: where the channels of a process get their events from."""

    def publish(
        self, channel: str, text: str, event: str | None, data: bytes | None = None
    ) -> None:
        """Hand an event to all who listen.

        :param data: the text in UTF-8, where it is there already.
        """

    def listen(self, channel: str, after: str | None, beat: float) -> Iterator[Event]:
        """What a listener is sent; after so many seconds of silence, a comment."""


_hubs: dict[tuple[int, str, int], Hub] = {}


def _hub() -> Hub:
    """The back end of the application that runs here."""
    url: str = option(tg.config, "tgstream.channels")
    history: int = option(tg.config, "tgstream.channel_history")
    _warn_of_processes(url)
    key = os.getpid(), url, history  # a forked process makes its own
    # Two threads that ask at once get the same.
    return _hubs.get(key) or _hubs.setdefault(key, _made(url, history))


def own_words(url: str) -> list[str]:
    """What the URL of a Redis says that is tgstream's to say."""
    return sorted(OWN & parse_qs(urlsplit(url).query, keep_blank_values=True).keys())


def shown_url(value: Any) -> str:
    """What names the server of a URL, without its password.

    Of what is no URL nobody knows where its password is: only its scheme is shown.
    """
    scheme, mark, rest = str(value).partition("://")
    if not mark or not _SCHEME(scheme):
        start = _SCHEME(scheme.partition(":")[0])
        return f"{start[0]}:..." if start and ":" in scheme else "..."
    netloc = re.split("[/?#]", rest)[0]
    place = rest.removeprefix(netloc)
    host = netloc.rpartition("@")[2]
    # Else it has a password in it, or behind it, that was not percent-encoded.
    if "@" in place or not re.fullmatch(r"(\[[0-9A-Fa-f:.]*\]|[^:\[\]]*)(:\d*)?", host):
        return f"{scheme}://..."
    return f"{scheme}://{host}{re.split('[?#]', place)[0]}"


_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]*").fullmatch


def check_password(url: str) -> None:
    """Refuse the URL of a Redis whose password was not percent-encoded.

    Its first part would be read as a host or a port, and be in messages.

    :raises ValueError: without any part of it.
    """
    if shown_url(url).endswith("..."):
        raise ValueError(
            f"the option tgstream.channels cannot be read: {shown_url(url)}; write "
            "redis://host:port/db, and percent-encode what is in a password"
        )


def _made(url: str, history: int) -> Hub:
    if url == "memory://":
        return Memory(history)
    if url.startswith(REDIS):
        check_password(url)
        if own := own_words(url):
            raise ValueError(
                f"the option tgstream.channels says {', '.join(own)} behind its '?', "
                "which tgstream sets itself; leave it out"
            )
        # Imported where it is asked for: the package redis is an extra.
        from .backends.redis import Redis

        return Redis(url, history)
    scheme = shown_url(url).partition(":")[0]  # all of it may hold a password
    raise ValueError(
        f"the option tgstream.channels begins with {scheme!r}, which is none of its "
        "kinds: memory://, or redis://host:port/db, rediss:// or unix:// for a Redis "
        "or a Valkey"
    )


@cache
def _warn_of_script() -> None:
    """Warn, once a process, that only this process hears what it publishes."""
    if "tg.configurator" not in tg.config and "tgstream.channels" not in tg.config:
        log.warning(
            "publish() was called where no application is loaded: tgstream.channels is "
            "memory:// there, and no other process hears it. Load the application "
            "before, as paste.deploy.loadapp() does"
        )


def _warn_of_processes(url: str) -> None:
    """Warn, once an application, that another process hears nothing of this one."""
    try:
        tg_locals = _context.current()
    except TypeError:
        return
    config = tg_locals.config
    if url != "memory://" or config.get(_TOLD):
        return
    if tg_locals.request.environ.get("wsgi.multiprocess"):
        config[_TOLD] = True
        log.warning(
            "the server runs several processes, and tgstream.channels is memory://: "
            "what is published in one is not heard in the others. Set it to "
            "redis://host:6379/0, a Redis or a Valkey, or run one process"
        )
