"""The error guard: a failed stream reaches the client as an incomplete response.

The guard is the outermost middleware of an application. Between a stream and the
server stand the middlewares of TurboGears and of the application. Some of them swallow
an error, or end the response as if it were complete:

- *A middleware calls* ``start_response`` *again, without* ``exc_info``. PEP 3333
  forbids it after the first chunk. backlash does it for its error page, so that the
  page would be appended to the data. The guard's ``start_response`` raises an
  ``AssertionError``.
- *A middleware swallows the error and ends the body.* The guard raises the error again
  when the body has ended, before the server writes the end of the response.
- *A middleware reads the whole body before it returns.* The guard refuses its 2xx
  response, and lets its error page through.
- *A middleware does not pass on* ``close()``, like a generator that was never started.
  The guard closes the stream itself.

The stream leaves the application with an :class:`Outcome`, which the guard reads. The
body reports to it by the methods of ``core.body.Observer``. An application that was
made before tgstream was imported has no guard. Then two objects of the request do a
part of its work: one in ``paste.registry``, outside of backlash, and one in
``wsgi.errors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from ..core.cleanup import close, run_all
from ..core.errors import StreamError
from ..core.files import BLOCK_SIZE
from .diagnostics import OUTCOME_KEY
from .file_wrapper import FileWindow, find_wrapper

if TYPE_CHECKING:
    from ..core.body import Body
    from ..core.files import FileParts


class LateChanges(Protocol):
    """Changes of a response and its session that the client cannot see."""

    def warn(self) -> None: ...


class Outcome:
    """How the stream of a request ended, for the guard outside of the application."""

    started = False
    """Whether the server has taken the first chunk."""
    responded = False
    """Whether the server has the status and the headers."""
    closing = False
    """Whether the server closes the response, or this is not known."""
    answered = False
    """Whether a middleware has begun another response because the stream failed."""
    bodiless = False
    """Whether the response to this request has no body, and no bytes are sent."""
    length: int | None = None
    """The Content-Length of a response without a body, if it was declared."""
    unfinished = False
    """Whether a stream has left with the response, and is not completed."""
    error: BaseException | None = None
    """The error of the stream."""
    headers: Any = ()
    """The headers that the server has got, until the guard has looked at them."""
    file: FileParts | None = None
    """The file that the stream sends, if it is one."""
    refusal: BaseException | None = None
    """The error of the server's ``start_response``, until a later call succeeds."""
    _body: Body | None = None
    _late_changes: LateChanges | None = None
    _disconnected = False

    def leave_with(self, body: Body, late_changes: LateChanges) -> None:
        """The response has left the application with ``body``.

        :param late_changes: warns at the end about changes that came too late.
        """
        self.unfinished, self._body, self._late_changes = True, body, late_changes
        if body.file is not None:
            self.file = body.file
        body.report_to(self)
        if body.ended:  # the monitor may have ended it before that
            self._body = self._late_changes = None

    # The methods of an Observer.

    def first_chunk(self, body: Body) -> None:
        self.started = True
        if body.reason is None:  # TG removed it when the response left
            body.context.environ["tg.locals"] = body.context.tg_locals

    def pull_failed(self, error: BaseException) -> None:
        self.error = error

    def ended(self, body: Body, error: BaseException | None) -> None:
        self._body = None  # so that neither keeps the other
        self._disconnected = body.reason == "disconnected"
        self.unfinished = body.reason != "completed"
        if body.reason == "failed":
            self.error = error
        else:
            body.context.environ.pop("tg.locals", None)
        late_changes, self._late_changes = self._late_changes, None
        if late_changes is not None:
            with suppress(BaseException):  # a warning changes nothing
                late_changes.warn()

    # For the guard.

    @property
    def disconnected(self) -> bool:
        """Whether the stream was closed before its end, or is being closed."""
        body = self._body
        return self._disconnected or (
            body is not None and body.reason == "disconnected"
        )

    @property
    def lost(self) -> bool:
        """Whether the stream failed and no middleware has answered for it."""
        return self.error is not None and not self.answered

    def raise_error(self) -> None:
        """Raise the error again, in case a middleware has swallowed it."""
        if self.error is not None and not self.answered:
            raise self.error
        if self.refusal is not None:
            raise self.refusal

    def close(self) -> None:
        """Close the stream, if it has not ended."""
        body = self._body  # another thread may end the stream between two byte codes
        if body is not None:
            body.close()


