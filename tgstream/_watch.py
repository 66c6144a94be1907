"""The watch over running streams: one thread in a process, while there are any.

Rule: a stream is looked at when it is due, whether it is pulled or not; the watch holds
none, and costs a pull nothing.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, NamedTuple

from ._advice import LONG, look
from ._client import has_left
from ._feed import wake
from ._plan import clock

if TYPE_CHECKING:
    from ._body import Body

PAUSE = 0.05
"""Seconds between two looks at least: many streams that are due are one look."""


class _Entry(NamedTuple):
    due: float  # by the clock
    number: int  # so that two are never compared further
    body: weakref.ref[Body]
    seen: tuple[int, ...] | None  # how far it was at its last look


class Watch:
    """The thread of one process, begun with its first stream and ended after its last.

    A forked process begins its own.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._entries: list[_Entry] = []
        self._looking: list[_Entry] = []  # at these, which are in no heap meanwhile
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._running = False

    def add(self, body: Body, due: float, seen: tuple[int, ...] | None = None) -> None:
        """Look at ``body`` when it is due."""
        entry = _Entry(due, next(self._numbers), weakref.ref(body), seen)
        with self._changed:
            heapq.heappush(self._entries, entry)
            if not self._running:
                threading.Thread(
                    target=self._run, name="tgstream-watch", daemon=True
                ).start()
                self._running = True  # after: it may be that no thread is to be had
            elif self._entries[0] is entry:
                self._changed.notify()

    def running(self) -> list[Body]:
        """The streams of this process that have not ended."""
        with self._changed:
            bodies = [entry.body() for entry in [*self._entries, *self._looking]]
        return [body for body in bodies if body is not None and not body.ended]

    def _run(self) -> None:
        while (due := self._wait()) is not None:
            for entry in due:
                self._look(entry)

    def _wait(self) -> list[_Entry] | None:
        """The entries that are due, once some are; None when there are none at all."""
        with self._changed:
            self._looking = []
            while self._entries:
                left = self._entries[0].due - clock()
                if left <= 0:
                    return self._take_due()
                self._changed.wait(max(left, PAUSE))
            self._running = False
            return None

    def _take_due(self) -> list[_Entry]:
        now, due = clock(), []
        while self._entries and self._entries[0].due <= now:
            due.append(heapq.heappop(self._entries))
        self._looking = due
        return due

    def _look(self, entry: _Entry) -> None:
        body = entry.body()
        if body is None:
            return
        now = clock()
        if now >= body.expires:
            body.close("expired")
        elif has_left(body.context.environ):
            body.close()
        if body.ended:
            return
        if body.closing or body.reason:  # a pull or its end runs; who drains waits
            self.add(body, now + LONG)
            return
        try:
            seen = look(body, now, entry.seen)
        except Exception:  # it looks at what another thread is changing
            seen = None
        self.add(body, _due(body, now), seen)


def _due(body: Body, now: float) -> float:
    return min(now + (body.plan.idle_seconds or LONG), body.expires)


_watch: Watch | None = None
_drained = float("-inf")
"""When this process was last drained, by the clock."""


def drain(timeout: float = 5.0) -> bool:
    """Ask every running stream of this process to end, and wait until all have.

    Call it when the server is told to end. A stream that waits for its server ends at
    once, one whose generator works at its next item, as if its ``max_seconds`` were
    over: what is not committed is aborted, a format whose body may end anywhere
    (``SSE``) ends well, any other breaks. The report says ``drained``.

    One whose first item is being made is not waited for: it ends after that.

    :param timeout: seconds to wait.
    :returns: whether all have ended by then.
    """
    global _drained
    _drained = clock()
    if _watch is None or _watch.pid != os.getpid():
        return True
    deadline = clock() + timeout
    while bodies := _watch.running():
        for body in bodies:
            body.close("drained")
        wake()
        left = deadline - clock()
        if left <= 0:
            return not _watch.running()
        time.sleep(min(left, PAUSE / 5))
    return True


def watch(body: Body) -> None:
    """From now on look at ``body``, until it has ended."""
    global _watch
    if _watch is None or _watch.pid != os.getpid():  # a forked process has no threads
        _watch = Watch()
    try:
        _watch.add(body, _due(body, clock()))
    except RuntimeError:  # without a thread there is no advice, but no bound either
        if body.plan.max_seconds is not None:
            raise
    # After: who drains meanwhile either finds it here, or has said so before.
    if body.started <= _drained:  # its first item was being made
        body.close("drained")
