"""A stream whose permission is evaluated again while it runs.

The evaluation runs on the thread of the server, between two pulls, before a chunk or a
heartbeat is sent. Nothing of the stream is bound to the thread then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from .options import clock
from .report import Reason, as_error, log


class Checked(Protocol):
    """The body of a stream, as a check uses it."""

    started: float

    def close(self, reason: Reason) -> None: ...


class Recheck:
    """Ends a stream whose permission was withdrawn.

    An evaluation that raises an error is tolerated once. The second one in a row ends
    the stream.

    :param controller: the name of the controller, for the log.
    :param seconds: minimum seconds between two evaluations.
    :param is_permitted: evaluates the permission.
    """

    _has_failed = False

    def __init__(
        self, controller: str, seconds: float, is_permitted: Callable[[], bool]
    ) -> None:
        self._controller = controller
        self._seconds = seconds
        self._is_permitted = is_permitted

    def iterate(self, chunks: Iterator[bytes], body: Checked) -> Iterator[bytes]:
        """Yield the chunks, until the permission is withdrawn.

        :param chunks: the chunks of ``body``, maybe with heartbeats between them.
        """
        due, sent = body.started + self._seconds, False
        for chunk in chunks:
            if (now := clock()) >= due:
                if not self._may_continue():
                    break
                due = now + self._seconds
            yield chunk
            sent = True
        else:
            return
        body.close("refused")
        yield from chunks  # they end, or raise the error of an aborted response
        if not sent:
            yield b""  # some servers answer 500 if there is no chunk

    def _may_continue(self) -> bool:
        try:
            is_permitted = self._is_permitted()
        except BaseException as raised:
            error = as_error(self._controller, raised)
            if not isinstance(error, Exception):
                raise
            return self._tolerate(error)
        self._has_failed = False
        return is_permitted

    def _tolerate(self, error: Exception) -> bool:
        """Log the error of an evaluation. True if it is the first one in a row."""
        if self._has_failed:
            log.error(
                "%s: its permission could not be checked twice in a row, so the stream "
                "ends as refused: %r",
                self._controller,
                error,
                exc_info=error,
            )
            return False
        self._has_failed = True
        log.warning(
            "%s: its permission could not be checked again: %r. The stream ends if the "
            "next check in %g s fails, too",
            self._controller,
            error,
            self._seconds,
        )
        return True
