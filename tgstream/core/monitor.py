"""The monitor of the running streams: one thread of a process, while there are any.

It ends streams from outside: those whose ``max_seconds`` are over, whose client has
disconnected, that ``drain()`` ends, and those that Python's cyclic garbage collector
has dropped. It also runs the checks of streams that wait.

- The monitor looks at a stream when a look is due, whether a server pulls the stream or
  not. A pull pays nothing for it, and a stream that has ended is forgotten at once.
- The monitor's thread runs no code of a user and no call of a database. An end may run
  both, so that each end that the monitor begins has a short-lived thread of its own.
- A finaliser may run on any thread, between any two byte codes, also while that thread
  is in this module. It only sets an item of a ``dict`` and calls ``SimpleQueue.put()``,
  which is re-entrant and does not wait.
- The monitor's thread may be about to wait, or about to end, while a stream registers.
  ``_next_look`` is infinite while the thread looks, so that a stream that registers
  then wakes it. The thread reads the registry once more after it has noted its end.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .options import Plan, clock
from .report import EARLY

if TYPE_CHECKING:
    from .context import Context
    from .report import Reason

log = logging.getLogger("tgstream")

PAUSE = 0.05
"""Minimum seconds between two looks: many streams that are due share one look."""

PAUSE_PER_STREAM = 2e-5
"""Seconds that each stream adds to the pause: a look costs 0.2 us a stream."""

LINGER = 10.0
"""Seconds that the thread waits for another stream. To start it costs 100 us."""

FIRST_LOOK = 10.0
"""Maximum seconds until the first look at a stream."""

WAKE_PAUSE = 0.25
"""Seconds after which a generator that is to end is woken again. They double."""

LONGEST_WAKE_PAUSE = 1.0
"""Maximum seconds between two such attempts."""

LONGEST = 3600.0
"""Maximum seconds of one wait. A longer timeout can overflow."""


class Monitored(Protocol):
    """A running stream, as the monitor uses it."""

    plan: Plan
    context: Context
    expires: float
    closing: Reason | None
    reason: Reason | None
    departed: bool
    server_closes: bool

    @property
    def ended(self) -> bool: ...
    @property
    def idle(self) -> bool: ...
    def ask_to_end(self, reason: Reason, detail: str | None = None) -> bool: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
    def interrupt(self) -> None: ...
    def disown(self) -> None: ...


class _Entry(weakref.ref[Monitored]):
    """A stream that does not keep it, the time of its next look, and its last look."""

    __slots__ = ("due", "seen")

    due: float
    seen: Any


class Monitor:
    """The monitor of one process. Its thread starts with the first stream to watch.

    A forked process begins with an empty one.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all streams, and the thread: a forked process has none of them."""
        self.draining = False
        """Whether no stream may start any more. A part of ``core/draining``."""
        self._entries: dict[int, _Entry] = {}
        # Re-entrant: a finaliser may interrupt its holder.
        self._lock = threading.RLock()
        self._running = False
        self._next_look = float("inf")
        # Dropped streams to end, entries to look at, and None to wake the thread.
        self._queue: queue.SimpleQueue[Monitored | _Entry | None] = queue.SimpleQueue()

    def register(self, body: Monitored, now: float) -> None:
        """Count ``body`` among the running streams, until it has ended."""
        entry = _Entry(body)
        entry.seen = None
        seconds, plan = FIRST_LOOK, body.plan
        if plan.disconnect_check_seconds < seconds:
            seconds = plan.disconnect_check_seconds
        if 0 < plan.idle_transaction_seconds < seconds:
            seconds = plan.idle_transaction_seconds
        due = now + seconds
        entry.due = due if due < body.expires else body.expires
        self._entries[id(body)] = entry  # complete: the thread may look at once

    def forget(self, body: Monitored) -> None:
        """Count ``body`` no longer. It may be called from a finaliser."""
        self._entries.pop(id(body), None)

    def running(self) -> list[Monitored]:
        """The streams of this process that have not ended."""
        bodies = [entry() for entry in self._list()]
        return [body for body in bodies if body is not None and not body.ended]

    def _list(self) -> list[_Entry]:
        while True:
            with suppress(RuntimeError):  # another thread has registered one meanwhile
                return list(self._entries.values())

    def watch(self, body: Monitored) -> None:
        """Look at ``body``, which is registered, when a look is due.

        :raises RuntimeError: when no thread can be started.
        """
        if not self._running:
            self._start()
        entry = self._entries.get(id(body))
        if entry is not None and entry.due < self._next_look:
            self._queue.put(None)

    def look_soon(self, body: Monitored) -> None:
        """Wake the generator of ``body``, which is to end, until it has ended.

        More than once: the generator may be about to wait when it is woken.
        """
        entry = self._entries.get(id(body))
        if entry is None:
            return
        try:
            if not self._running:
                self._start()
        except RuntimeError:  # no thread can be started
            body.wake()
        else:
            self._queue.put(entry)

    def _start(self) -> None:
        with self._lock:
            if not self._running:
                start_thread("tgstream-watch", self._run)
                self._running = True

    def hand_over(self, body: Monitored) -> bool:
        """Have the monitor end ``body``, which the caller must not end.

        :returns: False if the monitor's thread does not run.
        """
        if self._running:
            self.register(body, 0.0)  # the collector has cleared the reference to it
            if body.ended:  # another thread has ended and forgotten it before
                self.forget(body)
            self._queue.put(body)
        return self._running

    def _run(self) -> None:
        while True:
            try:
                self._wait(self._look_at_all())
                if not self._entries and self._may_end():
                    return
            except Exception:
                _log_failure()
                time.sleep(PAUSE)

    def _look_at_all(self) -> float:
        """Look at the streams whose look is due. Returns the seconds until the next."""
        self._next_look = float("inf")
        now, entries = clock(), self._list()
        next_look = now + (LONGEST if entries else LINGER)
        for entry in entries:
            if entry.due <= now:
                try:
                    self._look(entry, now)
                except Exception:
                    _log_failure()
                    entry.due = now + LINGER
            next_look = min(next_look, entry.due)
        pause = PAUSE + PAUSE_PER_STREAM * len(entries)
        self._next_look = next_look = max(next_look, now + pause)
        return next_look - clock()

    def _may_end(self) -> bool:
        """Whether the thread may end: no stream has registered meanwhile."""
        with self._lock:
            self._running = False
            self._running = bool(self._entries)
            return not self._running

    def _wait(self, seconds: float) -> None:
        try:
            item = self._queue.get(timeout=max(seconds, 0.0))
            while True:
                if isinstance(item, _Entry):
                    item.due = 0.0
                elif item is not None:
                    item.ask_to_end("disconnected")
                    _end_on_a_thread(item)
                item = self._queue.get_nowait()
        except queue.Empty:
            pass

    def _look(self, entry: _Entry, now: float) -> None:
        body = entry()
        if body is None or body.ended:
            return
        if now >= body.expires:
            end_soon(body, "expired")
        elif has_disconnected(body.context.environ):
            end_soon(body, "disconnected")
        if body.closing is not None:  # its owner ends it
            body.wake()
            pause = entry.seen if isinstance(entry.seen, float) else WAKE_PAUSE
            entry.due, entry.seen = now + pause, min(2 * pause, LONGEST_WAKE_PAUSE)
            return
        due = min(now + body.plan.disconnect_check_seconds, body.expires)
        try:
            for check in _checks:
                entry.seen, next_check = check(body, now, entry.seen)
                due = min(due, next_check)
        except Exception:  # another thread changes what it looks at
            entry.seen = None
        entry.due = due


def _log_failure() -> None:
    log.exception("The monitor of streams failed. It goes on")


def start_thread(name: str, target: Callable[[], object]) -> None:
    """Start a thread that does not keep the process from its exit.

    :raises RuntimeError: when no thread can be started.
    """
    threading.Thread(target=target, name=name, daemon=True).start()


def end_soon(body: Monitored, reason: Reason, detail: str | None = None) -> bool:
    """Ask ``body`` to end, and do not wait for it. A second call does nothing.

    If a pull runs, the thread that pulls ends the stream when the pull returns. A
    generator that waits for an event is woken, and callbacks of the stream may end
    another wait. Otherwise a thread of its own ends it, because an end may take long.

    :param detail: a text for the log and the report.
    :returns: False if it is ending already.
    """
    asked = body.ask_to_end(reason, detail)
    if asked:
        _end_on_a_thread(body)
    return asked


def _end_on_a_thread(body: Monitored) -> None:
    if not body.idle:
        body.interrupt()
        return  # its owner reads the note
    try:
        start_thread("tgstream-end", body.close)
    except RuntimeError:  # no thread can be started: late is better than never
        body.close()


SERVER_SECONDS = 1.0
"""Seconds that a server has to close the response of a stream that was ended."""


def free_servers(bodies: Iterable[Monitored]) -> None:
    """Shut down the connections of clients that do not read, which block the server."""
    time.sleep(SERVER_SECONDS)
    for body in bodies:
        connection = find_connection(body.context.environ)
        was_cut = body.departed and body.ended and body.reason in EARLY
        if was_cut and connection is not None and not body.server_closes:
            with suppress(OSError):  # the client has disconnected
                connection.shutdown(socket.SHUT_RDWR)


monitor = Monitor()
"""The monitor of this process."""


_Check: TypeAlias = Callable[[Any, float, Any], tuple[Any, float]]
_checks: list[_Check] = []
second_pull_checks: list[Callable[[Any], None]] = []
"""Called with a stream that is pulled for its second chunk."""


def register_checks(at_second_pull: Callable[[Any], None], at_look: _Check) -> None:
    """Check each running stream from now on.

    :param at_second_pull: called with the stream, by the thread that pulls.
    :param at_look: called by the monitor with the stream, the time by the clock, and
        its first result at the look before, None at first. It returns any object, and
        the time of its next look.
    """
    second_pull_checks.append(at_second_pull)
    _checks.append(at_look)


# Dropped streams, and forked processes.


_collecting: set[int] = set()
"""The threads in which the cyclic garbage collector runs now."""


def _note_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "start":
        _collecting.add(threading.get_ident())
    else:
        _collecting.discard(threading.get_ident())


event_loops: set[int] = set()
"""The threads of event loops, which run the generators of other streams."""


def must_not_wait() -> bool:
    """Whether this thread must not end a stream, which may wait.

    True in a finaliser that the cyclic garbage collector has called. The thread may
    hold any lock, and the end of a stream waits for locks. TG's middlewares are
    generators, whose ``finally`` closes a stream there, too. Also true on the thread of
    an event loop, because the end of an async generator waits for that thread.
    """
    return is_collecting_garbage() or threading.get_ident() in event_loops


def is_collecting_garbage() -> bool:
    """Whether the cyclic garbage collector runs on this thread, in a finaliser."""
    return threading.get_ident() in _collecting


gc.callbacks.append(_note_collection)


def has_greenlets() -> bool:
    """True where gevent has made greenlets of threads."""
    patched: Any = sys.modules.get("gevent.monkey")
    return patched is not None and bool(patched.is_module_patched("threading"))


def _disown() -> None:
    """In a forked process: its parent's streams are not its own."""
    bodies = monitor.running()
    monitor.reset()
    event_loops.clear()
    for body in bodies:
        body.disown()
    _parents.extend(bodies)  # to free a generator would run its finally


