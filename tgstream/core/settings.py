"""The ``tgstream.*`` options of an application, and how to read them.

An option is a row of ``OPTIONS``. It is read from the configuration of the running
application, never at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import TIMEOUT_MAX  # seconds: a longer wait is an OverflowError
from typing import Any, NamedTuple, TypeVar

from tg.support.converters import asint, aslist

T = TypeVar("T", int, float)


def _from_0(number: T) -> T:
    if not 0 <= number <= TIMEOUT_MAX:
        raise ValueError("it must be a finite number, 0 or above")
    return number


def _above_0(number: T) -> T:
    if not 0 < number <= TIMEOUT_MAX:
        raise ValueError("it must be a finite number above 0")
    return number


class Option(NamedTuple):
    """One row: the default, and what makes a value of an ``.ini`` file's text."""

    default: Any
    coerce: Callable[[Any], Any]


OPTIONS: dict[str, Option] = {
    "tgstream.chunk_size": Option(32768, lambda value: _from_0(asint(value))),
    "tgstream.flush_seconds": Option(0.05, lambda value: _from_0(float(value))),
    "tgstream.idle_transaction_seconds": Option(
        10.0, lambda value: _from_0(float(value))
    ),
    "tgstream.disconnect_check_seconds": Option(
        10.0, lambda value: _above_0(float(value))
    ),
    "tgstream.sessions": Option((), aslist),
    "tgstream.channels": Option("memory://", str),
    "tgstream.channel_history": Option(1000, lambda value: _above_0(asint(value))),
    "tgstream.heartbeat_seconds": Option(15.0, lambda value: _above_0(float(value))),
}


def option(config: Mapping[str, Any], name: str) -> Any:
    """The value of the option ``name`` in an application's configuration.

    :param config: the configuration of the running application.
    :param name: a key of ``OPTIONS``.
    :raises ValueError: when the value is not of the option's kind.
    """
    row = OPTIONS[name]
    value = config.get(name, row.default)
    try:
        return row.coerce(value)
    except ValueError as error:
        raise ValueError(
            f"the option {name} is {value!r}, which cannot be read: {error}; "
            f"leave it out for the default, {row.default!r}"
        ) from error
