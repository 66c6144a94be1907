"""Limits how many streams of a controller are open at once in a process.

The open streams of a controller are counted in groups, one for each key: a user, an
address, or the controller itself. A slot is the right to one stream of a group. It is
released once, however the stream ends.

- *A group keeps no stream and no slot.* Its entries are weak references. A stream that
  is dropped ends as usual, and a slot that is dropped is released.
- *The slots keep their group.* When the last slot of a user is released, the group is
  freed, and its key with it. Nothing has to be tidied up.
- *A slot can move.* A stream that is replaced, or whose client has disconnected, loses
  its entry at once, and ends as soon as it can. To release its slot again does nothing.
- *To release takes no lock.* Python's garbage collector may release a slot on any
  thread, between any two byte codes. It removes one item of a ``dict``, which is
  atomic. Only to find a group and to enter it takes a lock, for a few operations of a
  ``dict``. No code of a user runs meanwhile, except ``__hash__`` and ``__eq__`` of a
  key.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Hashable
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

from .monitor import Monitored, end_soon, has_disconnected
from .options import Options
from .refusals import make_refusal

_numbers = count()  # never reused, as an id() is

_Entry: TypeAlias = "weakref.ref[Monitored] | None"


class _Group(dict[int, _Entry]):
    """The open streams of one key by the number of their slot, the oldest first.

    The entry of a stream that has not started is None: its controller runs.
    """


def _needs_no_slot(body: Monitored) -> bool:
    """Whether a stream is to end anyway, or its client has disconnected.

    To the server, a browser that closes an event stream looks like a client that has
    only ended its own sending. No client of events does that and reads on. A client of
    a download may do it, and gets the whole body.
    """
    return body.closing is not None or has_disconnected(
        body.context.environ, half_closed=body.plan.traits.endless
    )


class Slot:
    """The right to one stream of a group. A slot that is dropped is released.

    :param group: the streams that are counted with it.
    :param options: those of the limit.
    """

    def __init__(self, group: _Group, options: Options) -> None:
        assert options.limit is not None
        self._number = next(_numbers)
        self._group: _Group | None = group
        self._limit = options.limit
        self._as_events = options.busy is not None

    def acquire(self) -> None:
        """Take a place in the group, before anything of the stream runs.

        :raises HTTPException: the refusal, when the group is full.
        """
        if not (self._enter(None) or (self._end_departed() and self._enter(None))):
            self.release()  # the traceback keeps this object for a while
            raise make_refusal("Too many open streams.", self._as_events)

    def start(self, body: Monitored) -> None:
        """Begin to count ``body``. If the group is full, it replaces the oldest one."""
        entry = weakref.ref(body)
        while not self._enter(entry):
            if not self._end_departed():
                self._end_oldest()

    def _enter(self, entry: _Entry) -> bool:
        """Take a place in the group, or keep it. False if the group is full."""
        number, group = self._number, self._group
        assert group is not None
        with _lock:
            if number not in group and len(group) >= self._limit:
                return False
            group[number] = entry
            return True

    def _end_departed(self) -> bool:
        """End the streams whose client has disconnected. Their slots are free at once.

        :returns: whether there were any.
        """
        ended, group = False, self._group
        assert group is not None
        for number, entry in group.copy().items():
            if entry is None:
                continue
            body = entry()
            if body is None or _needs_no_slot(body):
                ended = True
                group.pop(number, None)
                if body is not None:
                    end_soon(body, "disconnected")
        return ended

    def _end_oldest(self) -> None:
        """End the oldest stream of the group. Its slot is free at once."""
        group = self._group
        assert group is not None
        for number, entry in group.copy().items():
            if group.pop(number, self) is not self:  # it has not ended meanwhile
                body = None if entry is None else entry()
                if body is not None:
                    end_soon(body, "replaced")
                return

    def release_unstarted(self) -> None:
        """Make room for another stream, unless :meth:`start` was called."""
        group = self._group
        if group is not None and group.get(self._number) is None:
            self.release()

    def release(self) -> None:
        """Make room for another stream. A second call does nothing."""
        group, self._group = self._group, None
        if group is not None:
            group.pop(self._number, None)

    __del__ = release


_groups: WeakKeyDictionary[Any, WeakValueDictionary[Hashable, _Group]]
# Re-entrant: a finaliser that starts a stream may interrupt its holder.
_lock: Any


def _reset() -> None:
    """Count from zero: a forked process has no streams, and maybe no holder."""
    global _groups, _lock
    _groups, _lock = WeakKeyDictionary(), threading.RLock()


_reset()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_reset)


def reserve(controller: Any, name: str, options: Options, request: Any) -> Slot:
    """Make the slot of a stream that is about to start.

    With ``limit_action='replace'`` it takes its place only when the stream starts.

    :param controller: the function whose streams are counted.
    :param name: its name, for error messages.
    :param options: have a ``limit``.
    :param request: TG's request.
    :raises HTTPException: the refusal, when the limit is reached.
    :raises TypeError: when ``limit_by`` returns a value that is not hashable.
    :raises Exception: an error of ``limit_by``.
    """
    key = _find_key(name, options.limit_by, request)
    with _lock:
        groups = _groups.get(controller)
        if groups is None:
            groups = _groups[controller] = WeakValueDictionary()
        slot = Slot(groups.setdefault(key, _Group()), options)
    if options.limit_action != "replace":
        slot.acquire()
    return slot


def _find_key(name: str, limit_by: Any, request: Any) -> Hashable:
    """The key of a request. Keys of different kinds are never equal."""
    if limit_by is None:
        return None
    if isinstance(limit_by, str):
        user = find_user(request.environ) if limit_by == "user" else None
        return ("remote_addr", request.remote_addr) if user is None else ("user", user)
    value = limit_by(request)
    try:
        {value}  # noqa: B018
    except TypeError:
        raise TypeError(
            f"{name}: limit_by must return a hashable value, such as a user's id, got "
            f"{type(value).__name__}: {value!r:.80}"
        ) from None
    return "function", value


def find_user(environ: dict[str, Any]) -> Hashable | None:
    """The id of the user who is logged in: repoze.who's, else the server's."""
    identity = environ.get("repoze.who.identity") or {}
    return identity.get("repoze.who.userid") or environ.get("REMOTE_USER") or None
