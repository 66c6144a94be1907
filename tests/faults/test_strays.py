"""What is no error of an application, raised wherever it may raise something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
import transaction

import tgstream
from tests.conftest import assert_thread_clean
from tests.faults.conftest import Fault, MakeFault
from tests.model import Model, User
from tgstream import StreamError

STRAYS = [SystemExit, KeyboardInterrupt, GeneratorExit]
ERRORS = [MemoryError, StopIteration, *STRAYS]
PLACES = ["generator", "iterator", "format", "flush", "hook", "final commit"]
CASES = [
    (place, error)
    for place in PLACES
    for error in ERRORS
    if (place, error) != ("iterator", StopIteration)  # which is an end
]


class Raising:
    """Streams of two items that raise somewhere, before the first of them or after it.

    :param place: where it raises.
    :param error: what it raises.
    :param late: whether the first item has left by then.
    """

    def __init__(
        self, model: Model, place: str, error: type[BaseException], late: bool
    ) -> None:
        self.model, self.place, self.error, self.late = model, place, error, late

    def body(self) -> Iterator[str]:
        """What is streamed: a generator, or an iterator that is none."""
        return _Iterator(self) if self.place == "iterator" else self.items()

    def items(self) -> Iterator[str]:
        self.model.DBSession.add(User(name="ada"))
        if self.late:
            tgstream.commit()
            yield "one"
        self.model.DBSession.add(User(name="lost"))
        if self.place == "generator":
            self.fail()
        if self.place == "flush":
            sa.event.listen(self.model.DBSession(), "before_flush", self.fail)
            tgstream.flush()
        if self.place == "hook":
            transaction.get().addBeforeCommitHook(self.fail)
            tgstream.commit()
        if self.place == "final commit":
            sa.event.listen(self.model.DBSession(), "before_commit", self.fail)
            return
        yield "two"

    def encode(self, items: Iterator[str]) -> Iterator[str]:
        """What a format does."""
        for item in items:
            if self.place == "format" and item == "two":
                self.fail()
            yield item

    def fail(self, *args: Any) -> Any:
        raise self.error

    content_type = "text/plain"

    @property
    def kind(self) -> type[BaseException]:
        """What arrives of it."""
        if self.error in STRAYS:
            return StreamError
        return RuntimeError if self.error is StopIteration else self.error


class _Iterator:
    """An iterator that raises in place of its last item."""

    def __init__(self, raising: Raising) -> None:
        self.raising, self.items = raising, raising.items()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = next(self.items)
        return str(self.raising.fail()) if item == "two" else item

    def close(self) -> None:
        self.raising.fail()


def on_a_thread(function: Callable[[], None]) -> None:
    """As servers do it: in the main thread a KeyboardInterrupt is what it says."""

    def call() -> None:
        function()
        assert_thread_clean()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(call).result()


@pytest.mark.parametrize(("place", "error"), CASES)
def test_stray_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model, place: str, error: type[BaseException]
) -> None:
    """The client gets a 500, and nothing is stored."""
    raising = Raising(model, place, error, late=False)
    fault = make_fault(model, raising.body, format=raising, chunk_size=0)
    on_a_thread(lambda: fault.assert_fails_at_once(raising.kind))
    fault.assert_leaves()


@pytest.mark.parametrize(("place", "error"), CASES)
def test_stray_in_mid_stream_breaks_the_transfer(
    make_fault: MakeFault, model: Model, place: str, error: type[BaseException]
) -> None:
    """What commit() has stored is there, and nothing that came after it."""
    raising = Raising(model, place, error, late=True)
    fault = make_fault(model, raising.body, format=raising, chunk_size=0)

    def pull(fault: Fault) -> None:
        call = fault.call()
        assert next(call) == b"one"
        fault.assert_breaks(call, raising.kind)

    on_a_thread(lambda: pull(fault))
    fault.assert_leaves("ada")
