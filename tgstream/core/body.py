"""The body of a streamed response: its states, its pulls, and its end.

A body is a state machine. A thread that runs its generator, or ends it, is its *owner*,
and has taken the one token of the body. No thread waits for the token. A thread that
does not get it leaves a note (``closing``). The owner reads the note when it returns
the token::

    NEW -> STARTING -> OPEN (idle <-> pulled)
               |         |
               +---------+--> ENDING -> ENDED

``start`` makes the first chunk, ``iterate`` makes the others, and ``_finish`` is the
only way to ENDED. It never returns the token. A body ends once, with one reason and in
one order: close the generator, roll back and close the sessions, report. Each step runs
even if the step before failed. The first error is the one reported.

- *A server pulls while another thread ends the stream* (the monitor, ``drain()``, a
  server that closes it). The other thread writes ``closing``, does not get the token,
  and goes away. The puller returns the token, reads ``closing``, takes the token again
  and ends the stream on its own thread. The chunk of that pull is still sent.
  A thread writes ``closing`` before it tries to take the token, and an owner reads it
  after it has returned the token, so that one of the two always ends the stream.
- *Another thread ends the stream while it is idle, and the server pulls.* The pull does
  not get the token. It raises, or it stops if the format's body may end anywhere.
- *The generator closes its own stream.* The token is taken, so that this is a note like
  any other. The stream ends when the generator yields, returns or raises.
- *The generator commits while it closes*, in its ``finally``. The record of the thread
  has the body that runs on it. Nothing that another thread does can change that.
- *A generator makes items, but no bytes.* No pull returns, so the token stays taken.
  Between two items the consumer of the generator calls :meth:`Body.checkpoint`, which
  raises ``StreamEnding`` once ``closing`` is written.
- *The format has a heartbeat.* The generator runs on the thread of a worker. While the
  request waits for the first chunk, the generator may begin the response by
  :meth:`Body.begin`, and go on. The worker is then the owner, and returns the token
  when the first step of the generator has ended. The next pull gets its result.
- *The process begins to drain while a stream starts.* The stream registers with the
  monitor, and then looks at the flag. ``drain()`` sets the flag, and then looks for
  streams. So the stream is refused before its generator runs, or it is found.
- *The body is dropped.* If its last reference goes, the thread that let go of it ends
  it at once. If Python's cyclic garbage collector drops it, in the middle of anything,
  it is handed to the monitor, which ends it on a thread of its own. A body that has
  ended does nothing when it is dropped: it takes no lock and calls nothing.
- *The generator is blocked when the stream is to end*, and has passed a callback to
  :meth:`Body.on_end`. The thread that leaves the note has the callbacks called, so that
  the generator can go on to its end. If it returns or raises then, the stream ends for
  the reason of the note. Each callback is taken from a list, which is atomic.
- *The generator waits for an event when the stream is to end.* The monitor wakes the
  listeners of its channels, and the thread that pulls. It wakes them again until the
  stream has ended: the generator may be about to wait, or wait a second time.
- *Another request calls* ``Stream.close()``. The server and its middlewares close
  another object. It writes ``server_closes``, so that each call has its reason.
- *The process forks while the stream runs.* In the child the token is gone forever, and
  the body ends nothing. If the child comes out of the generator, it exits, because the
  connections to the database and to the client are its parent's.

The token is an item of a list, not a lock. To take and return it costs a third of a
lock's time (27 and 100 ns). A finaliser can take it, and under gevent a failed attempt
does not switch to another greenlet, as a lock's does. A ``deque`` is as fast, and needs
0.7 KiB more for each open stream.

The body reports to the response and its error guard by the methods of an
:class:`Observer`. It writes no attribute of it.

The hooks of ``tgstream.started`` are called by an owner, so that the stream cannot end
and be reported meanwhile: by the request when its response can be sent, by the worker
in :meth:`Body.begin`, or just before the report if the stream has ended by then.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from enum import Enum
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from webob.exc import HTTPException
from webob.request import DisconnectionError

from . import report as reports
from .chunks import Chunks, StreamEnding
from .cleanup import close, run_all
from .context import Context, find_body, thread
from .draining import make_drain_refusal
from .errors import StreamError
from .heartbeat import Pull, Worker
from .monitor import (
    end_requests,
    has_disconnected,
    has_greenlets,
    is_collecting_garbage,
    monitor,
    must_not_wait,
    second_pull_checks,
    start_thread,
)
from .options import Plan, clock
from .report import Reason, Report
from .sockets import shut_down_socket

if TYPE_CHECKING:
    from .context import StreamTransaction
    from .files import FileParts
    from .limits import Slot
    from .recheck import Recheck


class State(Enum):
    """The part of its life that a body is in."""

    NEW = "new"
    STARTING = "starting"  # up to its first chunk, in the request
    OPEN = "open"  # between two pulls, or in one
    ENDING = "ending"
    ENDED = "ended"


NEW, STARTING, OPEN, ENDING, ENDED = State


class Observer(Protocol):
    """The response that a body has left with, and its error guard."""

    @property
    def closing(self) -> bool:
        """Whether the server closes the response."""

    def first_chunk(self, body: Body) -> None:
        """The server takes the first chunk."""

    def pull_failed(self, error: BaseException) -> None:
        """The server's pull raises ``error``."""

    def ended(self, body: Body, error: BaseException | None) -> None:
        """The body has ended. ``error`` is given if it failed."""


