"""``Stream``, and the hooks that its generator may call.

Rule: here is what a user holds in hand; what happens to it is told in ``_body``.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..formats.protocols import Format
from .body import Body
from .cleanup import close
from .context import thread
from .errors import StreamError
from .heartbeat import beating
from .limits import Seat
from .options import Commit, Options, Plan, check
from .source import claim, is_iterable, open_source, resolve_proxy, source_of

if TYPE_CHECKING:
    from ..database.database import StreamDatabase


class Stream:
    """The response of a controller, sent to the client while it is made.

    Return it from an exposed method; what ``items`` yields is encoded, and sent chunk
    by chunk, with TG's context and a database session of its own bound. Do not return
    the same one twice: a stream serves one request.

    What commits when: items that run out are committed before the last byte leaves
    (``commit='end'``); after every item, before its chunk leaves (``'each'``), or every
    so many (a number); only by :func:`commit` (``'manual'``). A stream that raises, or
    whose client leaves, aborts what is not committed; one never started did nothing.

    :param items: an iterable of items, or an open binary file.
    :param format: what encodes the items, a class or an object; None for ``str`` and
        bytes, which leave as they are.
    :param commit: ``'end'``, ``'each'``, ``'manual'`` or a number of items; None for
        the format's own, or ``'end'``.
    :param chunk_size: bytes to gather before a chunk leaves, 0 for a chunk an item;
        None for the format's own.
    :param filename: the name under which a browser saves the response.
    :param charset: what text is encoded with; None for the response's, or UTF-8.
    :param length: the bytes of the whole body, where they are known: the client is told
        and can show progress, and a stream that makes more or fewer fails.
    :param max_seconds: how long it may live; None for no bound. It is then closed, also
        when nobody pulls it any more, and what is not committed is aborted. A format
        whose body may end anywhere (``SSE``) ends well, any other breaks. With such a
        format it is up to a tenth less, so that clients do not come back all at once.
    :param limit: how many streams of the controller may run at once in this process;
        None for no limit. The next is answered with 503 and ``Retry-After``, before
        anything runs (with ``Stream``, when the controller has returned).
    :raises TypeError: when ``items`` is not iterable, or an option is of a wrong type.
    :raises ValueError: when an option makes no sense.
    """

    def __init__(
        self,
        items: Any,
        format: Format | type[Format] | None = None,
        *,
        commit: Commit | None = None,
        chunk_size: int | None = None,
        filename: str | None = None,
        charset: str | None = None,
        length: int | None = None,
        max_seconds: float | None = None,
        limit: int | None = None,
    ) -> None:
        options = check(
            *("Stream", format, commit, chunk_size, filename, charset, length),
            *(max_seconds, limit),
        )
        items = resolve_proxy(items)
        if not is_iterable(items):
            raise TypeError(
                f"a Stream is made of an iterable, not of {type(items).__name__}; "
                "call the generator function, or return the value without Stream"
            )
        self._hold(items, options, None)

    @classmethod
    def _of(cls, items: Any, options: Options, controller: Any) -> Stream:
        stream = cls.__new__(cls)
        stream._hold(items, options, controller)
        return stream

    def _hold(self, items: Any, options: Options, controller: Any) -> None:
        self._body: Body | None = None
        self._claimed = threading.Lock()
        self._claimant: Any = None
        self._source = source_of(items)
        self._options = options
        self._controller = controller
        self._seat: Seat | None = None
        self._length: int | None = None  # bytes of the whole body, for HEAD

    def _adopt(
        self, options: Options, controller: Any, seat: Seat | None, request: Any
    ) -> None:
        """Apply the decorator's options where this stream, which it got, has none."""
        if self._claimant is not request:
            self._claim(request)
            self._claimant = request
        if seat is not None:
            if self._options.limit is None:
                self._seat = seat
            else:
                seat.leave()
        self._options = self._options.or_else(options)
        self._controller = controller

    def _prepare(self, request: Any) -> None:
        """Take the stream for its request, and its source as the options mean it."""
        if self._claimant is not request:
            self._claim(request)
        self._claimant = None  # to start it twice is an error again
        raw = self._options.format is None
        self._source = open_source(self._source, raw, request.environ)

    @property
    def items(self) -> int:
        """How many items the generator has yielded."""
        return self._body.encoding.items if self._body else 0

    @property
    def chunks(self) -> int:
        """How many chunks were made for the server."""
        return self._body.chunks if self._body else 0

    @property
    def bytes(self) -> int:
        """How many bytes these chunks hold."""
        return self._body.bytes if self._body else 0

    @property
    def ending(self) -> bool:
        """Whether it was asked to end, and will at its next item.

        By :func:`drain`, by its ``max_seconds``, or because the client has left. A
        generator that works long before its next item may look, and return.
        """
        return self._body is not None and self._body.closing is not None

    def __iter__(self) -> Iterator[builtins.bytes]:
        if self._body is None:
            return iter(())
        body, chunks = self._body, self._body.iterate(self)
        seconds = getattr(self._options.format, "heartbeat", None)
        if not seconds:
            return chunks
        # If the iterator is dropped, it closes the stream in a finaliser.
        close, ending = body.close_as_wrapper, lambda: body.closing is not None
        return beating(chunks, seconds, close, ending)

    def close(self) -> None:
        """End the stream, as a server does at its end or when the client has left.

        It does not raise, and may be called twice, from any thread.
        """
        if self._body is not None:
            self._body.close_as_wrapper()

    def __del__(self) -> None:
        body = getattr(self, "_body", None)
        if body is not None:
            body.drop()

    def _claim(self, request: Any) -> None:
        """Take the stream for one request; the second to ask gets an error."""
        if not self._claimed.acquire(blocking=False) or not claim(
            self._source, request.environ
        ):
            raise StreamError(
                "a Stream, and the generator in it, serves one request and was given "
                "to a second; make it anew in each, and no @cached on its controller"
            )

    def _open(
        self, plan: Plan, tg_locals: Any, database: StreamDatabase | None
    ) -> Body:
        self._body = body = Body(self._source, plan, tg_locals, database, self)
        body.seat, self._seat = self._seat, None
        self._source = None
        return body

    def _discard(self) -> None:
        """Run nothing, but close what is open, for a request without a body."""
        source, self._source = self._source, None
        self._leave_seat()
        close(source)

    def _leave_seat(self) -> None:
        """Leave the seat at once: a traceback may keep the stream, if not its body."""
        if self._seat is not None:
            self._seat.leave()


