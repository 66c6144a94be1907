"""The body of a streamed response: its states, its pulls, and its end.

A body is a state machine. Whoever runs its generator or ends it is its *owner*, and has
taken the one token of the body. Nobody waits for the token: a thread that does not get
it leaves a note (``closing``), and the owner reads the note when it returns the token::

    NEW -> STARTING -> OPEN (idle <-> pulled)
               |         |
               +---------+--> ENDING -> ENDED

``start`` makes the first chunk, ``iterate`` makes the others, and ``_finish`` is the
only way to ENDED. It never returns the token. A body ends once, for one reason, in one
order: close the generator, commit or abort, release the sessions, report. Each step
runs even if the step before failed. The first error is the one reported.

- *A server pulls while another thread ends the stream* (the monitor, ``drain()``, a
  server that closes it). The other thread writes ``closing``, does not get the token,
  and goes away. The puller returns the token, reads ``closing``, takes the token again
  and ends the stream on its own thread. The chunk of that pull is still sent.
  ``closing`` is written before the token is asked for, and read after the token is
  returned, so that one of the two threads always ends the stream.
- *Another thread ends the stream while it is idle, and the server pulls.* The pull does
  not get the token. It raises, or it stops if the format's body may end anywhere.
- *The generator closes its own stream.* The token is taken, so that this is a note like
  any other. The stream ends when the generator yields, returns or raises.
- *The generator commits while it closes*, in its ``finally``. The record of the thread
  has the body that runs on it. Nothing that another thread does can change that.
- *A generator makes items, but no bytes.* No pull returns, so the token stays taken.
  Between two items the consumer of the generator calls :meth:`Body.checkpoint`, which
  raises ``StreamEnding`` once ``closing`` is written.
- *The body is dropped.* If its last reference goes, the thread that let go of it ends
  it at once. If Python's cyclic garbage collector drops it, in the middle of anything,
  it is handed to the monitor, which ends it on a thread of its own. A body that has
  ended does nothing when it is dropped: it takes no lock and calls nothing.
- *The process forks while the stream runs.* In the child the token is gone forever, and
  the body ends nothing. If the child comes out of the generator, it exits, because the
  connections to the database and to the client are its parent's.

The token is an item of a ``deque``, not a lock. To take and return it costs a third of
a lock's time (27 and 100 ns). A finaliser can take it, and under gevent a failed
attempt does not switch to another greenlet, as a lock's does.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn

from webob.exc import HTTPException
from webob.request import DisconnectionError

from ..turbogears.diagnostics import advise_if_buffered
from . import report as _report
from .chunks import Chunks, StreamEnding
from .cleanup import close, first_error
from .context import Context
from .errors import StreamError
from .monitor import has_greenlets, has_left, is_collecting, monitor
from .options import Plan, clock
from .report import Reason

if TYPE_CHECKING:
    from ..database.database import StreamDatabase
    from ..turbogears.guard import Outcome
    from .limits import Seat
    from .stream import Stream


class State(Enum):
    """What a body's owner does with it, or that it has none."""

    NEW = "new"
    STARTING = "starting"  # up to its first chunk, in the request
    OPEN = "open"  # between two pulls, or in one
    ENDING = "ending"
    ENDED = "ended"


