"""The events that this process sends to Redis, and keeps while Redis is lost.

All events of a process are sent in one order, over one connection. They are appended to
a queue. A thread that holds the lock sends the first events of the queue, also those
that other threads have appended, and removes them when it has the answers:

- As a rule this is the thread that publishes. Other threads that publish meanwhile wait
  for the lock.
- If there is no connection, or if it fails, a thread of its own connects and empties
  the queue. It is the *sender*, and exists only until then. Its first attempt begins
  with the lock of the thread that started it, so that publishers wait for the result.
- No publisher waits longer than ``tgstream.publish_timeout``, whatever DNS or the
  server do. When it gives up, or after an attempt of the sender that fails, the server
  counts as lost: publishers append their events, and do not wait.

A thread that appends events and does not wait sets ``_is_left``. Each thread checks it
after it has released the lock, and starts a sender if events are left. So no event
stays in the queue, whichever of the two comes first.

A finaliser may publish between any two byte codes, as ``tgstream.live.history``
explains. It may interrupt a thread that holds the lock or waits for it. It then only
appends its events.

If more than ``tgstream.channel_backlog`` events wait, the newest are dropped, and their
channels receive a reset when all others are sent. Until then, further events of these
channels are dropped too: the reset covers them.
"""

from __future__ import annotations

import _thread
import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakSet

import redis

from ...core.options import clock
from ...core.report import log
from ...formats.sse import Message
from ..observation import report_backlog, report_reconnect
from ..protocols import ChannelSettings
from .redis_connection import CONNECTION_ERRORS, create_pool, explain_refusal
from .redis_script import Names
from .redis_sender import EventSender, OutgoingEvent

ATTEMPT_SECONDS = 5.0
"""Maximum seconds of the sender to connect, and to send some events."""
MIN_PAUSE = 0.05
MAX_PAUSE = 0.5
"""Seconds between two attempts of the sender. They double from the minimum on."""
MAX_EVENTS = 1000
MAX_BYTES = 262_144
"""The number and the size of events that are sent at once."""
MAX_NAMES = 20
"""Maximum number of channels that one log line names."""


