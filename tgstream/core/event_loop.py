"""The event loop of the process, which runs the async generators of all streams.

It starts with the first async stream, on a daemon thread, and stays. Each stream has
one task there, a :class:`Run`, so that ``asyncio.timeout()`` and task groups work
across a ``yield``. The thread that pulls the stream requests an item and waits for it:
no task works ahead, and nothing of a generator runs while its items are encoded and
committed.

- *Other tasks run at every await.* So the context of a stream, its session and its
  transaction are bound around each step of a coroutine, in :class:`_Steps`. The loop
  wraps each task that a stream creates, such as those of ``asyncio.gather()``. A task
  that outlives its stream runs on without them.
- *asyncio.to_thread() hands over the context variables.* Here it hands over the context
  of the stream, too. The stream then ends after the functions that run in threads.
- *The stream ends while its generator waits.* The task is cancelled once: the generator
  gets a ``CancelledError`` at its ``await``, or a ``GeneratorExit`` at its ``yield``.
  The thread that ends the stream waits for the task, then releases the session.
- *The loop's own thread must not wait for the loop.* It ends no stream, and pulls none.
- *gevent* makes a greenlet of the thread. The loop then waits with gevent's selector,
  so that all other greenlets run. The tasks are on the thread of the hub, as database
  pools and patched locks need it. While the loop waits, no greenlet sees it as running.
- *A forked process* has no thread for the loop. It makes another one when it needs it,
  and keeps the old one untouched: both share its selector in the kernel.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from .context import Context, thread
from .errors import StreamError
from .monitor import PAUSE, event_loops, has_greenlets, start_thread
from .report import as_error, log

if TYPE_CHECKING:
    from .context import StreamTransaction
    from .options import Plan


class Body(Protocol):
    """The body of a stream, as its task uses it."""

    plan: Plan
    context: Context
    transaction: StreamTransaction | None

    def on_end(self, callback: Callable[[], object]) -> None: ...
    def check_process(self) -> None: ...


class Run:
    """The items of one async iterable, made in a task of the event loop.

    :param items: the async iterable.
    :param body: the body of the stream. None if the items are only closed.
    """

    body: Body | None
    """The body that is bound around each step. None after the end."""
    _task: asyncio.Task[BaseException | None] | None = None
    _error: BaseException | None = None  # of the end, until it is raised
    _is_making = False  # an item
    _is_ending = False  # no more items are made
    _is_cancelled = False

    def __init__(self, items: Any, body: Body | None) -> None:
        self.body = body
        self.controller = "Stream" if body is None else body.plan.controller
        self._loop = get_loop()
        self._requested = asyncio.Event()
        self._answers: SimpleQueue[tuple[Any, bool]] = SimpleQueue()
        self._ended = threading.Event()
        self._calls: set[Future[Any]] = set()  # in other threads
        self._closings: set[asyncio.Future[None]] = set()  # of nested generators
        # It runs in a copy of this thread's context variables, which the stream has.
        self._loop.call_soon_threadsafe(self._start, items)
        if body is not None:
            body.on_end(self._interrupt)

    # For the thread that pulls.

    def next(self) -> Any:
        """Wait for the next item.

        :raises StopIteration: when there are no more items.
        :raises StreamError: on the thread of the loop, which would wait for itself.
        :raises StreamEnding: when they were cancelled, because the stream is to end.
        :raises BaseException: the error of the iterable.
        """
        if threading.get_ident() in event_loops:
            raise StreamError(
                f"{self.controller} is an async stream, and was read on the event loop "
                "that has to run it. Read it in asyncio.to_thread()"
            )
        self._loop.call_soon_threadsafe(self._requested.set)
        item, is_item = self._answers.get()
        if is_item:
            return item
        self._answers.put((None, False))  # for the next call, as in any iterator
        self._raise_error()
        if self._is_ending:
            thread.record.body.checkpoint()
        raise StopIteration

    def close(self) -> None:
        """End the task, and wait for its end on any other thread than the loop's.

        :raises BaseException: its error, or the first that has interrupted the wait.
        """
        self._interrupt()
        self._loop.call_soon_threadsafe(self._requested.set)
        interruption: BaseException | None = None
        while threading.get_ident() not in event_loops:
            try:
                self._ended.wait()
                break
            except BaseException as error:  # a kill or a timeout of gevent
                interruption = error if interruption is None else interruption
        if interruption is not None:
            raise interruption
        self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, StopIteration):  # it would be the end of the items
            raise RuntimeError(f"{self.controller} raised StopIteration") from error
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback has this frame

    def _interrupt(self) -> None:
        self._loop.call_soon_threadsafe(self._cancel)

    # On the event loop.

    def _start(self, items: Any) -> None:
        _current.set(self)
        self._variables = contextvars.copy_context()
        self._task = self._loop.create_task(self._iterate(items))
        # Called also if the task is cancelled before its first step.
        self._task.add_done_callback(self._finish)

    def close_dropped(self, generator: Any) -> None:
        """Close a nested async generator, which was dropped on any thread.

        The collector may drop it in a step of another stream.
        """
        self._loop.call_soon_threadsafe(
            self._close_nested, generator.aclose(), context=self._variables
        )

    def _close_nested(self, aclose: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(aclose)
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    def _cancel(self) -> None:
        """Make no more items. The generator is cancelled if it makes one now."""
        self._is_ending = True
        if self._task is not None and self._is_making and not self._is_cancelled:
            self._is_cancelled = True  # once: its clean-up may wait, too
            self._task.cancel()

    async def _iterate(self, items: Any) -> BaseException | None:
        """Make the items, and close the iterable. Returns the error of the end."""
        iterator, error = items, None
        try:
            iterator = aiter(items)
            await self._make_items(iterator)
        except StopAsyncIteration:
            pass
        except BaseException as own_error:
            if not self._is_cancelled or type(own_error) is not asyncio.CancelledError:
                error = as_error(self.controller, own_error)
        self._is_making = False
        try:
            for resource in (iterator,) if iterator is items else (iterator, items):
                error = await _close(resource, error)
            await self._wait_for_users()
            return error
        finally:
            del error  # its traceback has this frame

    async def _make_items(self, iterator: Any) -> None:
        """Make an item for each request, until the stream is to end."""
        ahead: list[Any] = []
        while True:
            try:
                await self._requested.wait()
            except asyncio.CancelledError as error:
                # By a timeout or a task group of the generator, which is at its yield.
                if not hasattr(iterator, "athrow"):
                    raise
                self._is_making = True
                ahead.append(await iterator.athrow(error))
                self._is_making = False
                continue
            if self._is_ending:
                return
            self._requested.clear()
            self._is_making = True
            item = ahead.pop(0) if ahead else await anext(iterator)
            self._is_making = False
            self._answers.put((item, True))
            del item

    async def _wait_for_users(self) -> None:
        """Wait for what may use the session: generators, and functions in threads."""
        with suppress(asyncio.CancelledError):  # too late
            await asyncio.sleep(0)  # the generators dropped in the last step get tasks
        await _wait_for(self._closings)
        self.body = None  # the calls of tasks that go on do not get its session
        calls = [call for call in tuple(self._calls) if not call.cancel()]
        await _wait_for([asyncio.wrap_future(call) for call in calls])

    def _finish(self, task: asyncio.Task[BaseException | None]) -> None:
        self.body = self._task = None
        if not task.cancelled():
            self._error = task.exception() or task.result()
        self._ended.set()
        self._answers.put((None, False))

    # Functions in other threads.

    def submit(
        self, submit: Callable[[Any], Future[Any]], function: Callable[[], Any]
    ) -> Future[Any]:
        """Call ``function`` on another thread, in the context of the stream."""
        future = submit(partial(self._call, function))
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def _call(self, function: Callable[[], Any]) -> Any:
        body = self.body
        if body is None:
            return function()
        context = make_context(body)
        record = context.bind(body)
        try:
            return function()
        finally:
            context.unbind(record)


_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar(
    "tgstream_run", default=None
)
"""The run that has created a task."""


async def _close(resource: Any, first: BaseException | None) -> BaseException | None:
    """Close an async generator or another resource. Returns the first error."""
    try:
        if hasattr(resource, "aclose"):
            await resource.aclose()
    except BaseException as error:
        return error if first is None else first
    return first


async def _wait_for(futures: Collection[asyncio.Future[Any]]) -> None:
    """Wait until all are done, also if they change, or the task is cancelled."""
    while pending := [future for future in futures if not future.done()]:
        with suppress(asyncio.CancelledError):  # too late
            await asyncio.wait(pending)


def make_context(body: Body) -> Context:
    """A context of the stream: each can be bound on one thread at a time."""
    tg_locals, transaction = body.context.tg_locals, body.transaction
    if transaction is None:
        return Context(tg_locals)
    return transaction.make_context(tg_locals)


class _Steps(Coroutine[Any, Any, Any]):
    """A coroutine with the context of its stream bound around each step."""

    def __init__(self, coroutine: Any, run: Run, body: Body) -> None:
        self._coroutine = coroutine
        self._run = run
        self._context = make_context(body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # cr_frame and others, to inspect it

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def close(self) -> None:
        self._step(self._coroutine.close)

    def _step(self, step: Callable[..., Any], *arguments: Any) -> Any:
        body = self._run.body
        if body is None:
            return step(*arguments)
        record, hooks = self._context.bind(body), sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(finalizer=self._run.close_dropped)
        try:
            return step(*arguments)
        except (KeyboardInterrupt, SystemExit) as error:  # it would end the loop
            raise as_error(self._run.controller, error) from error
        finally:
            sys.set_asyncgen_hooks(*hooks)
            self._context.unbind(record)
            body.check_process()


def _make_task(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """A task, as the loop's factory. A stream's task has the context of the stream."""
    run = _current.get()
    if run is not None and run.body is not None and asyncio.iscoroutine(coroutine):
        coroutine = _Steps(coroutine, run, run.body)
    return asyncio.Task(coroutine, loop=loop, **options)


class _Threads(ThreadPoolExecutor):
    """The threads of ``asyncio.to_thread()``, with the context of a stream.

    They are daemon threads. Python would wait for those of its own class at the exit.
    """

    def __init__(self) -> None:
        super().__init__()  # which starts no thread
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._missing = min(32, (os.cpu_count() or 1) + 4)  # as many as Python's

    def submit(self, function: Any, /, *args: Any, **options: Any) -> Future[Any]:
        run = _current.get()
        function = partial(function, *args, **options)
        # to_thread() passes Context.run. getaddrinfo() and others need no context.
        method = getattr(function, "func", None)
        if run is None or not isinstance(
            getattr(method, "__self__", None), contextvars.Context
        ):
            return self._submit(function)
        return run.submit(self._submit, function)

    def _submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._start(partial(_call_for, future, function))
        return future

    def _start(self, job: Callable[[], None]) -> None:
        if self._missing:
            start_thread("tgstream-to-thread", self._work)
            self._missing -= 1
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            self._jobs.get()()


class _Greenlets(_Threads):
    """The greenlets of ``asyncio.to_thread()``.

    To start a thread would switch to other greenlets, which would see the loop running.
    """

    def _start(self, job: Callable[[], None]) -> None:
        import gevent

        gevent.spawn(job)


def _call_for(future: Future[Any], function: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
            del future, function  # its traceback has this frame


# The loop of this process.

_loop: asyncio.AbstractEventLoop | None = None
_starting = threading.Lock()
_parents: list[Any] = []


def get_loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process, which runs on a thread of its own.

    :raises RuntimeError: when no thread can be started.
    """
    global _loop
    with _starting:
        if _loop is None:
            selector = _make_gevent_selector() if has_greenlets() else None
            loop = _make_loop(selector)
            try:
                start_thread("tgstream-async", partial(_run_forever, loop, selector))
            except RuntimeError:
                loop.close()
                raise
            _loop = loop
        return _loop


