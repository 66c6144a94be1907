"""Channels of many processes: the back end of ``redis://``.

Rule: a process reads by one connection and on one thread, while somebody listens, for
all that listen. When the server goes away they wait; when it is back, they go on where
they were, or are told that they cannot.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from ...core.options import clock
from ...core.report import log
from ...formats.sse import Event
from ..history import BEAT, Feed, Key, Start, follow, opened, reset
from ._redis_streams import Streams, id_of, key_of

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ImportError(
        "the option tgstream.channels names a Redis or a Valkey, and the package redis "
        "is not installed: pip install 'tgstream[redis]'"
    ) from error

FAILURES = redis.RedisError, OSError
BLOCK = 1.0
"""Seconds that the server lets a read wait; it is asked again then."""
PATIENCE = 5.0
"""Seconds after which a server that says nothing is taken for gone."""
PAUSE = 0.05, 1.0
"""Seconds between two attempts to reach it: the first, and the longest."""
CONNECTIONS = 8
"""What may publish, or come back, at once; others wait for their turn."""


class Redis:
    """The channels of a Redis or a Valkey, in this process.

    :param url: as the package redis reads it.
    :param history: how many events of a channel are kept, there and here.
    """

    def __init__(self, url: str, history: int) -> None:
        self._url = url
        self._history = history
        pool = redis.BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=PATIENCE, **_manners()
        )
        self._streams = Streams(redis.Redis(connection_pool=pool))
        self._feeds: WeakValueDictionary[str, Feed] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._looking_back = threading.Lock()
        self._reading = self._lost = False
        self._client_id: int | None = None  # of the connection that reads

    def publish(
        self, channel: str, text: str, event: str | None, data: bytes | None = None
    ) -> None:
        """Hand an event to all who listen, in whatever process."""
        said = text if data is None else data
        self._streams.add(channel, said, event, self._history)

    # Listeners.

    def listen(self, channel: str, after: str | None, beat: float) -> Iterator[Event]:
        """What a listener is sent; while the server is away, a comment at times."""
        try:
            return follow(self._start(channel, after, beat), beat)
        except FAILURES:
            return self._listen_late(channel, after, beat)

    def _listen_late(
        self, channel: str, after: str | None, beat: float
    ) -> Iterator[Event]:
        """What a listener is sent that came while the server was away."""
        yield opened(None)
        until = clock() + beat
        while True:
            try:
                # What it has missed by now nobody knows, without an id.
                start = self._start(channel, after or "", beat)
                break
            except FAILURES as error:
                self._tell_lost(error)
                if clock() > until:
                    yield BEAT
                    until = clock() + beat
                time.sleep(min(PAUSE[1], beat))
        yield from follow(start, beat)

    def _start(self, channel: str, after: str | None, beat: float) -> Start:
        feed = self._feed(channel)
        number, newest = feed.now()
        if after is None:
            return Start(feed, number, [opened(id_of(newest))])
        place = key_of(after)
        if place is not None:
            found = feed.number_after(place, exact=True)
            if found is None and place < feed.floor:
                if not self._look_back(feed, channel, place):
                    return self._gap(feed)
                found = feed.number_after(place, exact=True)
                if found is None:  # more than is kept here
                    return Start(None, 0, self._read_up(feed, channel, place, beat))
            if found is None and place > newest:
                found = self._catch_up(feed, channel, place)
            if found is not None:
                return Start(feed, found, [opened(after)])
        return self._gap(feed)

    def _gap(self, feed: Feed) -> Start:
        number, newest = feed.now()
        return Start(feed, number, [opened(None), reset(id_of(newest))])

    def _look_back(self, feed: Feed, channel: str, place: Key) -> bool:
        """Read what came after a place into the feed, for all who missed it.

        :returns: whether the server has all of it; the feed has what fits.
        """
        # One reads, and the others wait for that, but not forever.
        waited = self._looking_back.acquire(timeout=PATIENCE)
        try:
            if feed.number_after(place, exact=True) is not None:
                return True
            # One more: the place before the oldest that fits.
            floor, count = feed.floor, self._history + 1
            older = self._streams.newest_between(channel, place, floor, count)
            # Asked afterwards: what is whole now was whole when it was read.
            if not self._streams.has_all_after(channel, place):
                return False
            if len(older) == count:
                (place, _), *older = older
            feed.extend_back(place, floor, older)
            return True
        finally:
            if waited:
                self._looking_back.release()

    def _read_up(
        self, feed: Feed, channel: str, place: Key, beat: float
    ) -> Iterator[Event]:
        """What the feed does not keep, a few at a time, and then the feed's.

        It ends where something is missing: the client then reconnects, and gets reset.
        """
        yield opened(id_of(place))
        while (number := feed.number_after(place, exact=True)) is None:
            try:
                page = deque(self._streams.page(channel, place))
                if not page or not self._streams.has_all_after(channel, place):
                    return
            except FAILURES:
                return
            while page:
                place, event = page.popleft()
                yield event
                del event
        yield from follow(Start(feed, number), beat)

    def _catch_up(self, feed: Feed, channel: str, place: Key) -> int | None:
        """The number after a place that the thread here has not come to yet."""
        if not self._streams.has_all_after(channel, place):
            return None
        for key, event in self._streams.between(channel, feed.last, None):
            feed.append(key, event)
        return feed.number_after(place, exact=True)

    # The thread that reads.

    def _feed(self, channel: str) -> Feed:
        feed = self._feeds.get(channel)
        if feed is None:
            made = Feed(self._streams.newest(channel), self._history)
            with self._lock:
                feed = self._feeds.setdefault(channel, made)
                self._read_on()
            self._wake()
        return feed

    def _read_on(self) -> None:
        if not self._reading:
            threading.Thread(
                target=self._run, name="tgstream-channels", daemon=True
            ).start()
            self._reading = True

    def _wake(self) -> None:
        """Have the thread ask for a new channel at once; else it does within BLOCK."""
        if self._client_id is not None:
            with suppress(*FAILURES):
                self._streams.client.client_unblock(self._client_id)

    def _run(self) -> None:
        streams, pause = None, PAUSE[0]
        while feeds := self._listened_to():
            try:
                if streams is None:
                    streams = self._connect()
                    self._mend(streams, feeds)
                    self._tell_back()
                    pause = PAUSE[0]
                self._read(streams, feeds)
            except Exception as error:  # it is for all that listen, and must not end
                self._close(streams)
                self._tell_lost(error)
                streams = None
                feeds.clear()
                time.sleep(pause)
                pause = min(pause * 2, PAUSE[1])
            feeds.clear()  # so that those that nobody listens to are gone
        self._close(streams)

    def _listened_to(self) -> dict[str, Feed]:
        """The channels that somebody listens to; none, and the thread is to end."""
        with self._lock:
            known = self._feeds.valuerefs()  # a list: listeners may leave meanwhile
            feeds = {each.key: feed for each in known if (feed := each()) is not None}
            self._reading = bool(feeds)
            return feeds

    def _connect(self) -> Streams:
        client: Any = redis.Redis.from_url(
            self._url, single_connection_client=True, **_manners(BLOCK)
        )
        self._client_id = client.client_id()
        return Streams(client)

    def _tell_lost(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            log.warning(
                "the server of tgstream.channels is lost, and who listens waits until "
                "it is back: %s",
                error,
            )

    def _tell_back(self) -> None:
        if self._lost:
            self._lost = False
            log.warning("the server of tgstream.channels is back")

    def _close(self, streams: Streams | None) -> None:
        self._client_id = None
        if streams is not None:
            with suppress(*FAILURES):
                streams.client.close()

    def _mend(self, streams: Streams, feeds: dict[str, Feed]) -> None:
        """Tell those whose events the server has lost while it was away."""
        for channel, feed in feeds.items():
            if not streams.has_all_after(channel, feed.last):
                newest = streams.newest(channel)
                feed.restart(newest, reset(id_of(newest)))

    def _read(self, streams: Streams, feeds: dict[str, Feed]) -> None:
        places = {channel: feed.last for channel, feed in feeds.items()}
        for channel, entries in streams.wait(places, BLOCK).items():
            newest, feed = entries[-1][0], feeds[channel]
            if not streams.has_all_after(channel, places[channel]):
                feed.restart(newest, reset(id_of(newest)))
                continue
            for key, event in entries:
                feed.append(key, event)


def reach(url: str) -> None:
    """Ask the server whether it is there.

    :raises Exception: of the package redis, or of the system, when it does not answer.
    """
    client: Any = redis.Redis.from_url(url, **_manners())
    with client:
        client.ping()


def _manners(waits: float = 0.0) -> dict[str, Any]:
    """How a server is spoken to: nothing twice, and not for ever."""
    return {
        "protocol": 2,
        "socket_connect_timeout": PATIENCE,
        "socket_timeout": PATIENCE + waits,
        "retry": Retry(NoBackoff(), 0),
    }
