"""The open streams of this process, as an operator sees them and ends them.

A stream pays nothing for it: the lists read everything from the running streams.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from secrets import token_bytes
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

from .limits import find_user
from .monitor import end_soon, find_connection, free_servers, monitor, start_thread
from .options import clock

if TYPE_CHECKING:
    from .body import Body

StreamState: TypeAlias = Literal["waiting for client", "running", "idle"]


class _Fields(NamedTuple):
    id: str
    controller: str
    path: str
    user: str | None
    remote_addr: str | None
    started: float
    items: int
    chunks: int
    bytes: int
    state: StreamState
    in_transaction: bool


class RunningStream(_Fields):
    """An open stream of this process, as :func:`running` has found it.

    It is a named tuple, so ``_asdict()`` converts it for JSON. It does not keep the
    stream open, and does not change any more.

    - ``id`` is a short text that names the stream in all processes.
    - ``controller`` and ``path`` are those of the report.
    - ``user`` is the user id of repoze.who, or ``REMOTE_USER``, or None.
    - ``remote_addr`` is the ``REMOTE_ADDR`` of the request, or None.
    - ``started`` is the number of seconds since the start.
    - ``items``, ``chunks`` and ``bytes`` are counted so far, bytes before compression.
    - ``state`` is ``'waiting for client'`` while the server has a chunk to send,
      ``'idle'`` while an event stream waits for its next event, and ``'running'`` while
      another generator runs. An event stream that works for its next event is also
      ``'idle'``, and each stream that is to end is ``'running'`` until it has ended.
    - ``in_transaction`` is whether it holds a database connection, or has changes.
    """

    _body: weakref.ref[Body]

    def end(self, reason: str = "stopped by operator") -> bool:
        """End the stream as :func:`drain` does, and do not wait for it.

        An event stream ends normally, any other response is aborted. A stream that
        waits for its client or for an event of a channel ends at once, and an async
        generator is cancelled. Any other generator ends at its next item. The report
        has the reason ``'stopped'``.

        :param reason: a text for the log, the report and the error of the aborted
            response. The client does not receive it.
        :returns: False if the stream has ended, or is ending for another reason.
        :raises TypeError: when ``reason`` is not a ``str``.
        """
        if not isinstance(reason, str):
            raise TypeError(
                f"end(): reason must be a str, got {type(reason).__name__}: "
                f"{reason!r:.80}"
            )
        body = self._body()
        if body is None or body.ended or not end_soon(body, "stopped", reason):
            return False
        if find_connection(body.context.environ) is not None:
            with suppress(RuntimeError):  # no thread can be started
                start_thread("tgstream-end", partial(free_servers, [body]))
        return True


def running() -> list[RunningStream]:
    """The open streams of this process, the oldest first.

    Several processes can report their streams on a channel, see
    ``examples/operator_page.py``.

    :returns: a list of :class:`RunningStream`.
    """
    now, bodies = clock(), cast("list[Body]", monitor.running())
    bodies.sort(key=lambda body: body.started)
    return [_describe(body, now) for body in bodies]


def _describe(body: Body, now: float) -> RunningStream:
    environ = body.context.environ
    user = find_user(environ)
    described = RunningStream(
        id=_make_id(body),
        controller=body.plan.controller,
        path=body.context.tg_locals.request.path,
        user=None if user is None else str(user),
        remote_addr=environ.get("REMOTE_ADDR"),
        started=now - body.started,
        items=body.encoding.items,
        chunks=body.chunks,
        bytes=body.bytes,
        state=_find_state(body),
        in_transaction=_is_in_transaction(body),
    )
    described._body = weakref.ref(body)
    return described


_KEY = token_bytes(16)


def _make_id(body: Body) -> str:
    """A text that no other stream has: no other is at this place since this time."""
    place = f"{os.getpid()} {id(body)} {body.started}".encode()
    return blake2b(place, key=_KEY, digest_size=6).hexdigest()


def _find_state(body: Body) -> StreamState:
    if body.idle:
        return "waiting for client"
    is_of_events = body.plan.traits.endless and body.closing is None
    return "idle" if is_of_events else "running"


def _is_in_transaction(body: Body) -> bool:
    try:
        return body.transaction is not None and not body.transaction.idle
    except Exception:  # another thread ends it now
        return False
