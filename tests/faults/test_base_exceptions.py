"""Exceptions that are not ordinary errors, raised everywhere in a stream."""

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

THREAD_ENDERS = [SystemExit, KeyboardInterrupt, GeneratorExit]
ERRORS = [MemoryError, StopIteration, *THREAD_ENDERS]
PLACES = ["generator", "iterator", "format", "flush", "hook", "final commit"]
CASES = [
    (place, error)
    for place in PLACES
    for error in ERRORS
    if (place, error) != ("iterator", StopIteration)  # the normal end of an iterator
]


class Raising:
    """Streams of two items that raise an error.

    :param place: the place of the error.
    :param error: the error to raise.
    :param late: whether to raise it after the first item, instead of before.
    """

    def __init__(
        self, model: Model, place: str, error: type[BaseException], late: bool
    ) -> None:
        self.model, self.place, self.error, self.late = model, place, error, late

    def body(self) -> Iterator[str]:
        """Return a generator, or an iterator that is not a generator."""
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
        """Encode the items. The object of this class is also the stream's format."""
        for item in items:
            if self.place == "format" and item == "two":
                self.fail()
            yield item

    def fail(self, *args: Any) -> Any:
        raise self.error

    content_type = "text/plain"

    @property
    def expected(self) -> type[BaseException]:
        """The error that reaches the server."""
        if self.error in THREAD_ENDERS:
            return StreamError
        return RuntimeError if self.error is StopIteration else self.error


class _Iterator:
    """An iterator that raises instead of its last item."""

    def __init__(self, raising: Raising) -> None:
        self.raising, self.items = raising, raising.items()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        item = next(self.items)
        return str(self.raising.fail()) if item == "two" else item

    def close(self) -> None:
        self.raising.fail()


def run_on_a_thread(function: Callable[[], None]) -> None:
    """Call a function on a thread, like a server.

    On the main thread, KeyboardInterrupt has its normal meaning.
    """

    def call() -> None:
        function()
        assert_thread_clean()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(call).result()


@pytest.mark.parametrize(("place", "error"), CASES)
def test_exception_before_the_first_chunk_is_an_ordinary_error(
    make_fault: MakeFault, model: Model, place: str, error: type[BaseException]
) -> None:
    """The status is 500, and nothing is stored."""
    raising = Raising(model, place, error, late=False)
    fault = make_fault(model, raising.body, format=raising, chunk_size=0)
    run_on_a_thread(lambda: fault.assert_fails_at_once(raising.expected))
    fault.assert_leaves()


@pytest.mark.parametrize(("place", "error"), CASES)
def test_exception_after_the_first_chunk_aborts_the_transfer(
    make_fault: MakeFault, model: Model, place: str, error: type[BaseException]
) -> None:
    """Only the changes that ``commit()`` stored stay."""
    raising = Raising(model, place, error, late=True)
    fault = make_fault(model, raising.body, format=raising, chunk_size=0)

    def pull(fault: Fault) -> None:
        call = fault.call()
        assert next(call) == b"one"
        fault.assert_aborts(call, raising.expected)

    run_on_a_thread(lambda: pull(fault))
    fault.assert_leaves("ada")
