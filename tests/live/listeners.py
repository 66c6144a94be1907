"""Listeners of channels, and a controller that publishes and listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from tg import TGController, expose

from tests.model import Model, User
from tgstream import SSE, Channel, Event, Stream, last_event_id, stream


def receive(events: Iterator[Event], count: int) -> list[Any]:
    """The data of the next events. An event without data counts as its comment."""
    return [
        event.comment if event.data is None else event.data
        for event in islice(events, count)
    ]


def id_of(event: Event) -> str:
    assert isinstance(event.id, str)
    return event.id


def open_listener(channel: Channel) -> Iterator[Event]:
    """A listener that has received its opening comment."""
    events = channel.listen()
    assert next(events).comment == "open"
    return events


def types_of_first_two(events: Iterator[Event]) -> list[str | None]:
    """The types of the first two events. After a gap they are None and ``reset``."""
    return [event.event for event in islice(events, 2)]


def assert_reset(channel: Channel, after: str) -> None:
    """A listener with this id receives a reset, and then new events."""
    channel.publish("missed")
    events = channel.listen(after=after)
    assert next(events) == Event(comment="open")
    reset = next(events)
    name = channel.name
    assert reset == Event(name, event="reset", id=reset.id, channel=name)
    channel.publish("next")
    assert receive(events, 1) == ["next"]
    assert receive(channel.listen(after=id_of(reset)), 2) == ["open", "next"]


class LiveController(TGController):
    """Requests that publish, and streams that publish or listen."""

    def __init__(self, channel: Channel, model: Model | None = None) -> None:
        self.channel = channel
        self.model = model
        self.after_publish: list[Callable[[], object]] = []
        methods = LiveController.feed, LiveController.post, LiveController.steps
        for method in methods:  # TG forgets it between tests
            expose()(method)
        stream(SSE)(LiveController.feed)

    def feed(self) -> Iterator[Event]:
        return self.channel.listen(after=last_event_id())

    def _write(self, text: str) -> None:
        if self.model is not None:
            self.model.DBSession.add(User(name=text))
        self.channel.publish(text)
        for action in self.after_publish:
            action()

    def post(self, text: str) -> str:
        self._write(text)
        return "posted"

    def steps(self, commit: Any) -> Stream:
        def items() -> Iterator[str]:
            for number in range(1, 4):
                self._write(f"step {number}")
                yield f"{number}\n"

        return Stream(items(), commit=commit)
