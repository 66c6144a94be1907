"""The heartbeat of an event stream whose generator waits for its next event.

A generator cannot be interrupted while it waits, so it runs on a thread of its own. The
thread that pulls waits for the next chunk no longer than the interval of the heartbeat,
and then sends a comment. The generator makes one chunk for each chunk that the server
pulls, and never works ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

HEARTBEAT = b":\n\n"
"""A comment, which clients of an event stream ignore."""


class _Worker:
    """A thread (with gevent, a greenlet) that makes one chunk for each request."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._requests: SimpleQueue[bool] = SimpleQueue()  # False: no more will come
        self._done = threading.Event()
        self._chunk: bytes | None = None
        self._error: BaseException | None = None
        self._requested = False
        threading.Thread(
            target=self._run, args=(chunks,), name="tgstream-heartbeat", daemon=True
        ).start()

    def _run(self, chunks: Iterator[bytes]) -> None:
        while self._requests.get():
            self._chunk = None
            try:
                self._chunk = next(chunks, None)
            except BaseException as error:
                self._error = error
            self._done.set()

    def request(self) -> None:
        """Request the next chunk, unless it is requested already."""
        if not self._requested:
            self._requested = True
            self._done.clear()
            self._requests.put(True)

    def wait(self, seconds: float) -> bool:
        """Wait for the requested chunk. True if it is there in time."""
        return self._done.wait(seconds)

    def result(self) -> bytes | None:
        """The requested chunk, or None at the end.

        :raises BaseException: the error that the chunk raised instead.
        """
        self._requested = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._chunk

    def stop(self) -> None:
        """Let the thread end after the chunk that it makes now."""
        self._requests.put(False)


def add_heartbeats(
    chunks: Iterator[bytes],
    seconds: float,
    close: Callable[[], None],
    is_ending: Callable[[], bool],
) -> Iterator[bytes]:
    """Yield the chunks, and a comment whenever none has come for ``seconds``.

    If no thread can be started, the chunks come without a heartbeat.

    :param chunks: an iterator whose first chunk is made already.
    :param close: ends the stream. Called when this generator is closed or dropped.
    :param is_ending: whether the stream must end. It is called before a comment, and
        True ends the response.
    """
    first = next(chunks, None)
    if first is None:
        return
    yield first
    try:
        worker = _Worker(chunks)
    except RuntimeError:
        yield from chunks
        return
    del chunks  # only the thread holds it, so that it is freed with the thread
    try:
        while True:
            worker.request()
            if not worker.wait(seconds):
                if is_ending():
                    return  # the generator ends at its next yield
                yield HEARTBEAT
            elif (chunk := worker.result()) is None:
                return
            else:
                yield chunk
    finally:
        close()
        worker.stop()
