"""The observer of the channels of this process, such as metrics. There may be none.

Channels cost nothing more if nobody observes them: a back end that is observed gets a
subclass of its class, whose methods report what they have sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from ..formats.sse import Event, Message

Observed = TypeVar("Observed")


class Observer(Protocol):
    """Receives reports about channels, on any thread, also in a finaliser."""

    def count_published(self, count: int) -> None:
        """Events were published: their transaction has committed, or there is none."""

    def count_reconnect(self) -> None:
        """A connection of a back end that was lost is back."""

    def set_backlog(self, count: int) -> None:
        """This process keeps ``count`` events until it can send them."""

    def watch_events(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events of a listener, as its stream receives them."""


_observer: Observer | None = None
_backends: WeakSet[Any] = WeakSet()


def set_observer(observer: Observer) -> None:
    """Report to ``observer`` from now on, also about the back ends that are in use."""
    global _observer
    _observer = observer
    for backend in list(_backends):
        _observe(backend)


def add_backend(backend: Observed) -> Observed:
    """Observe a new back end."""
    _backends.add(backend)
    if _observer is not None:
        _observe(backend)
    return backend


def watch_events(events: Iterator[Event]) -> Iterator[Event]:
    """Observe a new listener."""
    return events if _observer is None else _observer.watch_events(events)


def report_reconnect() -> None:
    """Report that a connection that was lost is back."""
    if _observer is not None:
        _observer.count_reconnect()


def report_backlog() -> None:
    """Report that the number of events has changed that wait to be sent."""
    if _observer is not None:
        _observer.set_backlog(sum(backend.backlog for backend in list(_backends)))


def _observe(backend: Any) -> None:
    backend.__class__ = _make_observed_class(backend.__class__)


@cache
def _make_observed_class(backend_class: Any) -> Any:
    class ObservedBackend(backend_class):  # type: ignore[misc]
        def publish(self, messages: Sequence[Message]) -> None:
            super().publish(messages)
            _report_published(messages)

        def publish_committed(self, messages: Sequence[Message]) -> None:
            super().publish_committed(messages)
            _report_published(messages)

    return ObservedBackend


def _report_published(messages: Sequence[Message]) -> None:
    assert _observer is not None
    _observer.count_published(len(messages))
    report_backlog()