def current_stream() -> Stream:
    """The stream whose generator is running.

    :returns: the :class:`Stream`, which counts ``items``, ``chunks`` and ``bytes``.
    :raises StreamError: when no stream's generator is running.
    """
    body = _running("current_stream")
    stream = body.stream()
    if stream is None:  # dropped: the generator is being closed, and may still look
        stream = Stream.__new__(Stream)
        stream._hold((), Options(*[None] * 8), None)
        stream._body = body
    return stream


def flush() -> None:
    """Send what the stream's generator wrote to the database, uncommitted.

    :raises StreamError: outside of a running stream, and without a database.
    """
    _database("flush").flush()


def commit() -> None:
    """Commit what the stream's generator wrote; its objects stay attached.

    Core writes count. If it fails, the transaction is aborted, the error is raised, and
    the stream can go on.

    :raises StreamError: outside of a running stream, and without a database.
    """
    _database("commit").commit()


def rollback() -> None:
    """Undo what the stream's generator wrote and did not commit; the stream goes on.

    :raises StreamError: outside of a running stream, and without a database.
    """
    _database("rollback").rollback()


def _running(hook: str) -> Body:
    record = thread.record
    body = record.body
    # A request that is made inside of a generator has its own context above it.
    if body is None or record.context[-1][0] is not body.context.tg_locals:
        raise StreamError(
            f"{hook}() belongs in the generator of a running stream, or in what it "
            "calls on its own thread; no stream is running here"
        )
    return body


def _database(hook: str) -> StreamDatabase:
    body = _running(hook)
    if body.database is None or not body.database.has_sessions:
        raise StreamError(
            f"{body.plan.controller} called {hook}(), and its application has no "
            "database session: set use_sqlalchemy, or name one in the option "
            "tgstream.sessions"
        )
    return body.database
