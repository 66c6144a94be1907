"""Files that waitress sends itself, with its ``wsgi.file_wrapper``.

waitress then reads the file in its main thread as fast as the client takes it, so that
a slow client of a large file does not hold one of its few threads. It also sends more
than twice as fast, because it buffers nothing.

The wrapper must be the object that the server gets. TurboGears' middlewares put theirs
around each body, so the error guard returns the wrapper in their place, and only if
they have passed on the first chunk and the ``Content-Length`` unchanged. The chunks
after the first do not pass through the middlewares. A middleware that must see all
chunks can remove ``wsgi.file_wrapper`` from the environ.

Other servers get chunks. gunicorn's wrapper saves CPU time with threads, but cannot be
interrupted by ``max_seconds`` or ``drain()``, and is half as fast with gevent.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.body import Body
    from ..core.files import FileParts

MIN_BYTES = 1 << 20
"""Bytes from which a file is handed over. waitress buffers fewer in memory."""

_READ_SIZE = 1 << 18


def find_wrapper(environ: dict[str, Any], parts: FileParts, headers: Any) -> Any:
    """The server's wrapper, if it can send the parts of a file. Else None.

    :param parts: the source of the body.
    :param headers: those that the server has got.
    """
    if parts.length < MIN_BYTES:
        return None
    wrapper = environ.get("wsgi.file_wrapper")
    if getattr(wrapper, "__module__", None) != "waitress.buffers":
        return None
    lengths = [value for name, value in headers if name.lower() == "content-length"]
    if lengths != [str(parts.length)] or len(parts.parts) != 1:
        return None
    return wrapper


class FileWindow:
    """The only part of a file that a response sends, as a file for a server.

    :param body: the running stream of the file. Each read is one of its pulls.
    :param parts: the parts of the file, of which there is one.
    :param close: closes the response, with all middlewares.
    """

    def __init__(self, body: Body, parts: FileParts, close: Callable[[], None]) -> None:
        self._body = body
        self._parts = parts
        self._close = close
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_CUR: self._position, os.SEEK_END: self._parts.length}
        self._position = start.get(whence, 0) + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read some bytes, at most 64 KiB."""
        left = self._parts.length - self._position
        if size < 0 or size > left:
            size = left
        if not size:
            return b""
        data = self._body.read(self._parts.read_at, self._position, size)
        self._position += len(data)
        return data

    def close(self) -> None:
        """End the stream on another thread: hooks must not stop the main thread."""
        complete = self._position == self._parts.length
        try:
            threading.Thread(
                target=self._end, args=[complete], name="tgstream-end", daemon=True
            ).start()
        except RuntimeError:  # no thread can be started
            self._end(complete)

    def _end(self, complete: bool) -> None:
        self._body.finish_read(self._position, complete)
        self._close()