class RedisPublisher:
    """Sends the events of this process.

    :param url: the URL of the server.
    :param settings: the options of the application.
    """

    def __init__(self, url: str, settings: ChannelSettings) -> None:
        self._url = url
        self._settings = settings
        self._seconds = min(settings.publish_timeout, threading.TIMEOUT_MAX)
        # It raises if the URL is not valid.
        self._names = Names.of(create_pool(url, ATTEMPT_SECONDS))
        self._known_ids: dict[str, bytes] = {}
        self._clear()
        _publishers.add(self)

    def _clear(self) -> None:
        self._queue: deque[OutgoingEvent] = deque()
        self._resets: dict[str, None] = {}  # the channels that must receive a reset
        self._connection: EventSender | None = None
        self._lost_connection: EventSender | None = None
        self._lock = threading.Lock()
        # The threads (with gevent, the greenlets) that hold the lock or wait for it.
        self._threads: set[int] = set()
        self._sender_runs = False
        self._is_left = False
        # When the publishers stop to wait. In the past while the server is lost.
        self._give_up_at = float("inf")
        self._outage: Exception | None = None

    # Publishers.

    def publish(self, messages: Sequence[Message]) -> None:
        """Send events at once, in order, after those that are kept.

        :raises redis.RedisError: if the server refuses an event, or does not answer. In
            the second case it may have received the events.
        """
        if threading.get_ident() in self._threads:  # a finaliser, which must not wait
            self.publish_committed(messages)
            return
        events = [OutgoingEvent(message, is_kept=False) for message in messages]
        if not self._is_lost():
            self._queue.extend(events)
            try:
                self._send(events)
                is_sent = all(event.is_done for event in events)
            finally:
                for event in events:
                    event.is_done = True
            for event in events:
                if event.error is not None:
                    raise event.error
            if is_sent:
                return
        raise redis.ConnectionError(
            f"Redis (tgstream.channels) does not answer: {self._outage or 'timeout'}"
        ) from self._outage

    def publish_committed(self, messages: Sequence[Message]) -> None:
        """Send the events of a transaction, or keep them until the server is back."""
        resets = self._resets
        events = [
            OutgoingEvent(message, is_kept=True)
            for message in messages
            if message.channel not in resets
        ]
        self._queue.extend(events)
        if self._is_lost():
            self._limit_backlog()
        self._send(events)

    @property
    def backlog(self) -> int:
        """The number of events that are kept while the server is lost."""
        return 0 if self._outage is None else len(self._queue)

    def _is_lost(self) -> bool:
        return self._give_up_at <= clock()

    def _send(self, events: Sequence[OutgoingEvent]) -> None:
        """Wait until events of the queue are sent, but not longer than the limit."""
        deadline, this_thread = clock() + self._seconds, threading.get_ident()
        if this_thread in self._threads:  # a finaliser
            self._is_left = True
            self._start_sender_if_needed()
            return
        self._threads.add(this_thread)
        try:
            while not all(event.is_done for event in events):
                if not self._acquire(min(deadline, self._give_up_at) - clock()):
                    break
                self._use_lock(deadline)
        finally:
            if not all(event.is_done for event in events):
                self._is_left = True
            self._start_sender_if_needed()
            self._threads.discard(this_thread)

    def _acquire(self, seconds: float) -> bool:
        try:
            return seconds > 0 and self._lock.acquire(timeout=seconds)
        except Exception:  # a finaliser in the hub of gevent, which must not wait
            return False

    def _use_lock(self, deadline: float) -> None:
        """Send the first events, and release the lock or pass it to the sender."""
        is_passed = False
        try:
            if self._connection is None or not self._try_to_send(deadline):
                is_passed = not self._sender_runs
        finally:
            if not is_passed:
                self._lock.release()
        if is_passed:
            self._start_sender(deadline)

    def _try_to_send(self, deadline: float) -> bool:
        try:
            self._send_first_events(deadline)
        except redis.TimeoutError as error:
            self._note_outage(error)
        except Exception:  # often only this connection is lost: the sender will see
            pass
        else:
            return True
        return False

    # The first events of the queue, for the thread that has the lock.

    def _send_first_events(self, deadline: float) -> None:
        """Send some events over the connection. If it fails, close it and raise."""
        events = self._first_events()
        try:
            if events and self._connection is not None:
                self._connection.send(events, deadline)
        except BaseException:
            self._disconnect()
            raise
        finally:
            while self._queue and self._queue[0].is_done:
                self._queue.popleft()
            for event in events:
                if event.error is not None and event.is_kept:
                    channel = event.message.channel
                    log.error(
                        "Redis refused an event of Channel(%r): %s",
                        channel,
                        explain_refusal(event.error, self._names.key(channel)),
                    )

    def _first_events(self) -> list[OutgoingEvent]:
        events, size = [], 0
        for event in list(self._queue):  # other threads append meanwhile
            if not event.is_done:
                events.append(event)
                size += len(event.message.text)
                if len(events) == MAX_EVENTS or size > MAX_BYTES:
                    break
        return events

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lost_connection = connection
            with suppress(*CONNECTION_ERRORS):
                connection.close()

    def _note_outage(self, error: Exception) -> None:
        if self._outage is None:
            log.warning(
                "Cannot send events to Redis (tgstream.channels): %s. They are kept, "
                "and sent when it is back",
                str(error).rstrip("."),
                exc_info=not isinstance(error, CONNECTION_ERRORS),  # a fault of ours
            )
            atexit.unregister(self.close)
            atexit.register(self.close)
        self._outage = error
        self._give_up_at = float("-inf")
        self._limit_backlog()

    def _note_recovery(self) -> None:
        self._give_up_at = float("inf")
        if self._outage is not None:
            self._outage = None
            log.info("Events are sent to Redis again (tgstream.channels)")
            report_reconnect()
            report_backlog()

    def _limit_backlog(self) -> None:
        """Drop the newest events that are too many. It needs no lock."""
        while len(self._queue) > self._settings.backlog:
            event = self._queue.pop()
            if event.is_kept and not event.is_done:
                if not self._resets:
                    log.warning(
                        "More than %d events wait for Redis (tgstream.channel_backlog)."
                        " Further ones are dropped, and their listeners receive a "
                        "reset when it is back",
                        self._settings.backlog,
                    )
                event.is_done = True
                self._send_reset(event.message.channel)

    def _send_reset(self, channel: str) -> None:
        self._resets[channel] = None
        self._is_left = True

    def _queue_resets(self) -> None:
        for channel in list(self._resets):
            message = Message(channel, channel, "reset")  # as reset_event() has it
            self._queue.append(OutgoingEvent(message, is_kept=True))
            # After this, events of the channel are newer than its reset.
            self._resets.pop(channel, None)

    # The sender: a thread.

    def _start_sender_if_needed(self) -> None:
        if self._is_left and not self._sender_runs and (self._queue or self._resets):
            if not self._lock.acquire(blocking=False):
                return  # the thread that has the lock checks it, too
            if self._sender_runs:
                self._lock.release()
            else:
                self._start_sender(clock() + self._seconds)

    def _start_sender(self, deadline: float) -> None:
        """Start the sender, which gets the lock of this thread.

        :param deadline: when the server counts as lost, unless the sender reaches it.
        """
        self._sender_runs = True
        self._give_up_at = min(self._give_up_at, deadline)
        try:
            # threading.Thread has locks inside, which a finaliser must not wait for.
            _thread.start_new_thread(self._run_sender, ())
        except RuntimeError:  # no more threads, because the process ends
            self._attempt(self._seconds)
            self._sender_runs = False
            self._give_up_at = float("inf")  # the next publisher tries again
            self._lock.release()

    def _run_sender(self) -> None:
        this_thread, pause = threading.get_ident(), MIN_PAUSE
        self._threads.add(this_thread)
        try:
            while not self._attempt(ATTEMPT_SECONDS):
                self._lock.release()
                time.sleep(pause)
                pause = min(pause * 2, MAX_PAUSE)
                self._lock.acquire()
            self._sender_runs = False
            self._lock.release()
        finally:
            self._start_sender_if_needed()
            self._threads.discard(this_thread)

    def _attempt(self, seconds: float) -> bool:
        """Send all events of the queue, and then the resets.

        :param seconds: maximum time to connect, and to send some events.
        :returns: False if the server cannot be reached.
        """
        self._is_left = False
        try:
            while self._queue or self._resets:
                if not self._queue:
                    self._queue_resets()
                if self._connection is None:
                    self._connection = self._connect(seconds)
                self._send_first_events(clock() + seconds)
                self._note_recovery()
        except Exception as error:  # all events depend on this thread
            self._note_outage(error)
            return False
        self._give_up_at = float("inf")
        return True

    def _connect(self, seconds: float) -> EventSender:
        connection = EventSender(
            create_pool(self._url, seconds),
            self._settings,
            self._known_ids,
            self._send_reset,
            self._lost_connection,
        )
        self._lost_connection = None
        return connection

    # The end of the process.

    def close(self) -> None:
        """Try once more to send the events that are kept, and log what remains."""
        if self._queue or self._resets:
            self._threads.add(threading.get_ident())
            # The sender may be in the middle of an attempt.
            if self._acquire(ATTEMPT_SECONDS + self._seconds):
                self._attempt(self._seconds)
                self._lock.release()
            self._threads.discard(threading.get_ident())
            self._log_remaining()
            self._queue.clear()
            self._resets.clear()

    def _log_remaining(self) -> None:
        events = [event for event in self._queue if not event.is_done]
        channels = {event.message.channel: None for event in events} | self._resets
        if channels:
            names = [repr(name) for name in channels][: MAX_NAMES + 1]
            names[MAX_NAMES:] = ["..."] * (len(names) > MAX_NAMES)
            log.error(
                "The process ends while Redis (tgstream.channels) is lost: %s. %d kept "
                "events may be lost, and listeners of these channels receive no reset:"
                " %s",
                str(self._outage).rstrip("."),
                len(events),
                ", ".join(names),
            )


_publishers: WeakSet[RedisPublisher] = WeakSet()


def _clear_publishers() -> None:
    """Let a forked process begin again. The events are those of its parent."""
    for publisher in list(_publishers):
        publisher._clear()


os.register_at_fork(after_in_child=_clear_publishers)
