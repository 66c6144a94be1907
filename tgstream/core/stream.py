"""``Stream``, and the functions that its generator may call."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from .body import Body
from .cleanup import close
from .context import thread
from .errors import StreamError
from .files import BLOCK_SIZE, StoredFile, find_stored
from .heartbeat import add_heartbeats
from .options import FormatTraits, Options, StreamOptions, check, clock
from .report import call_logged
from .source import (
    adapt_items,
    are_sources,
    claim,
    is_iterable,
    open_source,
    resolve_proxy,
)
from .spool import SpooledBody

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..formats.protocols import Format
    from .context import Context, StreamTransaction
    from .files import FileParts
    from .limits import Slot
    from .options import Plan
    from .spool import Spool


_MEMBER_OPTIONS = {"format", "chunk_size", "charset", "length", "filename"}
"""The options that a stream inside another one may have."""


class Stream:
    """The response of a controller, sent to the client while it is made.

    Return it from an exposed method. The items are encoded and sent chunk by chunk,
    with TG's context and a database session of its own bound. A stream serves one
    request: make a new one in each.

    ``commit='end'`` commits all items before the last byte is sent, ``'each'`` commits
    each item before its chunk is sent, a number commits after so many items, and with
    ``'manual'`` only :func:`commit` commits. If a stream raises, or its client
    disconnects, uncommitted changes are rolled back.

    :param items: an iterable of items, or an open binary file. Without a format, a file
        on a disk or in memory is sent from its position on, with a length and ranges,
        like :func:`send_file` does.
    :param format: a class or an object that encodes the items. None for items that are
        ``str`` or bytes.
    :param commit: ``'end'``, ``'each'``, ``'manual'`` or a number of items. None for
        the default of the format, or ``'end'``.
    :param chunk_size: bytes to buffer before a chunk is sent. 0 for a chunk for each
        item, None for the default of the format.
    :param filename: the name under which a browser saves the response.
    :param charset: the encoding of text. None for the charset of the response, else
        UTF-8.
    :param length: the bytes of the whole body, if they are known. Browsers then show
        progress, and a stream that sends more or fewer bytes fails.
    :param compress: whether to compress the response for clients that accept gzip, br
        or zstd (the last two if their packages are installed). None for the option
        ``tgstream.compress``, which compresses text. True also compresses any other
        content type that is not compressed already. ``length`` is that of the
        uncompressed bytes, and the response has no ``Content-Length``. See the page on
        security before you compress secrets.
    :param max_seconds: the maximum duration. None for no maximum. The stream is then
        closed, even if no server pulls it, and uncommitted changes are rolled back. A
        format whose body may end anywhere (``SSE``) ends normally, any other response
        is aborted. With such a format it is up to a tenth less, so that clients do not
        reconnect all at once.
    :param limit: the maximum number of open streams of the controller in this process.
        None for no maximum. Streams whose client has disconnected do not count, if the
        server can report it. The next request gets 503 and ``Retry-After``, before
        anything runs (with ``Stream``, when the controller has returned).
    :param limit_by: a function of the request, or ``'user'`` for the user id of
        repoze.who (without a user, the address), or ``'remote_addr'``. There is then
        one limit for each result of the function, which must be hashable. None for one
        limit of the controller.
    :param limit_action: ``'refuse'`` for the 503, or ``'replace'``: the new stream
        starts at once. The oldest one of the limit ends, with the reason
        ``'replaced'``. ``SSE`` then sends the event ``replaced``, and browsers wait for
        an hour before they reconnect. None for ``'refuse'``.
    :param busy: ``'retry'`` answers with an event stream without an event instead of
        the 503, so that a browser's ``EventSource`` tries again. Only with a format of
        the type ``text/event-stream``. None for the 503.
    :param recheck_seconds: minimum seconds between two evaluations of the ``@require``
        of the controller, and of the ``allow_only`` above it, while the stream runs:
        before a chunk or a heartbeat is sent. If they refuse, the stream ends with the
        reason ``'refused'``. A controller that has neither is an error. None for no
        other evaluation than that of the request.
    :param spool: whether to make the whole body in the request, in a temporary file,
        and then send the file. An error at any item is an ordinary error page, clients
        can resume the download, and a slow client holds no database connection. The
        first byte is sent after the last item. Formats of events refuse it.
    :raises TypeError: when ``items`` is not iterable, or an option has a wrong type.
    :raises ValueError: when an option has an invalid value.
    """

    def __init__(
        self,
        items: Any,
        format: Format | type[Format] | None = None,
        **options: Unpack[StreamOptions],
    ) -> None:
        checked = check("Stream", format, **options)
        items = resolve_proxy(items)
        if not (is_iterable(items) or are_sources(items, checked.format)):
            raise TypeError(
                f"Stream: items must be iterable, got {type(items).__name__}: "
                f"{items!r:.80}. Call the generator function, or return the value "
                "without Stream"
            )
        self._set_up(items, checked, None)

    @classmethod
    def _of(
        cls, items: Any, options: Options, controller: Any, slot: Slot | None = None
    ) -> Stream:
        stream = cls.__new__(cls)
        stream._set_up(items, options, controller)
        stream._slot = slot
        return stream

    @classmethod
    def _of_body(cls, body: Body) -> Stream:
        """A substitute for the stream of a body, which was dropped."""
        stream = cls._of((), Options(), None)
        stream._body = body
        return stream

    _body: Body | None = None
    _slot: Slot | None = None
    _length: int | None = None  # bytes of the whole body, for HEAD
    _callbacks: list[Callable[[], object]] | None = None  # until it has a body
    _claimant: Any = None  # the request that has it, and has not started it

    def _set_up(self, items: Any, options: Options, controller: Any) -> None:
        self._unclaimed = [None]  # pop() is atomic
        self._source = items if type(items) is GeneratorType else adapt_items(items)
        self._options = options
        self._controller = controller

    def _adopt(
        self, options: Options, controller: Any, slot: Slot | None, request: Any
    ) -> None:
        """Use the decorator's options where this stream, which it got, has none."""
        if self._claimant is not request:
            self._claim(request.environ)
            self._claimant = request
        if slot is not None:
            own = self._options
            if own.limit or own.limit_by or own.limit_action:
                slot.release()
            else:
                self._slot = slot
        if isinstance(self._source, StoredFile):  # its bytes need no format
            options = Options(
                filename=options.filename,
                max_seconds=options.max_seconds,
                limit=options.limit,
                limit_by=options.limit_by,
                limit_action=options.limit_action,
                recheck_seconds=options.recheck_seconds,
            )
        self._options = self._options.or_else(options)
        self._controller = controller

    def _prepare(self, request: Any) -> None:
        """Claim the stream, and open its source as its options need it."""
        if self._claimant is not request:
            self._claim(request.environ)
        self._claimant = None  # to start it twice is an error again
        if type(self._source) is not GeneratorType:
            self._source = self._find_stored(request.environ) or open_source(
                self._source, self._options.format, request.environ
            )

    def _find_stored(self, environ: dict[str, Any]) -> StoredFile | None:
        """The source, if it is a file whose size is known, to be sent as it is."""
        source, options = self._source, self._options
        if isinstance(source, StoredFile):
            return source
        if (
            options.format is not None
            or not hasattr(source, "seek")
            or source is environ.get("wsgi.input")
        ):
            return None
        stored = find_stored(source)
        if stored is None or options.length in (None, stored.content.size):
            return stored
        return None  # it is sent up to the wrong length

    @property
    def controller(self) -> str:
        """The name of the controller, such as ``RootController.users``.

        It is empty before the stream starts.
        """
        return self._body.plan.controller if self._body else ""

    @property
    def seconds(self) -> float:
        """The seconds since the stream has started."""
        return clock() - self._body.started if self._body else 0.0

    @property
    def items(self) -> int:
        """The number of items that the generator has yielded."""
        return self._body.encoding.items if self._body else 0

    @property
    def chunks(self) -> int:
        """The number of chunks that were made for the server."""
        return self._body.chunks if self._body else 0

    @property
    def bytes(self) -> int:
        """The number of bytes of these chunks, before compression."""
        return self._body.bytes if self._body else 0

    @property
    def ending(self) -> bool:
        """Whether the stream must end at its next item.

        The reason is :func:`drain`, its ``max_seconds``, :meth:`RunningStream.end`, or
        a client that has disconnected. A generator that works long before its next item
        may check it, and return.
        """
        return self._body is not None and self._body.closing is not None

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call a function once when the stream ends, whatever its generator does.

        Use it to close a connection for which the generator waits. The function is also
        called while the generator waits: if the client has disconnected, when
        ``max_seconds`` are over, when a newer stream replaces it, and by :func:`drain`
        and :meth:`RunningStream.end`. If the end has begun, it is called at once. If
        there are several, the last one is called first.

        .. code-block:: python

            answer = requests.get(url, stream=True)
            current_stream().on_end(answer.close)
            yield from answer.iter_lines()

        For the ``close`` method of a connection or a response of requests, urllib3,
        HTTPX or ``http.client``, tgstream shuts down the socket while the generator
        waits, and calls the method when the generator has ended.

        The function may be called on any thread. It must not use the database, or the
        request. Its errors are logged. A function that refers to the stream delays the
        end of a dropped stream until Python collects garbage.

        :param callback: a function without parameters. Its result is ignored.
        :raises TypeError: when it is not callable.
        """
        if not callable(callback):
            raise TypeError(
                "on_end: callback must be callable, got "
                f"{type(callback).__name__}: {callback!r:.80}"
            )
        if self._body is not None:
            self._body.on_end(callback)
            return
        if self._callbacks is None:
            self._callbacks = []
        self._callbacks.append(callback)

    def __iter__(self) -> Iterator[builtins.bytes]:
        body = self._body
        if body is None:
            if self._unclaimed:
                raise StreamError(
                    "a Stream is a response and cannot be iterated as a source. Pass "
                    "its items to the other stream: rows(...), a select() or a list"
                )
            return iter(())
        seconds, chunks = body.plan.traits.heartbeat, body.iterate(self)
        if seconds:
            # If the iterator is dropped, it closes the stream in a finaliser.
            close, end = body.close_as_wrapper, body.encode_end
            chunks = add_heartbeats(chunks, body.worker, seconds, close, end)
        if body.recheck is not None and body.complete is None:
            chunks = body.recheck.iterate(chunks, body)
        return chunks if body.meter is None else body.meter.measure(body, chunks)

    def encode_member(self) -> Iterator[builtins.bytes]:
        """Encode the items as a part of the running stream, like a member of a ZIP.

        They are read in the session and the transaction of the running stream.

        :raises StreamError: when no stream is running, or this one has an option that
            only a whole response can have.
        """
        body = _running_body("Stream.encode_member")
        format, options = self._options.format, self._options
        if unusable := options.given.keys() - _MEMBER_OPTIONS:
            raise StreamError(
                "a Stream inside another one cannot have "
                f"{', '.join(sorted(unusable))}. Set the option on the outer stream"
            )
        self._claim(body.context.environ)
        traits = FormatTraits.of(format)
        plan = body.plan._replace(
            format=format,
            traits=traits,
            commit_every=0,
            commit_manually=False,
            chunk_size=options.chunk_size or body.plan.chunk_size or BLOCK_SIZE,
        )
        source = open_source(self._source, format, body.context.environ)
        self._source = None
        charset = traits.charset or options.charset or "utf-8"
        return body.encode_member(source, plan, charset, options.length)

    def measure_member(self) -> int | None:
        """The bytes of :meth:`encode_member`, None if they are not declared."""
        return self._options.length

    def close(self) -> None:
        """End the stream from another request, as :meth:`RunningStream.end` does.

        The reason of the report is ``'stopped'``. If the generator runs, the call does
        not wait for its end. In its own generator, and for a server, the reason is
        ``'disconnected'``.

        It does not raise. It may be called twice, and from any thread. The items of a
        stream that has not started are closed.
        """
        if self._body is None:
            with suppress(Exception):
                self._discard()
        else:
            self._body.close_as_stream()

    def __del__(self) -> None:
        if self._body is not None:
            self._body.drop()

    def _claim(self, environ: dict[str, Any]) -> None:
        """Use the stream for this request. The second request gets an error."""
        try:
            self._unclaimed.pop()
        except IndexError:
            is_first = False
        else:
            is_first = claim(self._source, environ)
        if not is_first:
            raise StreamError(
                "a Stream, and the generator in it, serves one request, but was "
                "returned to a second request. Make a new one in each request, and "
                "remove @cached from the controller"
            )

    def _open(
        self,
        plan: Plan,
        charset: Callable[[], str],
        length: Callable[[], int | None],
        context: Context,
        transaction: StreamTransaction | None,
        respond: Callable[[Spool], FileParts] | None,
    ) -> Body:
        make = Body if respond is None else partial(SpooledBody, respond=respond)
        self._body = body = make(
            self._source,
            plan=plan,
            charset=charset,
            length=length,
            context=context,
            transaction=transaction,
            stream=self,
        )
        if self._slot is not None:
            self._slot.start(body)
            body.slot, self._slot = self._slot, None
        self._source = None
        if self._callbacks is not None:
            body.callbacks, self._callbacks = self._callbacks, None
        return body

    def _discard(self) -> None:
        """Run nothing, and close the source, for a request without a body."""
        source, self._source = self._source, None
        self._release_slot()
        for callback in reversed(self._callbacks or ()):
            call_logged("Stream", callback)
        self._callbacks = None
        close(source)

    def _release_slot(self) -> None:
        """Release the slot at once: a traceback may keep the stream."""
        if self._slot is not None:
            self._slot.release()
            self._slot = None


def current_stream() -> Stream:
    """The stream whose generator is running.

    :returns: the :class:`Stream`, which counts ``items``, ``chunks`` and ``bytes``.
    :raises StreamError: when no stream's generator is running.
    """
    # Of a stream that was dropped, the generator is being closed, and may call this.
    stream: Stream = _running_body("current_stream").find_stream()
    return stream


def flush() -> None:
    """Flush the database session of the stream: send its changes, uncommitted.

    :raises StreamError: outside of a running stream, and without a database.
    """
    _transaction_for("flush").flush()


def commit() -> None:
    """Commit the generator's changes. Its objects stay attached.

    Core statements are included. If the commit fails, the transaction is rolled back,
    the error is raised, and the stream can go on.

    :raises StreamError: outside of a running stream, and without a database.
    """
    _transaction_for("commit").commit()


def rollback() -> None:
    """Roll back the generator's uncommitted changes. The stream can go on.

    :raises StreamError: outside of a running stream, and without a database.
    """
    _transaction_for("rollback").rollback()


def _running_body(function: str) -> Body:
    record = thread.record
    body: Body | None = record.body
    # A request that is made inside of a generator has its own context above it.
    if body is None or record.context[-1][0] is not body.context.tg_locals:
        raise StreamError(
            f"{function}() was called where no stream is running. Call it in the "
            "generator of a stream, or in a function that it calls on its own thread"
        )
    return body


def _transaction_for(function: str) -> StreamTransaction:
    body = _running_body(function)
    if body.transaction is None or not body.transaction.has_sessions:
        raise StreamError(
            f"{body.plan.controller} called {function}(), but its application has no "
            "database session. Set use_sqlalchemy, or name a session in the option "
            "tgstream.sessions"
        )
    return body.transaction