_parents: list[Monitored] = []


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_disown)


# The connection of a client.


_CLOSED = 7
"""TCP_CLOSE of Linux: the client has reset the connection, or the system gave it up."""

_HALF_CLOSED = 8
"""TCP_CLOSE_WAIT of Linux: the client has ended its sending, and maybe its reading."""

_STATE: int | None = getattr(socket, "TCP_INFO", None)
"""The option that returns the state of a socket. Not every system has it."""


def find_connection(environ: Mapping[str, Any]) -> Any:
    """The socket of a client. None if the server does not pass it, as gunicorn does."""
    return environ.get("gunicorn.socket")


def has_disconnected(environ: Mapping[str, Any], half_closed: bool = False) -> bool:
    """Whether the client of a request is known to have disconnected.

    It does not wait, and reads nothing. A client that has only ended its own sending is
    still connected, unless the server reports a disconnect. waitress reports it with
    ``channel_request_lookahead``. gunicorn and waitress pass the socket, whose state is
    read.

    :param half_closed: whether a client that has ended its own sending counts as
        disconnected. A client that has closed its connection looks the same.
    :returns: False if it is not known.
    """
    disconnected: Callable[[], bool] | None = environ.get(
        "waitress.client_disconnected"
    )
    connection = find_connection(environ)
    try:
        if disconnected is not None:
            if disconnected():
                return True
            connection = disconnected.__self__.socket  # type: ignore[attr-defined]
        if connection is None or _STATE is None:
            return False
        state: int = connection.getsockopt(socket.IPPROTO_TCP, _STATE, 1)[0]
    except Exception:  # a Unix socket of a proxy, a closed socket, or another object
        return False
    return state == _CLOSED or (half_closed and state == _HALF_CLOSED)


def end_requests(environ: Mapping[str, Any]) -> None:
    """Have gunicorn read no other request from the connection of this one.

    The half of its socket that is read is shut down, as if the client had done it.
    gunicorn still sends the response. Then it finds the end of the requests, and closes
    the connection. It does not wait for the client, as after ``Connection: close``: the
    gthread worker waits up to 2 s for each, one after the other. HTTP/2 has other
    requests on the connection, and an end of its own.
    """
    if environ.get("SERVER_PROTOCOL", "").startswith("HTTP/1"):
        with suppress(Exception):  # closed meanwhile, or another server
            # Not the method of its class: that of TLS would end the writing, too.
            socket.socket.shutdown(environ["gunicorn.socket"], socket.SHUT_RD)
