"""The body of a streamed response: its states, the pull, the order of cleanup.

Rule: whatever happens to a stream, it ends once, for one reason, in one order: close
the generator, commit or abort, release the sessions, report. Each step runs even though
the one before failed, and the first error is the one reported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from webob.exc import HTTPException

from . import _report
from ._advice import advise_if_buffered
from ._chunks import Chunks
from ._cleanup import close, first_error
from ._context import Context
from ._options import StreamError
from ._plan import Plan, clock
from ._report import Outcome, Reason
from ._watch import watch

if TYPE_CHECKING:
    from ._database import Database
    from ._seats import Seat


class Body:
    """One run of a stream, in one request.

    :param source: what the items come from.
    :param plan: how they become chunks.
    :param tg_locals: TG's ``RequestLocals`` of the request.
    :param database: the stream's sessions and transaction, if the application has any.
    """

    def __init__(
        self, source: Any, plan: Plan, tg_locals: Any, database: Database | None
    ) -> None:
        self.plan = plan
        self.context = Context(tg_locals, database)
        self.database = database
        self.encoding = Chunks(plan, self)
        self.outcome: Outcome | None = None
        self.late: Callable[[], list[str]] | None = None
        self.seat: Seat | None = None
        self.chunks = self.bytes = 0
        self.reason: Reason | None = None
        self.running = self.left = self.ended = self._priming = False
        self._source = source
        self._chunks: Iterator[bytes] = iter(())
        self._first: bytes | None = None
        self.closing: Reason | None = None
        self._ending = threading.Lock()
        self.started = clock()
        self.expires = self.started + plan.lifetime()
        self.first_chunk_seconds: float | None = None

    def prime(self, vetoed: Callable[[HTTPException], bool]) -> None:
        """Make the first chunk inside the request, where it can still fail as one.

        :param vetoed: whether TG would abort the transaction for an HTTP exception.
        :raises Exception: what the generator raises; the stream has then ended.
        """
        self._priming = self.running = True
        record = self.context.bind()
        try:
            self._chunks = self.encoding.of(self._source)
            self._make_first()
        except HTTPException as response:
            self._end_by_response(response, vetoed)
            raise
        except BaseException as error:
            self._fail(error)
        finally:
            self.context.unbind(record)
            self._priming = self.running = False
            self._close_if_asked()

    def _make_first(self) -> None:
        self._first = next(self._chunks, None)
        if self._first is not None:
            self.chunks, self.bytes = 1, len(self._first)
            self.first_chunk_seconds = clock() - self.started
        if self._first is None or self.encoding.last:
            self._end("completed")
        else:
            watch(self)

    @property
    def complete(self) -> bytes | None:
        """The whole body, if it ended with the first pull."""
        return (self._first or b"") if self.reason == "completed" else None

    def serve(self, owner: Any) -> Iterator[bytes]:
        """The chunks, each pulled with everything bound and nothing left on the thread.

        A generator, which costs a pull less than a method; the end is told to
        :meth:`close`, which is heard even when this one was never begun.

        :param owner: who must not be dropped while the server iterates.
        :raises StreamError: when there is more than it may give.
        """
        chunk, self._first = self._first, None
        if chunk is None and self.reason is None:
            raise StreamError(f"{self.plan.controller} is iterated twice at once")
        if chunk is not None and self.reason not in ("failed", "disconnected"):
            self._start_serving()
            yield chunk
        if self.reason == "completed":
            if chunk is None:
                yield b""  # some servers answer 500 where there is no chunk
            return
        advise_if_buffered(self)
        chunks, bind, unbind = self._chunks, self.context.bind, self.context.unbind
        while True:
            self.running = True
            if self.closing is not None:  # looked at after: it may be another thread's
                self._refuse()
                return
            record = bind()
            try:
                chunk = next(chunks)
                self.chunks += 1
                self.bytes += len(chunk)
            except StopIteration:
                self._end("completed")
                return
            except BaseException as error:
                self._fail(error)
            finally:
                unbind(record)
                self.running = False
                if self.closing is not None:
                    self._close_if_asked()
            yield chunk

    def _start_serving(self) -> None:
        if self.outcome is not None:
            self.outcome.started = True
            if self.reason is None:  # TG took it away when the response left
                self.context.environ["tg.locals"] = self.context.tg_locals

    def _refuse(self) -> None:
        """Let nobody who pulls a closed stream take what there was for the whole."""
        self.running = False
        self._close_if_asked()
        error = _report.ended_early(self)
        if self.outcome is not None:
            self.outcome.error = error
        if error is not None:
            raise error

    def close(self, reason: Reason = "disconnected") -> None:
        """End the stream; while a pull runs elsewhere, when that pull returns."""
        self.closing = self.closing or reason  # the first to ask is the one told
        if not self.running:
            self._close_if_asked()

    def _close_if_asked(self) -> None:
        if self.closing is None or not self._ending.acquire(blocking=False):
            return
        self.running = True
        record = self.context.bind()
        try:
            self._finish(self.closing)
        finally:
            self.context.unbind(record)
            self.running = False

    def abandon(self) -> None:
        """End what never began, because the request failed before; nothing is told."""
        self._end("failed", silent=True)

    def settle(self) -> None:
        """Commit the items whose chunk is about to leave."""
        if self.database is not None:
            self.database.settle()

    def exhaust(self) -> None:
        """Commit where the items run out, before an ending tells that all is there."""
        close(self.encoding.iterator)  # a format may have stopped before they did
        self._close_source()
        if self.database is None:
            return
        if not self.plan.manual:
            self.database.settle()
        elif left := self.database.left():
            _report.tell_left(self.plan.controller, left)

    def _end_by_response(
        self, response: HTTPException, vetoed: Callable[[HTTPException], bool]
    ) -> None:
        """End as TG ends a request: a response is no failure, and nothing is told."""
        try:
            if not (self.plan.manual or vetoed(response)):
                self.settle()
        except BaseException as error:
            self._fail(error)
        self._end("completed", silent=True)

    def _fail(self, error: BaseException) -> NoReturn:
        """End for an error, and raise it."""
        if self.database is not None and self.database.cursor_ended(error):
            error = _report.cursor_ended(self.plan.controller, error)
        error = _report.as_error(self.plan.controller, error)
        self._end("failed", error)
        raise error

    def _end(
        self, reason: Reason, error: BaseException | None = None, silent: bool = False
    ) -> None:
        if self._ending.acquire(blocking=False):
            self._finish(reason, error, silent)

    def _finish(
        self, reason: Reason, error: BaseException | None = None, silent: bool = False
    ) -> None:
        """End, by the one who has ``_ending``."""
        self.reason = reason
        closes = lambda: close(self._chunks), self.encoding.close
        error = first_error([*closes, self._close_source, self._release], error)
        if not silent:
            first_error(
                [lambda: _report.tell_late(self), lambda: _report.tell(self, error)]
            )
            first_error([self._release])  # of what a hook made use of
        self.ended = True
        if self.seat is not None:
            self.seat.leave()
        if self.outcome is None:
            return  # still in the request: TG itself takes tg.locals away
        self.outcome.body = None  # so that neither keeps the other
        self.outcome.cut = reason == "disconnected"
        if reason == "failed":
            self.outcome.error = error
        else:
            self.context.environ.pop("tg.locals", None)

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not self.encoding.iterator:
            close(source)

    def _release(self) -> None:
        if self.database is not None:
            self.database.release(give_back=self._priming)
