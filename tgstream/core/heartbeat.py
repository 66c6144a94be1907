"""A heartbeat for a generator that may wait long: it gets a thread of its own.

Rule: a pull waits for the next chunk no longer than a beat; the generator is asked for
one item when the server asks for one, and never for more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

BEAT = b":\n\n"
"""A comment, which clients of an event stream pass over."""


class _Puller:
    """A thread that takes one chunk each time it is asked (with gevent, a greenlet)."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._ready = threading.Event()
        self._chunk: bytes | None = None
        self._error: BaseException | None = None
        self.busy = False
        threading.Thread(
            target=self._run, args=(chunks,), name="tgstream-heart", daemon=True
        ).start()

    def _run(self, chunks: Iterator[bytes]) -> None:
        while self._asked.get():
            self._chunk = None
            try:
                self._chunk = next(chunks, None)
            except BaseException as error:
                self._error = error
            self._ready.set()

    def ask(self) -> None:
        """Begin with the next chunk, unless it is being made."""
        if not self.busy:
            self.busy = True
            self._ready.clear()
            self._asked.put(True)

    def is_ready(self, seconds: float) -> bool:
        """Whether the chunk is made, once it is, or the time has passed."""
        return self._ready.wait(seconds)

    def take(self) -> bytes | None:
        """The chunk; None at the end.

        :raises BaseException: what was raised while it was made.
        """
        self.busy = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._chunk

    def end(self) -> None:
        """Let the thread end, when its chunk is made."""
        self._asked.put(False)


def beating(
    chunks: Iterator[bytes],
    seconds: float,
    close: Callable[[], None],
    ending: Callable[[], bool],
) -> Iterator[bytes]:
    """The chunks, and a comment where none was made for so many seconds.

    :param chunks: the first of which is made.
    :param ending: whether the stream is to end, be it at a comment.
    :param close: ends the stream; called when this is closed, or dropped.
    """
    first = next(chunks, None)
    if first is None:
        return
    yield first
    try:
        puller = _Puller(chunks)
    except RuntimeError:  # no thread can be started: events without a heartbeat
        yield from chunks
        return
    del chunks  # the thread's, and gone with it
    try:
        while True:
            puller.ask()
            if not puller.is_ready(seconds):
                if ending():
                    return  # the generator ends at its next yield
                yield BEAT
            elif (chunk := puller.take()) is None:
                return
            else:
                yield chunk
    finally:
        close()
        puller.end()
