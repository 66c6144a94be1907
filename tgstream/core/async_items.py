"""Async iterables as sources: an iterator that waits for each of their items.

``asyncio`` is imported with :mod:`.event_loop` when the first of them is iterated.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from types import AsyncGeneratorType
from typing import TYPE_CHECKING, Any

from .context import thread

if TYPE_CHECKING:
    from .event_loop import Run


class AsyncItems:
    """The items of an async iterable, made one at a time on the event loop.

    :param items: such as an async generator, which nothing else may iterate.
    """

    _run: Run | None = None

    def __init__(self, items: AsyncIterable[Any]) -> None:
        self.items: AsyncIterable[Any] | None = items

    def __iter__(self) -> AsyncItems:
        return self

    def __next__(self) -> Any:
        if self._run is None:
            self._run = self._start(thread.record.body)
        return self._run.next()

    def _start(self, body: Any) -> Run:
        from .event_loop import Run  # which imports asyncio

        items, self.items = self.items, None
        return Run(items, body)

    def close(self) -> None:
        """Cancel the items, and wait until they have ended.

        :raises BaseException: the error with which they ended.
        """
        if self._run is not None:
            self._run.close()
        elif (
            not isinstance(self.items, AsyncGeneratorType)  # which was not started
            and hasattr(self.items, "aclose")
        ):
            self._run = self._start(None)
            self._run.close()
