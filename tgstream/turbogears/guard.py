"""The way out: what makes a broken stream arrive broken, whatever stands around it.

Rule: only what happens between the application's return and the server is told here.
PEP 3333 forbids a second ``start_response`` without ``exc_info``; backlash calls it,
and ends a failed body as if it were whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..core.body import Body
from ..core.cleanup import close, first_error
from ..core.errors import StreamError
from .diagnostics import OUTCOME_KEY

if TYPE_CHECKING:
    pass


class Outcome:
    """What the outside of the application must know of the stream that left it."""

    started = responded = cut = False
    closing = False
    """Whether the server closes the response, also where nobody can tell."""
    answered = False
    """Whether a middleware has begun another response because the stream failed."""
    bodiless = False
    """Whether the response to this request has no body, and no bytes are sent."""
    length: int | None = None
    """The Content-Length of a response without a body, if it was declared."""
    unfinished = False
    """Whether a stream has left with the response, and has not run to its end."""
    body: Body | None = None
    error: BaseException | None = None
    refusal: BaseException | None = None
    """What the server's ``start_response`` raised, and no later call made good."""

    @property
    def lost(self) -> bool:
        """Whether the stream failed and no middleware has answered for it."""
        return self.error is not None and not self.answered

    def raise_error(self) -> None:
        """Raise the error again, where it was swallowed on the way out."""
        if self.lost:
            raise self.error  # type: ignore[misc]
        if self.refusal is not None:
            raise self.refusal

    def close(self) -> None:
        """Close the stream, if it has not ended."""
        if self.body is not None:
            self.body.close()


class Guard:
    """WSGI middleware outside everything of TG: a stream's failure gets through it."""

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
                write = start_response(status, headers, *filter(None, [exc_info]))
            except BaseException as error:
                outcome.refusal = outcome.refusal or error
                raise
            outcome.refusal = None
            outcome.answered = outcome.error is not None
            outcome.responded = True
            return write

        # No variable for the body: an error's traceback holds this frame, and a body
        # that is dropped must end at once.
        return _guarded(self.app(environ, start_once), outcome)


def _check_second(outcome: Outcome, status: str) -> None:
    """Raise where a call of ``start_response`` would hide how the stream ended."""
    if outcome.started and outcome.responded:
        raise AssertionError(
            "start_response was called again, without exc_info, after the "
            "stream's first chunk (PEP 3333 forbids it)"
        )
    if status.startswith("2"):  # of a middleware that has read all of it
        outcome.raise_error()


def _without_foreign_length(headers: Any, length: int | None) -> Any:
    """The headers, without the length that a middleware has counted of no body."""
    own = None if length is None else str(length)
    return [
        (name, value)
        for name, value in headers
        if name.lower() != "content-length" or value == own
    ]


def _guarded(body: Any, outcome: Outcome) -> Any:
    if outcome.lost:  # a middleware has read the stream before it returned
        first_error([lambda: close(body)])
        outcome.raise_error()
    # A debugger begins, and responds, only when its body is iterated.
    if outcome.unfinished or outcome.bodiless or not outcome.responded:
        return _Guarded(body, outcome)
    return body


class _Guarded:
    def __init__(self, body: Any, outcome: Outcome) -> None:
        self._body = body
        self._outcome = outcome
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        chunks = iter(self._body)
        first = next(chunks, None)  # a debugger responds with it
        if self._outcome.bodiless:
            for _ in chunks:
                pass
            yield b""  # some servers answer 500 where there is no chunk
        elif first is not None:
            yield first
            del first
            yield from chunks
        self._outcome.raise_error()
        # Closed from inside, it may be a 304: then nobody has pulled for more.
        if self._closed and self._outcome.cut:
            raise StreamError("the stream was closed before its end, and pulled again")

    def close(self) -> None:
        self._closed = self._outcome.closing = True
        try:
            close(self._body)
        except ValueError as error:  # TG's generators refuse while another thread pulls
            if str(error) != "generator already executing":
                raise
        finally:
            self._outcome.close()  # which those do not pass on that never began


class _Alarm:
    """Raises a stream's error where ``RegistryManager`` cleans up, outside backlash."""

    _is_preserved = False

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def _push_object(self, outcome: Outcome) -> None:
        """Nothing: registered to be told of the end."""

    def _pop_object(self, outcome: Outcome) -> None:
        self._outcome.raise_error()


class _Errors:
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


def outcome_of(environ: dict[str, Any]) -> Outcome:
    """The outcome of this request: the guard's, or a substitute for it."""
    outcome: Outcome | None = environ.get(OUTCOME_KEY)
    if outcome is not None:
        return outcome
    environ[OUTCOME_KEY] = outcome = Outcome()
    outcome.closing = True
    alarm = _Alarm(outcome)
    environ["paste.registry"].register(alarm, outcome)
    environ["wsgi.errors"] = _Errors(environ["wsgi.errors"], outcome)
    return outcome
