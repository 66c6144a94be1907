"""The heartbeat of an event stream whose generator waits for its next event.

A generator cannot be interrupted while it waits, so it runs on a thread of its own, the
worker. The thread that pulls waits for the next chunk no longer than the interval of
the heartbeat, and then sends a comment. The generator makes one chunk for each chunk
that the server pulls, and never works ahead.

If the stream is to end, the thread that pulls is woken. It waits a moment for the chunk
that the generator may still make, and then ends the response.

The first chunk is made on the worker, too, while the request waits. A generator that is
about to wait for an event without an item to yield can begin the response with a
comment, by :func:`begin_response`. The request then goes on while the generator waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from .context import find_body, thread

HEARTBEAT = b":\n\n"
"""A comment, which clients of an event stream ignore."""


class Worker:
    """A thread (with gevent, a greenlet) that runs the generator of one stream.

    :raises RuntimeError: when no thread can be started.
    """

    pulled: threading.Event | None = None
    """Set to end the wait of the thread that pulls."""
    _stopped = False

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        try:
            threading.Thread(
                target=self._run, name="tgstream-heartbeat", daemon=True
            ).start()
        except BaseException:  # gevent may have killed the caller after the start
            self.stop()
            raise

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it has the stream, which must end when it is dropped
        self._stopped = True
        self._run_rest()

    def _run_rest(self) -> None:
        with suppress(Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job()

    def submit(self, job: Callable[[], object]) -> None:
        """Run a function on the thread, after those before it. It must not raise.

        If the thread has ended, the function runs at once, on this thread.
        """
        self._jobs.put(job)
        if self._stopped:
            self._run_rest()

    def end_wait(self) -> None:
        """Let the thread that pulls end the response, if it waits for a chunk."""
        if self.pulled is not None:
            self.pulled.set()

    def stop(self) -> None:
        """Let the thread end after the functions that it was given."""
        self._jobs.put(None)


class Pull:
    """A function that a worker runs for another thread, again and again.

    :param function: returns a chunk, or None at the end.
    """

    def __init__(self, function: Callable[[], bytes | None]) -> None:
        self._function = function
        self.done = threading.Event()
        self._chunk: bytes | None = None
        self._error: BaseException | None = None
        self._requested = False

    def request(self, worker: Worker) -> None:
        """Request the next chunk, unless it is requested already."""
        if not self._requested:
            self._requested = True
            self._chunk = b""
            self.done.clear()
            worker.submit(self._run)

    def _run(self) -> None:
        try:
            self._chunk = self._function()
        except BaseException as error:
            self._error = error
        self.done.set()

    def wait(self, seconds: float | None) -> bool:
        """Wait for the requested chunk. True if it is there in time."""
        return self.done.wait(seconds)

    def end_wait(self) -> None:
        """Let :meth:`wait` return before the chunk is there."""
        self.done.set()

    def resume_wait(self) -> None:
        """Let :meth:`wait` wait again, if the chunk is not there."""
        self._requested = True
        self.done.clear()
        if self._chunk != b"" or self._error is not None:
            self.done.set()

    def result(self) -> bytes | None:
        """The requested chunk, or None at the end. Empty if the wait was ended.

        :raises BaseException: the error that the function raised instead.
        """
        self._requested = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._chunk


def add_heartbeats(
    chunks: Iterator[bytes],
    worker: Worker | None,
    seconds: float,
    close: Callable[[], None],
    encode_end: Callable[[], bytes | None],
) -> Iterator[bytes]:
    """Yield the chunks, and a comment whenever none has come for ``seconds``.

    :param chunks: an iterator whose first chunk is made already.
    :param worker: runs the iterator. Without it the chunks come without a heartbeat.
    :param close: ends the stream. Called when this generator is closed or dropped.
    :param encode_end: returns the last chunk of a stream that must end, else None. It
        is called before and after a comment, and its chunk ends the response.
    """
    first = next(chunks, None)
    if first is None:
        return
    yield first
    if worker is None:
        yield from chunks
        return
    pull = Pull(partial(next, chunks, None))
    worker.pulled = pull.done
    del chunks
    was_woken = False
    try:
        while True:
            pull.request(worker)
            if not pull.wait(seconds):
                if (last := encode_end()) is None:
                    yield HEARTBEAT
                    last = encode_end()
                if last is not None:
                    break  # the generator ends at its next yield
            elif chunk := pull.result():
                yield chunk
            elif chunk is None:
                return
            elif (last := encode_end()) is not None:
                if was_woken:
                    break
                was_woken = True  # the monitor ends the wait a second time
                pull.resume_wait()
        if last:
            yield last
    finally:
        close()


def begin_wait(wake: Callable[[], None]) -> None:
    """The stream that runs here waits for events from now on, and can be woken.

    :param wake: wakes it if it is to end. A new object for each wait, such as a bound
        method, because a stream may listen to a channel twice.
    """
    body = thread.record.body
    if body is not None:
        body.waits += (wake,)


def end_wait(wake: Callable[[], None]) -> None:
    """The stream that runs here does not wait for these events any more."""
    body = find_body()
    if body is not None:
        body.waits = tuple([each for each in body.waits if each is not wake])


def is_ending() -> bool:
    """Whether the stream that runs here is to end."""
    body = thread.record.body
    return body is not None and body.closing is not None


def begin_response(comment: bytes) -> None:
    """Begin the response of the stream that runs here, whose generator may now wait.

    It does nothing outside of a stream, and after the first chunk.

    :param comment: the first chunk.
    :raises StreamError: when the stream has no heartbeat.
    :raises StreamEnding: when the stream is to end.
    """
    body = thread.record.body
    if body is not None:
        body.begin(comment)


def check_ending() -> None:
    """Let the generator of the stream that runs here end, if the stream is to end.

    :raises StreamEnding: when it is to end.
    """
    body = thread.record.body
    if body is not None:
        body.checkpoint()


def shorten_wait(seconds: float) -> float:
    """The seconds that a generator may wait, so that it ends soon after its stream."""
    body = thread.record.body
    heartbeat = None if body is None else body.plan.traits.heartbeat
    return min(seconds, heartbeat or seconds)