class Meter(Protocol):
    """Measures the stream of a body."""

    def measure(self, body: Body, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, as the server pulls them."""


class Body:
    """One run of a stream, in one request.

    :param source: the iterable of the items.
    :param plan: the options.
    :param charset: returns the charset of the response.
    :param length: returns the declared length of the body in bytes, if there is one. It
        is called after the first chunk was made.
    :param context: the context in which the generator runs.
    :param transaction: the stream's sessions and transaction, if the application has
        any.
    :param stream: the :class:`Stream` that the server iterates.
    """

    observer: Observer | None = None
    meter: Meter | None = None
    """Measures the pulls of the server, if it was set before the first one."""
    departed = False
    """Whether its response has left the application."""
    server_closes = False
    """Whether the server closes its response, or has dropped it."""
    slot: Slot | None = None
    file: FileParts | None = None
    """The file that it sends, if it is one."""
    reason: Reason | None = None
    first_chunk_seconds: float | None = None
    worker: Worker | None = None
    """The thread of its generator, if its format has a heartbeat."""
    incident: str | None = None
    """The id of a failure that the client receives."""
    detail: str | None = None
    """The text of the note to the owner."""
    waits: tuple[Callable[[], None], ...] = ()
    """Wake the listeners of channels that the generator has open."""
    expires = float("inf")
    """The time by the clock at which ``max_seconds`` are over."""
    recheck: Recheck | None = None
    """Checks its permission again while it runs. None without ``recheck_seconds``."""
    callbacks: list[Callable[[], object]] | None = None
    """Called at the end, the last one first. None if :meth:`on_end` was not called."""
    _state = NEW
    _disowned = _watched = _interrupted = _announced = False
    _chunks: Generator[bytes, None, None] = (chunk for chunk in [b""])
    _first: bytes | None = None
    _first_pull: Pull | None = None  # of the worker, until the response begins
    _length: int | None = None
    _failure: tuple[bytes, BaseException] | None = None  # the last chunk, and the error

    def __init__(
        self,
        source: Any,
        *,
        plan: Plan,
        charset: Callable[[], str],
        length: Callable[[], int | None],
        context: Context,
        transaction: StreamTransaction | None,
        stream: Any,
    ) -> None:
        self.plan = plan
        self.context = context
        self.transaction = transaction
        # Weak: a stream that is dropped must end at once, not with the next collection.
        self.stream = weakref.ref(stream)
        self._stream_class = type(stream)
        self.encoding = Chunks(plan, charset, self)
        self.chunks = self.bytes = 0
        self.closing: Reason | None = None
        """The note to the owner: the reason to end."""
        self._token: list[None] = []
        self._source = source
        self._declared_length = length
        self.started = now = clock()
        if plan.max_seconds is not None:
            self.expires = now + plan.lifetime(plan.max_seconds)

    # The states.

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._state is ENDED

    @property
    def idle(self) -> bool:
        """Whether it has no owner, so that it can be ended from outside."""
        return bool(self._token)

    def _acquire(self) -> bool:
        """Become the owner, if there is none."""
        try:
            self._token.pop()
        except IndexError:
            return False
        return True

    def _release(self) -> None:
        """Return the token, and read the note that was left meanwhile."""
        self._state = OPEN
        self._token.append(None)
        if self.closing is not None:
            self._read_note()

    def _read_note(self) -> None:
        self.check_process()
        self._end_if_asked()

    def check_process(self) -> None:
        """Exit a process that was forked in the generator, and has come out of it."""
        if self._disowned:
            reports.leave_child(self.plan.controller, None)

    def ask_to_end(self, reason: Reason, detail: str | None = None) -> bool:
        """Leave a note for the owner. False if there was a note.

        :param detail: a text for the log and the report.
        """
        if self.closing is not None:
            return False
        if detail is not None:
            self.detail = detail
        self.closing = reason
        return True

    def disown(self) -> None:
        """In a forked process: leave the stream to the parent."""
        self._disowned, self.callbacks = True, []
        self._token.clear()
        self.ask_to_end("disconnected")

    def checkpoint(self) -> None:
        """Called between two items if no chunk was made.

        :raises StreamEnding: when the stream is to end.
        """
        if not self._watched:
            self._watch()
        if self.closing is not None:
            raise StreamEnding

    def _watch(self) -> None:
        self._watched = True
        try:
            monitor.watch(self)
        except RuntimeError:  # no thread can be started, and max_seconds needs one
            if self.plan.max_seconds is not None:
                raise

    # The pulls.

    def start(self, vetoed: Callable[[HTTPException], bool]) -> None:
        """Make the first chunk inside the request, where an error page is possible.

        :param vetoed: whether TG would abort the transaction for an HTTP exception.
        :raises HTTPException: when the process drains. Nothing has run.
        :raises Exception: the error of the generator. The stream has then ended.
        """
        self._state = STARTING
        monitor.register(self, self.started)
        make_first: Callable[[], bytes | None] | None = self._make_first
        try:
            if self.callbacks is not None and not self._watched:
                self._watch()  # one of them may end a wait for the first item
            if monitor.draining:  # drain() has set it before, or finds this stream
                make_first = self._refuse_to_start
            elif self.closing is not None:  # a newer stream has replaced it
                make_first = partial(_raise_again, StreamEnding())
            elif self.plan.traits.heartbeat:
                make_first = self._start_worker()
        except BaseException as error:  # gevent has killed the request, for example
            if self.worker is not None:
                raise  # the worker ends the stream
            make_first = partial(_raise_again, error)
        if make_first is None:
            return  # the response has begun
        record = self.context.bind(self)
        try:
            self._keep_first(self.context.run(make_first))
        except HTTPException as response:
            self._end_by_response(response, vetoed)
            raise
        except StreamEnding:
            self._end_before_first()
        except BaseException as error:
            if not self._is_of_interrupt(error):
                self._fail(error)
            self._end_before_first()
        finally:
            self.context.unbind(record)
            if self._state is STARTING:
                self._release()

    def _refuse_to_start(self) -> NoReturn:
        raise make_drain_refusal(self.context.environ, self.plan.format)

    def _start_worker(self) -> Callable[[], bytes | None] | None:
        """Make the first chunk on a worker. Returns a function that returns it.

        :returns: None if the response begins before the first chunk is made.
        """
        try:
            self.worker = worker = Worker()
        except RuntimeError:  # no thread can be started: there is no heartbeat
            return self._make_first
        self._first_pull = pull = Pull(self._make_first_on_worker)
        pull.request(worker)
        try:
            pull.wait(None)
        except BaseException:  # gevent has killed the request, or a timeout is over
            self.ask_to_end("disconnected")
            worker.submit(self._end_on_worker)
            raise
        if self._first_pull is None:
            if not self._watched:
                self._watch()
            return None
        self._first_pull = None
        return pull.result

    def _end_on_worker(self) -> None:
        """End, after the first step of the generator, because its request has ended."""
        if self._state is STARTING:
            self._release()

    def _make_first_on_worker(self) -> bytes | None:
        pull, record = self._first_pull, self.context.bind(self)
        try:
            first: bytes | None = self.context.run(self._make_first)
            return first
        except Exception as error:
            is_ending = self._state is OPEN and self.closing is not None
            if is_ending and not (
                self._end_by_client(error) or self._end_by_interrupt(error)
            ):
                self._fail(error)
            raise
        finally:
            self.context.unbind(record)
            if self._state is OPEN:  # the response has begun meanwhile
                assert pull is not None
                self._chunks = self._continue(pull.result, self._chunks)
                self._release()

    def _continue(
        self, first: Callable[[], bytes | None], rest: Iterator[bytes]
    ) -> Generator[bytes, None, None]:
        """The chunks after a comment, with which the response has begun."""
        chunk = first()
        if chunk is not None:
            yield chunk
            yield from rest

    def begin(self, comment: bytes) -> None:
        """Begin the response with a comment, because the generator is about to wait.

        The generator calls it. It does nothing after the first chunk.

        :raises StreamError: when the generator runs on the thread of the server.
        :raises StreamEnding: when the stream is to end.
        """
        if self.worker is None:
            raise StreamError(
                f"{self.plan.controller}: listen(comments=False) waits for an event, "
                "and meanwhile nothing opens the stream and keeps it open. Use "
                "@stream(SSE(heartbeat=15)), or listen() with its comments"
            )
        if self.closing is not None:
            raise StreamEnding
        pull, self._first_pull = self._first_pull, None
        if pull is not None:
            self._first = comment
            self.chunks, self.bytes = 1, len(comment)
            self.first_chunk_seconds = clock() - self.started
            self._state = OPEN
            if reports.has_hooks(reports.STARTED):
                self._announce()
            pull.end_wait()

    def _end_before_first(self) -> None:
        """Do nothing: it ends when it returns the token."""

    def _make_first(self) -> bytes | None:
        self._chunks = chunks = self.encoding.make(self._source)
        first = next(chunks, None)
        length = self._length = self._declared_length()  # after the first chunk
        if length is not None:
            self._chunks = self.encoding.check_length(first, chunks, length)
            first = next(self._chunks, None)
        return first

    def _keep_first(self, first: bytes | None) -> None:
        self._first = first
        if first is not None:
            self.chunks, self.bytes = 1, len(first)
            self.first_chunk_seconds = clock() - self.started
        if first is None or self.encoding.last:
            self._end("completed")
        elif not self._watched:
            self._watch()

    def announce(self) -> None:
        """Call the hooks of ``tgstream.started``, because the response can be sent."""
        if not reports.has_hooks(reports.STARTED) or not self._acquire():
            return  # it has ended, or its worker has called them
        try:
            if not self._announced:
                self.context.run(self._announce)
        finally:
            self._release()

    def _announce(self) -> None:
        """Call the hooks, which get a session and a transaction of their own."""
        self._announced = True
        own, tg_locals = self.transaction, self.context.tg_locals
        self.transaction = other = None if own is None else own.make_separate()
        context = Context(tg_locals) if other is None else other.make_context(tg_locals)
        record = context.bind(self)
        try:
            self._call_started()
            if other is not None:
                with suppress(BaseException):  # a hook may have used a session
                    other.release(False)
        finally:
            context.unbind(record)
            self.transaction = own

    def _call_started(self) -> None:
        reports.call_hooks(reports.STARTED, self.find_stream(), self.plan.controller)

    def find_stream(self) -> Any:
        """The stream, or a substitute if it was dropped."""
        stream = self.stream()
        return self._stream_class._of_body(self) if stream is None else stream

    def depart(self) -> None:
        """Its response leaves the application: the request ends without it."""
        self.departed = True

    def report_to(self, observer: Observer) -> None:
        """Report the first chunk, failures and the end to ``observer`` from now on."""
        self.observer = observer

    @property
    def ended_normally(self) -> bool:
        """Whether a client may take the chunks that were sent as the whole body."""
        reason = self.reason or self.closing
        return reason == "completed" or self._ends_anywhere(reason)

    @property
    def complete(self) -> bytes | None:
        """The whole body, if it ended with the first pull."""
        return (self._first or b"") if self.reason == "completed" else None

    @property
    def length(self) -> int | None:
        """The bytes of the whole body, if they are known after the first pull."""
        return self._length if self.complete is None else len(self.complete)

    def iterate(self, owner: Any) -> Iterator[bytes]:
        """The chunks, each pulled with everything bound and nothing left on the thread.

        A generator, which costs a pull less than a method. It has nothing to clean up:
        :meth:`close` ends the stream, also if this generator was never started.

        :param owner: an object that must not be dropped while the server iterates.
        :raises StreamError: when the stream has ended early, or is iterated twice.
        """
        chunk = self._take_first()
        if chunk is not None:
            yield chunk
        if self.reason == "completed":
            return
        for check in second_pull_checks:
            check(self)
        chunks, context, token = self._chunks, self.context, self._token
        bind, run, unbind = context.bind, context.run, context.unbind
        while True:
            try:
                token.pop()
            except IndexError:
                break
            record = bind(self)
            try:
                chunk = run(next, chunks)
                self.chunks += 1
                self.bytes += len(chunk)
            except StopIteration:
                self._end("completed")
                return
            except StreamEnding:
                chunk = b""
            except BaseException as error:
                if self._end_by_client(error):
                    return
                if not self._end_by_interrupt(error):
                    self._failure = self._fail_with_chunk(error)
                break
            finally:
                unbind(record)
            token.append(None)  # like _release(), without its call
            if self.closing is not None:
                self._read_note()
                if not chunk:
                    break
            yield chunk
        yield from self._refuse()

    def _take_first(self) -> bytes | None:
        """The first chunk, when the server begins. None if it must not have it."""
        chunk, self._first = self._first, None
        if chunk is None:
            if self.reason is None and self.closing is None:
                raise self._iterated_twice()
            # Some servers answer 500 if there is no chunk.
            return b"" if self.reason == "completed" else None
        if self.reason in ("failed", "disconnected"):
            return None
        if self.observer is not None:
            self.observer.first_chunk(self)
        return chunk

    def _iterated_twice(self) -> StreamError:
        return StreamError(
            f"{self.plan.controller} is iterated twice at once. Iterate a response "
            "once, on one thread at a time"
        )

    def _refuse(self) -> Iterator[bytes]:
        """End the iteration of a stream that was ended early.

        :raises StreamError: unless the format's body may end anywhere.
        :raises BaseException: the error of the stream, after the chunk that reports it.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            yield failure[0]
            raise failure[1]
        if self.closing is None and self.reason is None:
            raise self._iterated_twice()
        self._end_if_asked()
        if not self._ends_anywhere(self.closing):
            plan = self.plan
            error = StreamError(
                reports.describe_early_end(
                    plan.controller, self.closing, plan.max_seconds, self.detail
                )
            )
            if self.observer is not None:
                self.observer.pull_failed(error)
            raise error
        last = self.encode_end()
        if last or not self.chunks:
            yield last or b""  # as above

    def encode_end(self) -> bytes | None:
        """The last chunk of a stream that must end early, None if it goes on.

        It is empty unless a format has one for a stream that is replaced: after any
        other end its client reconnects.
        """
        if self.closing != "replaced" or not self._ends_anywhere(self.closing):
            return None if self.closing is None else b""
        try:
            return self.encoding.encode_replaced()
        except BaseException:
            controller, format = self.plan.controller, self.plan.format
            reports.log_encode_error(controller, format, "encode_replaced")
            return b""

    def _ends_anywhere(self, reason: Reason | None) -> bool:
        """Whether a client takes the body as complete if it ends for this reason."""
        return reason in reports.EARLY and self.plan.traits.endless

    # A server that reads the file itself.

    @property
    def first(self) -> bytes | None:
        """The first chunk, until the server takes it."""
        return self._first

    def read(
        self, read: Callable[[int, int], bytes], position: int, size: int
    ) -> bytes:
        """Read from the source for a server, as a pull would.

        :param read: is called with ``position`` and ``size``.
        :raises StreamError: when the stream has ended early.
        :raises Exception: the error of ``read``. The stream has then ended.
        """
        if not self._acquire():
            next(self._refuse(), None)
            raise self._iterated_twice()
        record = self.context.bind(self)
        try:
            return read(position, size)
        except BaseException as error:
            self._fail(error)
        finally:
            self.context.unbind(record)
            if self.reason is None:
                self._release()

    def finish_read(self, sent: int, complete: bool) -> None:
        """Count the bytes that a server has sent, and end if these are all."""
        self.bytes = sent
        if not complete or not self._acquire():
            return
        record = self.context.bind(self)
        try:
            self._end("completed")
        finally:
            self.context.unbind(record)

    def commit_items(self) -> None:
        """Commit the items whose chunk is about to be sent."""
        if self.transaction is not None:
            self.transaction.commit_items()

    def finish_items(self) -> None:
        """Commit after the last item, before the format completes the body.

        :raises StreamEnding: when a callback may have cut off the items.
        """
        if self._interrupted:
            raise StreamEnding
        close(self.encoding.iterator)  # a format may have stopped before they did
        self._close_source()
        if self.transaction is None:
            pass
        elif not self.plan.commit_manually:
            self.transaction.commit_items()
        elif uncommitted := self.transaction.count_uncommitted():
            reports.warn_uncommitted(self.plan.controller, uncommitted)
        if self.closing is not None and self._ends_anywhere(self.closing):
            raise StreamEnding  # clients reconnect, so the format must not end the body

    def encode_member(
        self, source: Any, plan: Plan, charset: str, length: int | None
    ) -> Iterator[bytes]:
        """The chunks of another source, as a part of an item of this body.

        :param plan: the options of that source.
        :param length: its bytes, if they are declared.
        """
        chunks = Chunks(plan, lambda: charset, _Member(self))
        made: Iterator[bytes] = chunks.make(source)
        if length is not None:
            made = chunks.check_length(None, made, length)
        try:
            yield from made
        finally:
            error = run_all([chunks.close, lambda: close(source)])
            if error is not None:
                raise error

    # The end.

    def close(self, reason: Reason = "disconnected", detail: str | None = None) -> None:
        """End the stream. If a pull runs elsewhere, it ends when that pull returns.

        :param detail: a text for the log and the report.
        :raises BaseException: only a kill or a timeout of gevent that came while it
            ended. The stream has ended all the same.
        """
        if self._state is ENDED:
            return
        self.ask_to_end(reason, detail)
        if not (must_not_wait() and monitor.hand_over(self)):
            self._end_if_asked()

    def drop(self) -> None:
        """End the stream, maybe from a finaliser.

        Under gevent the monitor ends it. An end can switch to another greenlet, and a
        finaliser swallows the timeout or kill that a switch raises.
        """
        if self._state is ENDED:
            return
        if has_greenlets():
            self.ask_to_end("disconnected")
            if not (self.idle or self.callbacks) or monitor.hand_over(self):
                return
        self.close()

    def close_as_wrapper(self) -> None:
        """End the stream for its wrapper: a server, or a middleware of TG.

        TG's middlewares are generators. If they are dropped, their ``finally`` closes
        the stream in a finaliser. The guard knows whether the server has closed them.
        """
        if self._state is ENDED:
            return
        if self.observer is None or self.observer.closing:
            self.close()
        else:
            self.drop()

    def close_as_stream(self) -> None:
        """End the stream for ``Stream.close()``, which anyone may call.

        Its response, and whatever the application has wrapped around it, call it for
        the server. The generator calls it for itself. Any other call stops the stream.
        """
        if self._state is not ENDED and self._is_called_from_outside():
            self.close("stopped", "closed by another request")
        else:
            self.close_as_wrapper()

    def _is_called_from_outside(self) -> bool:
        if self.server_closes or is_collecting_garbage() or find_body() is self:
            return False
        if self.departed:
            return True
        stack = thread.record.context
        return not stack or stack[-1][0] is not self.context.tg_locals

    def fail(self, error: BaseException, in_request: bool = False) -> None:
        """End an idle stream whose response cannot be sent, unless it has ended.

        :param error: the reason. It is not raised.
        :param in_request: whether an error page may still use the request's objects.
        """
        if not self._acquire():
            return
        if in_request:
            self._state = STARTING
        record = self.context.bind(self)
        try:
            self._finish("failed", error)
        finally:
            self.context.unbind(record)

    def fail_pull(self, error: BaseException) -> None:
        """End as failed, because the chunk of a pull cannot be sent.

        :param error: the reason. The caller raises it.
        """
        self.fail(error)
        if self.observer is not None:
            self.observer.pull_failed(error)

    def cancel(self) -> None:
        """End a stream whose request failed before it began, without a report."""
        self._end("failed", silent=True)

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` at the end, or at once if the end has begun."""
        self.__dict__.setdefault("callbacks", []).append(callback)  # atomic
        if self.closing is not None or self.reason is not None:
            self._interrupted = True
            self._call_callbacks()
        elif not self._watched and self._state is not NEW:
            self._watch()

    def wake(self) -> None:
        """Wake the generator and the thread that pulls, if they wait for an event."""
        for wake in self.waits:
            wake()
        if self.worker is not None:
            self.worker.end_wait()

    def interrupt(self) -> None:
        """Wake the generator, and call the callbacks while it runs.

        The generator may wait for a resource that a callback closes. A callback may
        wait, too, and the caller must not, so that it has a thread of its own.
        """
        monitor.look_soon(self)
        if not self.callbacks or self._interrupted:
            return
        self._interrupted = True
        try:
            start_thread("tgstream-end", self._call_while_running)
        except RuntimeError:  # no thread can be started
            self._call_while_running()

    def _call_while_running(self) -> None:
        callbacks = self.callbacks or []
        for callback in reversed(callbacks[:]):
            if not shut_down_socket(callback):
                with suppress(ValueError):  # the owner has taken it meanwhile
                    callbacks.remove(callback)
                    reports.call_logged(self.plan.controller, callback)

    def _call_callbacks(self) -> BaseException | None:
        """Returns the first kill or timeout of gevent that came in a callback."""
        first, callbacks = None, self.callbacks
        while callbacks:
            try:
                callback = callbacks.pop()
            except IndexError:  # another thread has taken it
                break
            error = reports.call_logged(self.plan.controller, callback)
            first = error if first is None else first
        return first

    def _end_if_asked(self) -> None:
        if self._disowned or self.closing is None:
            return
        if not self._acquire():
            if self.worker is not None or self.server_closes:
                self.context.keep_environ()
            self.interrupt()
            return
        record = self.context.bind(self)
        try:
            error = self._finish(self.closing)
        finally:
            self.context.unbind(record)
        if error is not None and reports.is_of_gevent(error):
            raise error

    def _end_by_response(
        self, response: HTTPException, vetoed: Callable[[HTTPException], bool]
    ) -> None:
        """End as TG ends a request: a response is not a failure, and has no report."""
        try:
            if not (self.plan.commit_manually or vetoed(response)):
                self.context.run(self.commit_items)
        except BaseException as error:
            self._fail(error)
        self._end("completed", silent=True)

    def _end_by_client(self, error: BaseException) -> bool:
        """End for an error that the disconnect of the client caused. Else False.

        The server must abort the transfer all the same, but nobody would read an error
        page, a mail to the administrator or a traceback.
        """
        observer = self.observer
        if observer is None or not self._is_of_client(error):
            return False
        self._end("disconnected")
        reports.log_disconnect(self.plan.controller, error)
        observer.pull_failed(
            ConnectionResetError(
                errno.ECONNRESET,
                f"the client of {self.plan.controller} has disconnected",
            )
        )
        return True

    def _end_by_interrupt(self, error: BaseException) -> bool:
        """End for an error that a callback caused when the stream was to end."""
        if self.closing is None or not self._is_of_interrupt(error):
            return False
        self._end(self.closing)
        return True

    def _is_of_interrupt(self, error: BaseException) -> bool:
        """Whether a callback caused an error, which is then logged."""
        is_of_interrupt = (
            self._interrupted
            and isinstance(error, Exception)
            and self.closing in reports.EARLY
        )
        if is_of_interrupt:
            reports.log_interrupt(self.plan.controller, str(self.closing), error)
        return is_of_interrupt

    def _is_of_client(self, error: BaseException) -> bool:
        return isinstance(error, Exception) and (
            self.closing == "disconnected"
            or isinstance(error, DisconnectionError)  # an upload that was cut
            or has_disconnected(self.context.environ)
        )

    def _fail(self, error: BaseException) -> NoReturn:
        """End for an error, and raise it."""
        controller = self.plan.controller
        if self._disowned:
            reports.leave_child(controller, error)
        if self.transaction is not None:
            error = self.transaction.translate_error(controller, error)
        error = reports.as_error(controller, error)
        if self.observer is None and self._is_of_client(error):
            self._end("disconnected")
        else:
            self._end("failed", error)
        raise error

    def _fail_with_chunk(self, error: BaseException) -> tuple[bytes, BaseException]:
        """End for an error, and return it with the chunk that reports it.

        :raises BaseException: the error, if the format has no such chunk.
        """
        chunk = self._encode_failure(error)
        try:
            self._fail(error)
        except BaseException as raised:
            if not chunk:
                raise
            return chunk, raised

    def _encode_failure(self, error: BaseException) -> bytes:
        """The last chunk of a failed body, empty if there is none.

        A body with a declared length has none: with it, the body could have this
        length, and without it clients detect the failure. Kills, timeouts and
        interrupts have none, because they must not wait for a write.
        """
        controller = self.plan.controller
        if self._length is not None or not isinstance(
            reports.as_error(controller, error), Exception
        ):
            return b""
        incident = token_hex(8)
        try:
            chunk = self.encoding.encode_failure(incident)
        except BaseException:
            reports.log_encode_error(controller, self.plan.format, "encode_failure")
            return b""
        if chunk:
            self.incident = incident
            self.chunks += 1
            self.bytes += len(chunk)
        return chunk

    def _end(
        self, reason: Reason, error: BaseException | None = None, silent: bool = False
    ) -> None:
        """End as the owner, if it has not ended."""
        if self._disowned:
            reports.leave_child(self.plan.controller, error)
        if self._state not in (ENDING, ENDED):
            self._finish(reason, error, silent)

    def _finish(
        self, reason: Reason, error: BaseException | None = None, silent: bool = False
    ) -> BaseException | None:
        """End, as the owner, who never returns the token. Returns the first error."""
        give_back = self._state is STARTING
        self._state, self.reason = ENDING, reason
        try:
            error = self.context.run(self._run_steps, error, silent, give_back)
        finally:
            self._state = ENDED
            monitor.forget(self)
            if self.slot is not None:
                self.slot.release()
            if monitor.draining:
                end_requests(self.context.environ)
        if self.worker is not None:
            self.worker.stop()
        if self.observer is not None:
            self.observer.ended(self, error if reason == "failed" else None)
        return error

    def _run_steps(
        self, error: BaseException | None, silent: bool, give_back: bool
    ) -> BaseException | None:
        """The steps of an end. Returns the first error of all of them."""
        if self.callbacks is not None:
            own_error = self._call_callbacks()
            error = own_error if error is None else error
        transaction, encoding = self.transaction, self.encoding
        has_ended = encoding.finished and not encoding.last and self._source is None
        if self.reason == "completed" and has_ended:
            encoding.detach()  # all generators have ended
        else:
            steps = self._chunks.close, encoding.close, self._close_source
            error = run_all(steps, error)
        if transaction is not None:
            try:
                transaction.release(give_back)
            except BaseException as own_error:
                error = own_error if error is None else error
        level = logging.DEBUG
        if error is not None or self.reason in reports.EARLY:
            level = self._log_level(error)
        if not silent:
            self._report(error, level)
        return error

    def _report(self, error: BaseException | None, level: int) -> None:
        is_new = not self._announced and reports.has_hooks(reports.STARTED)
        if not (is_new or reports.is_needed(level)):
            return
        with suppress(BaseException):  # a report changes nothing
            if is_new:
                self._announced = True
                self._call_started()
            reports.log_end(self._make_report(error), level)
        if self.transaction is not None:
            with suppress(BaseException):  # a hook may have used a session
                self.transaction.release(False)

    def _make_report(self, error: BaseException | None) -> Report:
        assert self.reason is not None
        return Report(
            reason=self.reason,
            error=error,
            controller=self.plan.controller,
            path=self.context.tg_locals.request.path,
            items=self.encoding.items,
            chunks=self.chunks,
            bytes=self.bytes,
            seconds=clock() - self.started,
            first_chunk_seconds=self.first_chunk_seconds,
            commits=0 if self.transaction is None else self.transaction.commits,
            incident=self.incident,
            detail=self.detail if self.reason == "stopped" else None,
        )

    def _log_level(self, error: BaseException | None) -> int:
        if error is not None:
            return logging.ERROR
        aborted = self.reason in reports.EARLY and not self._ends_anywhere(self.reason)
        return logging.WARNING if aborted else logging.DEBUG

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not self.encoding.iterator:
            close(source)


def _raise_again(error: BaseException) -> NoReturn:
    raise error


class _Member:
    """The consumer of a source that is a part of an item of a body."""

    def __init__(self, body: Body) -> None:
        self._body = body

    @property
    def closing(self) -> str | None:
        return self._body.closing

    def checkpoint(self) -> None:
        self._body.checkpoint()

    def commit_items(self) -> None:
        """Nothing: the body commits."""

    def finish_items(self) -> None:
        """Nothing: the body commits."""