class Body:
    """One run of a stream, in one request.

    :param source: what the items come from.
    :param plan: how they become chunks.
    :param tg_locals: TG's ``RequestLocals`` of the request.
    :param database: the stream's sessions and transaction, if the application has any.
    :param stream: the :class:`Stream` that the server iterates.
    """

    def __init__(
        self,
        source: Any,
        plan: Plan,
        tg_locals: Any,
        database: StreamDatabase | None,
        stream: Stream,
    ) -> None:
        self.plan = plan
        self.context = Context(tg_locals, database)
        self.database = database
        # Weak: a stream that is dropped must end at once, not with the next collection.
        self.stream = weakref.ref(stream)
        self.encoding = Chunks(plan, self)
        self.outcome: Outcome | None = None
        self.late: Callable[[], list[str]] | None = None
        self.seat: Seat | None = None
        self.chunks = self.bytes = 0
        self.reason: Reason | None = None
        self.closing: Reason | None = None
        self.left = False
        self._state = State.NEW
        self._token: deque[None] = deque()
        self._disowned = self._watched = False
        self._source = source
        self._chunks: Iterator[bytes] = iter(())
        self._first: bytes | None = None
        self._length: int | None = None
        self.started = clock()
        self.expires = self.started + plan.lifetime()
        self.first_chunk_seconds: float | None = None

    # The states.

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._state is State.ENDED

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
        self._state = State.OPEN
        self._token.append(None)
        if self.closing is not None:
            self._read_note()

    def _read_note(self) -> None:
        if self._disowned:
            _report.leave_child(self.plan.controller, None)
        self._end_if_asked()

    def ask_to_end(self, reason: Reason) -> bool:
        """Leave a note for the owner. False where another was first."""
        if self.closing is not None:
            return False
        self.closing = reason
        return True

    def disown(self) -> None:
        """In a forked process: leave the stream to the parent."""
        self._disowned = True
        self._token.clear()
        self.ask_to_end("disconnected")

    def checkpoint(self) -> None:
        """Called between two items when no chunk was made.

        :raises StreamEnding: when the stream was asked to end.
        """
        if not self._watched:
            self._watch()
        if self.closing is not None:
            raise StreamEnding

    def _watch(self) -> None:
        self._watched = True
        try:
            monitor().watch(self)
        except RuntimeError:  # without a thread there is no advice, but no bound either
            if self.plan.max_seconds is not None:
                raise

    # The pulls.

    def start(self, vetoed: Callable[[HTTPException], bool]) -> None:
        """Make the first chunk inside the request, where it can still fail as one.

        :param vetoed: whether TG would abort the transaction for an HTTP exception.
        :raises Exception: what the generator raises; the stream has then ended.
        """
        self._state = State.STARTING
        monitor().register(self)
        record = self.context.bind(self)
        try:
            self._chunks = self.context.run(self.encoding.of, self._source)
            self._make_first()
        except HTTPException as response:
            self._end_by_response(response, vetoed)
            raise
        except StreamEnding:
            pass  # it ends below
        except BaseException as error:
            self._fail(error)
        finally:
            self.context.unbind(record)
            if self._state is State.STARTING:
                self._release()

    def _make_first(self) -> None:
        run, chunks = self.context.run, self._chunks
        first = run(next, chunks, None)
        self._length = self.plan.length()  # may be set before the first yield
        if self._length is not None:
            self._chunks = self.encoding.measured(first, chunks, self._length)
            first = run(next, self._chunks, None)
        self._first = first
        if first is not None:
            self.chunks, self.bytes = 1, len(first)
            self.first_chunk_seconds = clock() - self.started
        if first is None or self.encoding.last:
            self._end("completed")
        elif not self._watched:
            self._watch()

    @property
    def complete(self) -> bytes | None:
        """The whole body, if it ended with the first pull."""
        return (self._first or b"") if self.reason == "completed" else None

    @property
    def length(self) -> int | None:
        """The bytes of the whole body, where they are known after the first pull."""
        return self._length if self.complete is None else len(self.complete)

    def iterate(self, owner: Any) -> Iterator[bytes]:
        """The chunks, each pulled with everything bound and nothing left on the thread.

        A generator, which costs a pull less than a method. It has nothing to clean up:
        :meth:`close` ends the stream, also if this generator was never started.

        :param owner: must not be dropped while the server iterates.
        :raises StreamError: when the stream has ended early, or is iterated twice.
        """
        chunk = self._take_first()
        if chunk is not None:
            yield chunk
        if self.reason == "completed":
            return
        advise_if_buffered(self)
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
                if not self._end_by_client(error):
                    self._fail(error)
                return
            finally:
                unbind(record)
            token.append(None)  # as _release() does, without its call
            if self.closing is not None:
                self._read_note()
                if not chunk:
                    break
            yield chunk
        yield from self._refuse()

    def _take_first(self) -> bytes | None:
        """The first chunk, when the server begins; None if it must not have it."""
        chunk, self._first = self._first, None
        if chunk is None:
            if self.reason is None and self.closing is None:
                raise self._iterated_twice()
            # Some servers answer 500 where there is no chunk.
            return b"" if self.reason == "completed" else None
        if self.reason in ("failed", "disconnected"):
            return None
        if self.outcome is not None:
            self.outcome.started = True
            if self.reason is None:  # TG took it away when the response left
                self.context.environ["tg.locals"] = self.context.tg_locals
        return chunk

    def _iterated_twice(self) -> StreamError:
        return StreamError(
            f"{self.plan.controller} is iterated twice at once. Iterate a response "
            "once, on one thread at a time"
        )

    def _refuse(self) -> Iterator[bytes]:
        """End the iteration of a stream that was ended early.

        :raises StreamError: unless the format's body may end anywhere.
        """
        if self.closing is None and self.reason is None:
            raise self._iterated_twice()
        self._end_if_asked()
        error = _report.ended_early(self)
        if self.outcome is not None:
            self.outcome.error = error
        if error is not None:
            raise error
        if not self.chunks:
            yield b""  # as above

    def settle(self) -> None:
        """Commit the items whose chunk is about to leave."""
        if self.database is not None:
            self.database.commit_items()

    def exhaust(self) -> None:
        """Commit where the items run out, before an ending tells that all is there."""
        close(self.encoding.iterator)  # a format may have stopped before they did
        self._close_source()
        if self.database is None:
            return
        if not self.plan.manual:
            self.database.commit_items()
        elif left := self.database.count_uncommitted():
            _report.tell_left(self.plan.controller, left)

    # The end.

    def close(self, reason: Reason = "disconnected") -> None:
        """End the stream; while a pull runs elsewhere, when that pull returns.

        :raises BaseException: nothing but a kill or a timeout of gevent that came while
            it ended; the stream has ended all the same.
        """
        if self.ended or (is_collecting() and monitor().hand_over(self)):
            return
        self.ask_to_end(reason)
        self._end_if_asked()

    def drop(self) -> None:
        """End the stream, maybe from a finaliser.

        Under gevent the monitor ends it. An end can switch to another greenlet, and a
        finaliser swallows the timeout or kill that a switch raises.
        """
        if self.ended:
            return
        if has_greenlets():
            self.ask_to_end("disconnected")
            if not self.idle or monitor().hand_over(self):
                return
        self.close()

    def close_as_wrapper(self) -> None:
        """End the stream for whoever has wrapped it: a server, a middleware of TG.

        TG's middlewares are generators. If they are dropped, their ``finally`` closes
        the stream in a finaliser. The guard knows whether the server has closed them.
        """
        if self.outcome is None or self.outcome.closing:
            self.close()
        else:
            self.drop()

    def fail(self, error: BaseException, in_request: bool = False) -> None:
        """End an idle stream whose response cannot be sent, unless it has ended.

        :param error: the reason; it is not raised.
        :param in_request: whether an error page may still use the request's objects.
        """
        if not self._acquire():
            return
        if in_request:
            self._state = State.STARTING
        record = self.context.bind(self)
        try:
            self._finish("failed", error)
        finally:
            self.context.unbind(record)

    def cancel(self) -> None:
        """End a stream whose request failed before it began, without a report."""
        self._end("failed", silent=True)

    def _end_if_asked(self) -> None:
        if self._disowned or self.closing is None or not self._acquire():
            return
        record = self.context.bind(self)
        try:
            error = self._finish(self.closing)
        finally:
            self.context.unbind(record)
        if error is not None and _report.is_of_gevent(error):
            raise error

    def _end_by_response(
        self, response: HTTPException, vetoed: Callable[[HTTPException], bool]
    ) -> None:
        """End as TG ends a request: a response is not a failure, and has no report."""
        try:
            if not (self.plan.manual or vetoed(response)):
                self.context.run(self.settle)
        except BaseException as error:
            self._fail(error)
        self._end("completed", silent=True)

    def _end_by_client(self, error: BaseException) -> bool:
        """End for an error that the client caused by leaving; False for any other.

        The server is to abort the transfer all the same, but an error page, a mail to
        the administrator and a traceback would be for nobody.
        """
        outcome = self.outcome
        if outcome is None or not self._is_of_client(error):
            return False
        self._end("disconnected")
        _report.log_disconnect(self.plan.controller, error)
        outcome.error = ConnectionResetError(
            errno.ECONNRESET, f"the client of {self.plan.controller} has disconnected"
        )
        return True

    def _is_of_client(self, error: BaseException) -> bool:
        return isinstance(error, Exception) and (
            self.closing == "disconnected"
            or isinstance(error, DisconnectionError)  # an upload that was cut
            or has_left(self.context.environ)
        )

    def _fail(self, error: BaseException) -> NoReturn:
        """End for an error, and raise it."""
        if self._disowned:
            _report.leave_child(self.plan.controller, error)
        if self.database is not None:
            error = self.database.translate_error(self.plan.controller, error)
        error = _report.as_error(self.plan.controller, error)
        if self.outcome is None and self._is_of_client(error):
            self._end("disconnected")
        else:
            self._end("failed", error)
        raise error

    def _end(
        self, reason: Reason, error: BaseException | None = None, silent: bool = False
    ) -> None:
        """End as the owner, if it has not ended."""
        if self._disowned:
            _report.leave_child(self.plan.controller, error)
        if self._state not in (State.ENDING, State.ENDED):
            self._finish(reason, error, silent)

    def _finish(
        self, reason: Reason, error: BaseException | None = None, silent: bool = False
    ) -> BaseException | None:
        """End, as the owner, who never returns the token. Returns the first error."""
        give_back = self._state is State.STARTING
        self._state, self.reason = State.ENDING, reason
        if self.outcome is not None:
            self.outcome.cut = reason == "disconnected"  # at once, for who pulls on
        try:
            error = self.context.run(self._run_steps, error, silent, give_back)
        finally:
            self._state = State.ENDED
            monitor().forget(self)
        if self.seat is not None:
            self.seat.leave()
        if self.outcome is None:
            return error  # still in the request: TG itself takes tg.locals away
        self.outcome.body = None  # so that neither keeps the other
        self.outcome.unfinished = reason != "completed"
        if reason == "failed":
            self.outcome.error = error
        else:
            self.context.environ.pop("tg.locals", None)
        return error

    def _run_steps(
        self, error: BaseException | None, silent: bool, give_back: bool
    ) -> BaseException | None:
        """The steps of an end. The first error of all of them is returned."""

        def release() -> None:
            if self.database is not None:
                self.database.release(give_back)

        closes = lambda: close(self._chunks), self.encoding.close
        error = first_error([*closes, self._close_source, release], error)
        if not silent:
            first_error(
                [lambda: _report.tell_late(self), lambda: _report.tell(self, error)]
            )
            first_error([release])  # of what a hook made use of
        return error

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not self.encoding.iterator:
            close(source)