class Guard:
    """WSGI middleware, outermost: it lets the failure of a stream reach the server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "app":  # copy and pickle look before it is
            raise AttributeError(name)
        return getattr(self.app, name)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        # The outcome does not hold start_response, which on most servers holds environ.
        environ[OUTCOME_KEY] = outcome = Outcome()

        def start_once(status: str, headers: Any, exc_info: Any = None) -> Any:
            if exc_info is None:
                _check_second(outcome, status)
            if outcome.bodiless:
                headers = _without_foreign_length(headers, outcome.length)
            try:
                if exc_info is None:
                    write = start_response(status, headers)
                else:
                    write = start_response(status, headers, exc_info)
            except BaseException as error:
                outcome.refusal = outcome.refusal or error
                raise
            outcome.refusal = None
            outcome.answered = outcome.error is not None
            outcome.responded, outcome.headers = True, headers
            return write

        # No variable for the body: the traceback of an error holds this frame, and a
        # body that is dropped must end at once.
        return _guard_body(self.app(environ, start_once), outcome, environ)


def _check_second(outcome: Outcome, status: str) -> None:
    """Raise where a call of ``start_response`` would hide how the stream ended."""
    if outcome.started and outcome.responded:
        raise AssertionError(
            "start_response was called again, without exc_info, after the "
            "stream's first chunk (PEP 3333 forbids it)"
        )
    if status.startswith("2"):  # of a middleware that has read the whole body
        outcome.raise_error()


def _without_foreign_length(headers: Any, length: int | None) -> Any:
    """The headers, without a length that a middleware has counted of no body."""
    own = None if length is None else str(length)
    return [
        (name, value)
        for name, value in headers
        if name.lower() != "content-length" or value == own
    ]


def _guard_body(body: Any, outcome: Outcome, environ: dict[str, Any]) -> Any:
    if outcome.lost:  # a middleware has read the stream before it returned
        run_all([lambda: close(body)])
        outcome.raise_error()
    # A debugger begins, and responds, only when its body is iterated.
    if outcome.unfinished or outcome.bodiless or not outcome.responded:
        guarded = _GuardedBody(body, outcome)
        if outcome.file is not None and outcome.responded:
            return _let_server_send(guarded, outcome, environ)
        outcome.headers = ()
        return guarded
    return body


def _let_server_send(
    guarded: _GuardedBody, outcome: Outcome, environ: dict[str, Any]
) -> Any:
    """The server's own wrapper of the file, or the body if it must send the chunks."""
    body, file = outcome._body, outcome.file
    assert file is not None
    wrapper = None if body is None else find_wrapper(environ, file, outcome.headers)
    if body is None or wrapper is None or not guarded.passes_on(body.first):
        return guarded
    return wrapper(FileWindow(body, file, guarded.close), BLOCK_SIZE)


class _GuardedBody:
    """A body at whose end the error of its stream is raised."""

    _chunks: Iterator[bytes] | None = None  # if the first one was taken before

    def __init__(self, body: Any, outcome: Outcome) -> None:
        self._body = body
        self._outcome = outcome
        self._closed = False

    def passes_on(self, chunk: bytes | None) -> bool:
        """Take the first chunk. Whether it is ``chunk``, as the stream has made it."""
        chunks = iter(self._body)
        try:
            first = next(chunks, None)
        except BaseException:
            self.close()
            raise
        self._chunks = chain([] if first is None else [first], chunks)
        return first is chunk is not None

    def __iter__(self) -> Iterator[bytes]:
        outcome = self._outcome
        chunks = self._chunks or iter(self._body)
        first = next(chunks, None)  # a debugger responds with it
        if outcome.bodiless:
            for _ in chunks:
                pass
            yield b""  # some servers answer 500 if there is no chunk
        elif first is not None:
            yield first
            del first
            yield from chunks
        if outcome.error is not None or outcome.refusal is not None:
            outcome.raise_error()
        # Closed from inside, it may be a 304: then nobody has pulled for more.
        if self._closed and outcome.disconnected:
            raise StreamError("the stream was closed before its end, and pulled again")

    def close(self) -> None:
        self._closed = self._outcome.closing = True
        try:
            close(self._body)
        except ValueError as error:  # TG's generators refuse while another thread pulls
            if str(error) != "generator already executing":
                raise
        finally:
            self._outcome.close()  # a generator that never started does not


class _RaiseOnCleanup:
    """Raises a stream's error when ``RegistryManager`` cleans up, outside backlash."""

    _is_preserved = False

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def _push_object(self, outcome: Outcome) -> None:
        """Nothing: it is registered for the clean-up."""

    def _pop_object(self, outcome: Outcome) -> None:
        self._outcome.raise_error()


class _WatchedErrors:
    """``wsgi.errors``, which raises a stream's error when backlash swallows it."""

    def __init__(self, errors: Any, outcome: Outcome) -> None:
        self._errors = errors
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        return getattr(self._errors, name)

    def write(self, text: str) -> Any:
        written = self._errors.write(text)
        if "headers were already sent" in text:
            self._outcome.raise_error()
        return written


def get_outcome(environ: dict[str, Any]) -> Outcome:
    """The outcome of this request: the guard's, or a substitute for it."""
    outcome: Outcome | None = environ.get(OUTCOME_KEY)
    if outcome is not None:
        return outcome
    environ[OUTCOME_KEY] = outcome = Outcome()
    outcome.closing = True
    environ["paste.registry"].register(_RaiseOnCleanup(outcome), outcome)
    environ["wsgi.errors"] = _WatchedErrors(environ["wsgi.errors"], outcome)
    return outcome


def remember_error(error: BaseException, environ: dict[str, Any]) -> None:
    """Without a guard: have an error of ``start_response`` raised behind backlash."""
    if OUTCOME_KEY not in environ:
        outcome = Outcome()
        outcome.error = error
        environ["wsgi.errors"] = _WatchedErrors(environ["wsgi.errors"], outcome)
