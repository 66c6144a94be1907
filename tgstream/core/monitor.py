"""The monitor of the running streams: one thread of a process, while there are any.

It ends streams from outside: those whose ``max_seconds`` are over, whose client has
disconnected, that :func:`drain` ends, and those that Python's cyclic garbage collector
has dropped. It also gives advice about streams that wait.

- The monitor looks at a stream when a look is due, whether a server pulls the stream or
  not. A pull pays nothing for it.
- The monitor's thread runs no code of a user and no call of a database. An end may run
  both, so that each end that the monitor begins has a short-lived thread of its own.
- A finaliser may run on any thread, between any two byte codes, also while that thread
  is in this module. It only calls ``SimpleQueue.put()``, which is re-entrant and does
  not wait.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import logging
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..turbogears.diagnostics import Progress, check_running, next_check
from .options import clock

if TYPE_CHECKING:
    from .body import Body
    from .report import Reason

log = logging.getLogger("tgstream")

PAUSE = 0.05
"""Minimum seconds between two looks: many streams that are due share one look."""

LONGEST = 3600.0
"""Maximum seconds of one wait. A longer timeout can overflow."""

NO_LOOK = 10.0
"""Seconds of a wait while no look is due, after which the thread may end."""


class _Entry(NamedTuple):
    due: float  # by the clock
    number: int  # so that two entries never compare further
    body: weakref.ref[Body]
    seen: Progress | None  # the stream's progress at its last look


class Monitor:
    """The monitor of one process. Its thread starts with the first stream to watch.

    A forked process has a monitor of its own.
    """

    def __init__(self) -> None:
        self._bodies: dict[int, weakref.ref[Body]] = {}
        self._entries: list[_Entry] = []
        self._numbers = itertools.count()
        # Re-entrant: a finaliser that calls drain() may interrupt who holds it.
        self._lock = threading.RLock()
        self._running = False
        # Dropped bodies that are to be ended, and None to wake the thread.
        self._queue: queue.SimpleQueue[Body | None] = queue.SimpleQueue()

    def register(self, body: Body) -> None:
        """Count ``body`` among the running streams, until it has ended."""
        self._bodies[id(body)] = weakref.ref(body)

    def forget(self, body: Body) -> None:
        """Count ``body`` no longer. It may be called from a finaliser."""
        self._bodies.pop(id(body), None)

    def running(self) -> list[Body]:
        """The streams of this process that have not ended."""
        bodies = [reference() for reference in self._references()]
        return [body for body in bodies if body is not None and not body.ended]

    def _references(self) -> list[weakref.ref[Body]]:
        while True:
            with suppress(RuntimeError):  # another thread has registered one meanwhile
                return list(self._bodies.values())

    def watch(self, body: Body) -> None:
        """Look at ``body`` from now on, when a look is due.

        :raises RuntimeError: when no thread can be started.
        """
        with self._lock:
            is_next = self._add(body, clock(), None)
            if not self._running:
                _start_thread("tgstream-watch", self._run)
                self._running = True
            elif is_next:
                self._queue.put(None)

    def _add(self, body: Body, now: float, seen: Progress | None) -> bool:
        """Look at ``body`` later. True if it is the next to look at."""
        check = now + body.plan.disconnect_check_seconds
        due = min(check, next_check(body, now, seen))
        due = min(max(due, now + PAUSE), body.expires)
        entry = _Entry(due, next(self._numbers), weakref.ref(body), seen)
        with self._lock:
            heapq.heappush(self._entries, entry)
            return self._entries[0] is entry

    def hand_over(self, body: Body) -> bool:
        """Have the monitor end ``body``, for who must not. False if nobody could."""
        if self._running:
            self.register(body)  # the collector has cleared the reference to it
            self._queue.put(body)
        return self._running

    def _run(self) -> None:
        while True:
            try:
                if not self._step():
                    return
            except Exception:
                _log_failure()
                time.sleep(PAUSE)

    def _step(self) -> bool:
        """Wait for the next look that is due, and look. False when no stream runs."""
        with self._lock:
            if not (self._bodies or self._entries):
                self._running = False
                return False
            left = self._entries[0].due - clock() if self._entries else NO_LOOK
        if left > 0:
            self._wait(min(max(left, PAUSE), LONGEST))
        for entry in self._take_due():
            try:
                self._look(entry)
            except Exception:
                _log_failure()
                if (body := entry.body()) is not None:
                    self._add(body, clock(), None)
        return True

    def _wait(self, seconds: float) -> None:
        try:
            dropped = self._queue.get(timeout=seconds)
            while True:
                if dropped is not None:
                    dropped.ask_to_end("disconnected")
                    _end_on_a_thread(dropped)
                dropped = self._queue.get_nowait()
        except queue.Empty:
            pass

    def _take_due(self) -> list[_Entry]:
        now, due = clock(), []
        with self._lock:
            while self._entries and self._entries[0].due <= now:
                due.append(heapq.heappop(self._entries))
        return due

    def _look(self, entry: _Entry) -> None:
        body = entry.body()
        if body is None or body.ended:
            return
        now = clock()
        if now >= body.expires:
            end_soon(body, "expired")
        elif has_left(body.context.environ):
            end_soon(body, "disconnected")
        if body.closing is not None:
            return  # whoever runs it ends it
        try:
            seen = check_running(body, now, entry.seen)
        except Exception:  # it looks at values that another thread is changing
            seen = None
        self._add(body, now, seen)


def _log_failure() -> None:
    log.exception("The monitor of streams failed. It goes on")


def _start_thread(name: str, target: Any, *args: Any) -> None:
    threading.Thread(target=target, args=args, name=name, daemon=True).start()


def end_soon(body: Body, reason: Reason) -> None:
    """Ask ``body`` to end, and do not wait for it. A second call does nothing.

    If a pull runs, the thread that pulls ends the stream when the pull returns.
    Otherwise a thread of its own ends it, because an end may take long.
    """
    if body.ask_to_end(reason):
        _end_on_a_thread(body)


def _end_on_a_thread(body: Body) -> None:
    if not body.idle:
        return  # its owner reads the note
    try:
        _start_thread("tgstream-end", body.close)
    except RuntimeError:  # no thread can be started: late is better than never
        body.close()


_monitor = Monitor()


def monitor() -> Monitor:
    """The monitor of this process."""
    return _monitor


def drain(timeout: float = 5.0) -> bool:
    """Ask every running stream of this process to end, and wait until all have.

    Call it when the server is told to end. A stream that waits for its server ends at
    once, one whose generator works at its next item, as if its ``max_seconds`` were
    over: what is not committed is aborted, a format whose body may end anywhere
    (``SSE``) ends well, any other breaks. The report says ``drained``.

    A stream whose generator is still making its first item ends after that item.

    :param timeout: the longest time to wait, in seconds.
    :returns: whether all have ended by then.
    """
    deadline = clock() + timeout
    while bodies := monitor().running():
        for body in bodies:
            end_soon(body, "drained")
        for wake in _on_drain:
            wake()
        left = deadline - clock()
        if left <= 0:
            return not monitor().running()
        time.sleep(min(left, PAUSE / 5))
    return True


_on_drain: list[Callable[[], None]] = []


def on_drain(callback: Callable[[], None]) -> None:
    """Call ``callback`` while streams are drained, so that a waiting generator ends."""
    _on_drain.append(callback)


# Who drops a stream.

_collecting: set[int] = set()
"""The threads in which the cyclic garbage collector runs now."""


def _note_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "start":
        _collecting.add(threading.get_ident())
    else:
        _collecting.discard(threading.get_ident())


def is_collecting() -> bool:
    """True in a finaliser that the cyclic garbage collector has called.

    The thread may hold any lock, and the end of a stream waits for locks. TG's
    middlewares are generators, whose ``finally`` closes a stream there, too.
    """
    return threading.get_ident() in _collecting


gc.callbacks.append(_note_collection)


def has_greenlets() -> bool:
    """True where gevent has made greenlets of threads."""
    patched: Any = sys.modules.get("gevent.monkey")
    return patched is not None and bool(patched.is_module_patched("threading"))


def _disown() -> None:
    """In a forked process: its parent's streams are not its own."""
    global _monitor
    bodies, _monitor = _monitor.running(), Monitor()
    for body in bodies:
        body.disown()
    _parents.extend(bodies)  # to free a generator would run its finally


_parents: list[Body] = []


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_disown)


# Whether a client has disconnected.


_CLOSED = 7
"""TCP_CLOSE of Linux: the client has reset the connection, or is given up."""

_STATE: int | None = getattr(socket, "TCP_INFO", None)
"""What asks a socket for its state; not every system has it."""


def has_left(environ: Mapping[str, Any]) -> bool:
    """Whether the client is known to be gone; False where nobody can tell.

    waitress looks for it with ``channel_request_lookahead``. gunicorn hands out the
    socket, whose state is asked: to read from it would be to wait for it, with gevent.
    """
    told: Callable[[], bool] | None = environ.get("waitress.client_disconnected")
    connection = environ.get("gunicorn.socket")
    try:
        if told is not None:
            return told()
        if connection is None or _STATE is None:
            return False
        state: bytes = connection.getsockopt(socket.IPPROTO_TCP, _STATE, 1)
    except Exception:  # no TCP, as a proxy's Unix socket; closed; or another's object
        return False
    return state == bytes([_CLOSED])
