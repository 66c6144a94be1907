"""A client that sends one request with a probe, and reads the response as a server."""

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
from .middleware_trace import ENVIRON_KEY
from .probe import ITEM_SIZE, Probe, probe_items


class Exchange:
    """One request and its response. Its methods decide how much of the body is read.

    :param app: the application, or a layer inside of it.
    :param path: the path to request.
    :param probe: produces the response.
    :param headers: of the request.
    :param allows_restart: whether ``start_response`` may be called twice, which some
        servers allow.
    :param is_inner: whether ``app`` is a layer, which may need the registry that the
        layers around TurboGears provide.
    """

    def __init__(
        self,
        app: Any,
        path: str,
        probe: Probe,
        headers: dict[str, str] | None = None,
        allows_restart: bool = False,
        is_inner: bool = False,
    ) -> None:
        self.probe = probe
        self.status = ""
        self.headers = ResponseHeaders()
        self.received = b""
        """The data, decompressed."""
        self.after_restart = b""
        """The data after a second ``start_response``."""
        self.error: Exception | None = None
        """The last error that the application raised."""
        self._allows_restart = allows_restart
        self._sent = self._restarted = False
        self._decoder: Any = None
        environ = Request.blank(path, headers=headers).environ
        self.errors = io.StringIO()
        environ |= {
            ENVIRON_KEY: probe,
            "wsgi.errors": self.errors,
            "wsgi.multithread": True,
            "REMOTE_ADDR": "127.0.0.1",
        }
        self._registry = Registry()
        if is_inner:
            environ["paste.registry"] = self._registry
            self._registry.prepare()
        self.body: Any = None
        self._chunks: Iterator[bytes] = iter(())
        with self._record_error():
            self.body = app(environ, self._start_response)
            self._chunks = iter(self.body)

    def _start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if self._sent and exc_info is not None:
            raise exc_info[1]
        if self._sent and not self._allows_restart:
            raise AssertionError("start_response was called again")
        self._restarted = self._sent
        if not self._sent:
            self.status, self.headers = status, ResponseHeaders(headers)
            if self.headers.get("Content-Encoding") in ("gzip", "x-gzip", "deflate"):
                self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
        return self._receive

    @contextlib.contextmanager
    def _record_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error

    def _receive(self, chunk: bytes) -> None:
        self._sent = self._sent or bool(chunk)
        if self._restarted:
            self.after_restart += chunk
        elif self._decoder is not None:
            self.received += self._decoder.decompress(chunk)
        else:
            self.received += chunk

    def pull(self) -> bool:
        """Read the next chunk.

        :returns: False at the end of the body.
        """
        with self._record_error():
            for chunk in self._chunks:
                self._receive(chunk)
                return True
        return False

    def pull_on_thread(self) -> int:
        """Read the next chunk on another thread.

        :returns: the ident of that thread.
        """

        def pull() -> int:
            self.pull()
            return threading.get_ident()

        with ThreadPoolExecutor(1) as executor:
            return executor.submit(pull).result()

    def pull_first_item(self) -> int:
        """Read until the first item of the probe has arrived.

        :returns: the number of items that the probe has produced by then.
        """
        while not self._has_first_item() and self.pull():
            pass
        return self.probe.produced

    def _has_first_item(self) -> bool:
        """Whether the whole first item has arrived, or a byte of a modified one."""
        is_same = probe_items()[0].startswith(self.received[:ITEM_SIZE])
        return len(self.received) >= (ITEM_SIZE if is_same else 1)

    def read(self) -> None:
        """Read the rest of the body, and close it."""
        while self.pull():
            pass
        self.end()

    def end(self) -> None:
        """Close the body and drop it."""
        self.close()
        self.drop()

    def close(self) -> None:
        """Close the body, as a server does."""
        with self._record_error():
            close(self.body)
        if len(self._registry.reglist) == 1:  # others clean up the rest
            with self._record_error():
                self._registry.cleanup()

    def drop(self) -> None:
        """Drop the references to the body."""
        self._chunks = iter(())  # the application may keep start_response and so us
        self.body = None