def _make_loop(selector: Any) -> asyncio.AbstractEventLoop:
    loop = (
        asyncio.new_event_loop()
        if selector is None
        else asyncio.SelectorEventLoop(selector)
    )
    loop.set_task_factory(_make_task)
    loop.set_default_executor(_Threads() if selector is None else _Greenlets())
    return loop


def _run_forever(loop: asyncio.AbstractEventLoop, selector: Any) -> None:
    event_loops.add(threading.get_ident())
    while True:
        if selector is not None:
            selector.hide_others()
        try:
            loop.run_forever()
        except BaseException:
            log.exception("The event loop of async streams failed. It goes on")
            time.sleep(PAUSE)


def _make_gevent_selector() -> Any:
    """A selector with which the loop leaves the thread to other greenlets meanwhile."""
    from gevent.selectors import DefaultSelector

    class Selector(DefaultSelector):  # type: ignore[misc]
        """Hides the loop while it waits: asyncio keeps the running loop by thread."""

        outer: Any

        def hide_others(self) -> None:
            self.outer = self._exchange((None, (None, None)))

        def select(self, timeout: float | None = None) -> Any:
            own = self._exchange(self.outer)
            try:
                return super().select(timeout)
            finally:
                self.outer = self._exchange(own)

        def _exchange(self, state: Any) -> Any:
            previous = asyncio._get_running_loop(), sys.get_asyncgen_hooks()
            loop, hooks = state
            asyncio._set_running_loop(loop)
            sys.set_asyncgen_hooks(*hooks)
            return previous

    return Selector()


def _forget_parent() -> None:
    """In a forked process: the thread of the loop is not there."""
    global _loop, _starting
    if _loop is not None:
        _parents.append(_loop)  # its finaliser would change the parent's selector
    _loop, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_parent)
