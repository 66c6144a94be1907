"""A request with a probe, pulled as a server does, and what arrived.

Rule: it sees what a server sees, and no more.
"""

from __future__ import annotations

import contextlib
import io
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tg.support.registry import Registry
from webob import Request
from webob.headers import ResponseHeaders

from ..core.cleanup import close
from .middleware_trace import KEY
from .probe import SIZE, Probe, items


class Exchange:
    """One request and its response, of which nothing is read that was not asked for.

    :param app: the application, or what is inside of it.
    :param path: what is asked for.
    :param probe: what answers.
    :param headers: of the request.
    :param lenient: whether a second ``start_response`` is taken, as some servers do.
    :param inside: whether ``app`` may need what is put around TurboGears.
    """

    def __init__(
        self,
        app: Any,
        path: str,
        probe: Probe,
        headers: dict[str, str] | None = None,
        lenient: bool = False,
        inside: bool = False,
    ) -> None:
        self.probe = probe
        self.status = ""
        self.headers = ResponseHeaders()
        self.received = b""
        self.after_restart = b""
        """What came after a second ``start_response``."""
        self.error: Exception | None = None
        self._lenient = lenient
        self._sent = self._restarted = False
        self._decoder: Any = None
        environ = Request.blank(path, headers=headers).environ
        self.errors = io.StringIO()
        environ |= {
            KEY: probe,
            "wsgi.errors": self.errors,
            "wsgi.multithread": True,
            "REMOTE_ADDR": "127.0.0.1",
        }
        self._registry = Registry()
        if inside:
            environ["paste.registry"] = self._registry
            self._registry.prepare()
        self.body: Any = None
        self._chunks: Iterator[bytes] = iter(())
        with self._told():
            self.body = app(environ, self._start_response)
            self._chunks = iter(self.body)

    def _start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if self._sent and exc_info is not None:
            raise exc_info[1]
        if self._sent and not self._lenient:
            raise AssertionError("start_response was called again")
        self._restarted = self._sent
        if not self._sent:
            self.status, self.headers = status, ResponseHeaders(headers)
            if self.headers.get("Content-Encoding") in ("gzip", "x-gzip", "deflate"):
                self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
        return self._take

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error

    def _take(self, chunk: bytes) -> None:
        self._sent = self._sent or bool(chunk)
        if self._restarted:
            self.after_restart += chunk
        elif self._decoder is not None:
            self.received += self._decoder.decompress(chunk)
        else:
            self.received += chunk

    def pull(self) -> bool:
        """Take the next chunk; False where there is none any more."""
        with self._told():
            for chunk in self._chunks:
                self._take(chunk)
                return True
        return False

    def pull_elsewhere(self) -> int:
        """Take the next chunk on another thread, whose ident it returns."""

        def pull() -> int:
            self.pull()
            return threading.get_ident()

        with ThreadPoolExecutor(1) as other:
            return other.submit(pull).result()

    def pull_first(self) -> int:
        """Take what there is until the first item has arrived.

        :returns: how many items were made by then.
        """
        while not self._has_first() and self.pull():
            pass
        return self.probe.made

    def _has_first(self) -> bool:
        """Whether the first item is there, or some of what became of it."""
        is_same = items()[0].startswith(self.received[:SIZE])
        return len(self.received) >= (SIZE if is_same else 1)

    def read(self) -> None:
        """Take all there is, and close."""
        while self.pull():
            pass
        self.end()

    def end(self) -> None:
        """Close the body and let go of it."""
        self.close()
        self.drop()

    def close(self) -> None:
        """Close the body, as a server does."""
        with self._told():
            close(self.body)
        if len(self._registry.reglist) == 1:  # more are for others to clean up
            with self._told():
                self._registry.cleanup()

    def drop(self) -> None:
        """Let go of the body."""
        self._chunks = iter(())  # what start_response() belongs to may keep us
        self.body = None
