"""The ``tgstream.*`` options of an application, and how to read them.

``OPTIONS`` is the only list of them. An option is read from the configuration of the
running application, never at import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from threading import TIMEOUT_MAX  # seconds: a longer wait is an OverflowError
from typing import Any, NamedTuple, TypeVar

from tg.support.converters import asbool, asint, aslist

T = TypeVar("T", int, float)


def _check_not_negative(number: T) -> T:
    if not 0 <= number <= TIMEOUT_MAX:
        raise ValueError("it must be a finite number >= 0")
    return number


def _check_positive(number: T) -> T:
    if not 0 < number <= TIMEOUT_MAX:
        raise ValueError("it must be a finite number > 0")
    return number


def _to_size(value: Any) -> int:
    size: int = asint(value)
    if size < 0:
        raise ValueError("it must be a number of bytes >= 0")
    return size


def _to_count(value: Any) -> int:
    count: int = asint(value)
    return _check_positive(count)


def _to_seconds(value: Any) -> float:
    return _check_not_negative(float(value))


def _to_interval(value: Any) -> float:
    return _check_positive(float(value))


def _to_directory(value: Any) -> str | None:
    if not value:
        return None
    if not os.path.isdir(value):
        raise ValueError("it must be an existing directory")
    return str(value)


def _to_url(value: Any) -> str | None:
    return str(value) if value else None


class Option(NamedTuple):
    """An option: its default, and the function that converts a value to its type.

    The value is text if it comes from an ``.ini`` file.
    """

    default: Any
    convert: Callable[[Any], Any]


OPTIONS: dict[str, Option] = {
    "tgstream.chunk_size": Option(32768, _to_size),
    "tgstream.flush_seconds": Option(0.05, _to_seconds),
    "tgstream.idle_transaction_seconds": Option(10.0, _to_seconds),
    "tgstream.disconnect_check_seconds": Option(10.0, _to_interval),
    "tgstream.spool_directory": Option(None, _to_directory),
    "tgstream.spool_max_bytes": Option(1 << 30, _to_size),
    "tgstream.sessions": Option((), aslist),
    "tgstream.channels": Option("memory://", str),
    "tgstream.channel_history": Option(1000, _to_count),
    "tgstream.channel_seconds": Option(604_800.0, _to_interval),
    "tgstream.channel_backlog": Option(10_000, _to_count),
    "tgstream.publish_timeout": Option(1.0, _to_interval),
    "tgstream.channel_poll_seconds": Option(0.25, _to_interval),
    "tgstream.channel_listen_url": Option(None, _to_url),
    "tgstream.compress": Option(False, asbool),
    "tgstream.heartbeat_seconds": Option(15.0, _to_interval),
}


def read_option(config: Mapping[str, Any], name: str) -> Any:
    """Read an option from an application's configuration.

    :param config: the configuration of the running application.
    :param name: a key of ``OPTIONS``.
    :returns: the value, converted to the option's type, or the default.
    :raises ValueError: when the value cannot be converted, or is out of range.
    """
    option = OPTIONS[name]
    value = config.get(name, option.default)
    try:
        return option.convert(value)
    except ValueError as error:
        raise ValueError(
            f"the option {name} has an invalid value, {value!r}: {error}. Omit it for "
            f"the default, {option.default!r}"
        ) from error
