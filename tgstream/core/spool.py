"""A body that is made whole before it is sent: ``spool=True``.

Inside the request the whole body is written to an anonymous temporary file, at the
speed of the generator. Then the stream commits and gives back its sessions and its
slot, and the file is the source of what the server pulls. So a slow client holds
nothing but the file.

- *Everything that can fail comes before the first byte*: the generator, the format, the
  disk and, as the last step, the commit. Each failure is an ordinary error of the
  request, and rolls back what is not committed.
- *The file has no name.* It goes with its last descriptor, also if the process is
  killed.
- *One stream has one report*, at the end of the sending. Its items and commits are
  those of the generator, and its chunks and bytes are those that the server got.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from typing import Any

from webob.exc import HTTPClientError

from . import report as reports
from .body import ENDING, Body
from .errors import StreamError
from .files import FileParts
from .monitor import has_disconnected
from .options import SpoolSettings

MEMORY = 1 << 20
"""Bytes up to which a spooled body is kept in memory."""


class Spool:
    """The anonymous temporary file of one body. It is in memory while it is small.

    It is written, then finished, and then it can be read like a file.

    :param controller: for error messages.
    :param settings: the directory, and the maximum size.
    """

    def __init__(self, controller: str, settings: SpoolSettings) -> None:
        self._file: Any = BytesIO()
        self.size = 0
        """The bytes that were written."""
        # 0.8 ns a byte. With a weaker hash two bodies could have the same ETag, and a
        # client would join parts of both.
        self._hash = sha256()
        self._controller = controller
        self._directory, self._max_bytes = settings

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        :raises StreamError: when the body is too large, or cannot be written.
        """
        size = self.size + len(chunk)
        if 0 < self._max_bytes < size:
            raise StreamError(
                f"{self._controller} yielded more than {self._max_bytes} bytes, the "
                "maximum of a spooled stream. Raise tgstream.spool_max_bytes, or omit "
                "spool=True"
            )
        try:
            if size > MEMORY >= self.size:
                self._leave_memory()
            self._file.write(chunk)
        except OSError as error:
            raise self._as_stream_error(error) from error
        self._hash.update(chunk)
        self.size = size

    def _leave_memory(self) -> None:
        start = self._file
        self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
        self._file.write(start.getbuffer())

    def finish(self) -> None:
        """Write out what is buffered, and go to the beginning.

        :raises StreamError: when it cannot be written.
        """
        try:
            self._file.seek(0)
        except OSError as error:
            raise self._as_stream_error(error) from error

    def _as_stream_error(self, error: OSError) -> StreamError:
        directory = self._directory or tempfile.gettempdir()
        return StreamError(
            f"{self._controller} cannot spool its response to {directory}, after "
            f"{self.size} bytes: {error}. Make room there, or set "
            "tgstream.spool_directory to a directory with more room"
        )

    def make_etag(self, *representation: str) -> str:
        """Return a strong ``ETag`` of the content, without quotes (RFC 9110, 8.8.3).

        :param representation: more than the content that makes two bodies different,
            such as the content type.
        """
        hashed = self._hash.copy()
        for value in representation:
            hashed.update(b"\0" + value.encode())
        return hashed.hexdigest()[:32]

    def seek(self, position: int) -> None:
        """Go to a position, counted from the beginning."""
        self._file.seek(position)

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes."""
        data: bytes = self._file.read(size)
        return data

    def close(self) -> None:
        """Delete the file.

        It never fails. If the disk is full, the file cannot write what it has buffered.
        If the response was dropped, Python may be closing the file on another thread.
        """
        with suppress(OSError, ValueError):
            self._file.close()


class SpooledBody(Body):
    """A body that is sent only after all of it was made, in the request.

    :param respond: sets the status and the headers of the response to the whole body,
        and returns the parts of it that the client gets.
    :param options: those of :class:`Body`.
    """

    _spool: Spool | None = None

    def __init__(
        self, *args: Any, respond: Callable[[Spool], FileParts], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._respond = respond

    def _make_first(self) -> bytes | None:
        """Make the whole body. Returns the first chunk of the response."""
        return self._begin_sending(self._respond(self._make_all()))

    def _make_all(self) -> Spool:
        assert self.plan.spool is not None
        self._spool = spool = Spool(self.plan.controller, self.plan.spool)
        chunk = super()._make_first()
        while chunk is not None:
            spool.write(chunk)
            self.chunks += 1
            self.bytes = spool.size
            self.checkpoint()
            chunk = next(self._chunks, None)
        spool.finish()
        super().finish_items()
        if self.transaction is not None:
            self.transaction.release(True)
        if self.slot is not None:
            self.slot.release()
        return spool

    def finish_items(self) -> None:
        """Do nothing yet: the last commit comes when the whole body is written."""

    def _begin_sending(self, parts: FileParts) -> bytes | None:
        self._source = self.file = parts
        self._chunks = (block for block in parts)
        self._length = parts.length
        self.chunks = self.bytes = 0
        self.encoding.iterator = None
        first = next(self._chunks, None)
        self.encoding.last = first is not None and len(first) == parts.length
        return first

    def _end_before_first(self) -> None:
        """End in the request, which an error page can still use.

        :raises StreamError: with the reason.
        :raises ClientClosedRequest: when nobody would read an error page.
        """
        assert self.closing is not None
        self._end(self.closing)
        if has_disconnected(self.context.environ):
            raise ClientClosedRequest
        name, seconds = self.plan.controller, self.plan.max_seconds
        raise StreamError(
            reports.describe_early_end(name, self.closing, seconds, self.detail)
        )

    def _close_source(self) -> None:
        super()._close_source()
        if self._state is ENDING and self._spool is not None:
            self._spool.close()


class ClientClosedRequest(HTTPClientError):
    """The response to a client that has disconnected. Only an access log has it."""

    code = 499
    title = "Client Closed Request"
