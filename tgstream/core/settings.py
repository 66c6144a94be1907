"""The ``tgstream.*`` options, how they enter an application, and how it reads them.

Rule: an option is a row of ``OPTIONS``; it is read from the running application's
configuration, never at import.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from threading import TIMEOUT_MAX  # seconds: a longer wait is an OverflowError
from typing import Any, NamedTuple, TypeVar

from tg.configurator.base import (
    ConfigReadyConfigurationAction,
    ConfigurationComponent,
)
from tg.support.converters import asbool, asint, aslist

log = logging.getLogger("tgstream")
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
    "tgstream.chunk_seconds": Option(0.05, lambda value: _from_0(float(value))),
    "tgstream.idle_seconds": Option(10.0, lambda value: _from_0(float(value))),
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


def tm_enabled(tg_locals: Any) -> bool:
    """True where the request runs in a transaction, TG's own or repoze.tm2's."""
    config, environ = tg_locals.config, tg_locals.request.environ
    return asbool(config.get("tm.enabled")) or "repoze.tm.active" in environ


def scoped_sessions(config: Mapping[str, Any]) -> list[Any]:
    """The scoped sessions of an application, TG's own first.

    :raises ValueError: when the option ``tgstream.sessions`` names something else.
    """
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None:
        return []
    found: list[Any] = []
    for scoped in (config.get("SQLASession"), config.get("DBSession")):
        if isinstance(scoped, orm.scoped_session) and scoped not in found:
            found.append(scoped)
    if config.get("tgstream.sessions"):
        named = map(_resolve, option(config, "tgstream.sessions"))
        found += [scoped for scoped in named if scoped not in found]
    return found


@lru_cache
def _resolve(name: Any) -> Any:
    """A scoped session of the option ``tgstream.sessions``: an object, or a name."""
    found, what = name, "is no scoped session"
    if isinstance(name, str):
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            what = f"cannot be found ({error})"
    orm = sys.modules["sqlalchemy.orm"]
    if not isinstance(found, orm.scoped_session):
        raise ValueError(
            f"the option tgstream.sessions names {name}, which {what}; give scoped "
            "sessions, or their dotted names as myapp.model.DBSession"
        )
    return found


class StreamConfigurationComponent(ConfigurationComponent):  # type: ignore[misc]
    """The options of tgstream.

    Options:

        * ``tgstream.chunk_size``: Bytes that a format, or a long page of ``render()``,
          gathers before a chunk leaves, by default 32768.
        * ``tgstream.chunk_seconds``: Seconds after which a pull hands over what it
          gathered when the next item arrives, by default 0.05.
        * ``tgstream.idle_seconds``: Seconds that a stream may wait with a transaction
          open before a warning tells of it, by default 10; 0 for never.
        * ``tgstream.sessions``: Scoped sessions beside ``DBSession``, as objects or
          as dotted names, of which each stream gets its own. None by default.
        * ``tgstream.channels``: Where the events of channels are kept, by default
          ``memory://``, in this process alone; ``redis://host:port/db``, also
          ``rediss://`` and ``unix://``, for a Redis or a Valkey.
        * ``tgstream.channel_history``: Events of a channel that are kept for clients
          that come back, by default 1000.
        * ``tgstream.heartbeat_seconds``: Seconds of silence after which a listener is
          sent a comment, by default 15.

    """

    id = "tgstream"

    def get_defaults(self) -> dict[str, Any]:
        """The defaults, as TG merges them into the blueprint."""
        return {name: row.default for name, row in OPTIONS.items()}

    def get_coercion(self) -> dict[str, Callable[[Any], Any]]:
        """What TG reads the text of an ``.ini`` file with."""
        return {name: partial(_coerced, name) for name in OPTIONS}

    def get_actions(self) -> tuple[Any, ...]:
        """What is done when the application's configuration is there."""
        return (ConfigReadyConfigurationAction(_warn_of_unknown),)


def _coerced(name: str, value: Any) -> Any:
    return option({name: value}, name)


def _warn_of_unknown(config: Mapping[str, Any], app: Any) -> None:
    names = {name for name in config if name.startswith("tgstream.")}
    for name in sorted(names - OPTIONS.keys()):
        log.warning(
            "tgstream has no option %s; its options are %s",
            name,
            ", ".join(sorted(OPTIONS)),
        )


def plugme(
    configurator: Any, options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Plug tgstream into an application: its defaults, and the guard of its streams.

    Call it in ``config/app_cfg.py``, or let ``plug(base_config, 'tgstream')`` of
    tgext.pluggable do so; to plug twice is to plug once.

    :param configurator: the application's configurator.
    :param options: defaults of the ``tgstream.*`` options, without the prefix.
    :returns: ``{'appid': 'tgstream'}``, as tgext.pluggable expects.
    :raises ValueError: when an option is unknown.
    """
    defaults = {
        f"tgstream.{name}": value
        for name, value in (options or {}).items()
        if name != "appid"
    }
    if unknown := sorted(defaults.keys() - OPTIONS.keys()):
        raise ValueError(
            f"tgstream has no option {', '.join(unknown)}; "
            f"its options are {', '.join(sorted(OPTIONS))}"
        )
    # The AppConfig of older applications is a shell around one.
    configurator = getattr(configurator, "_configurator", configurator)
    configurator.update_blueprint(defaults)
    with suppress(KeyError):  # TG's word for a component that is registered already
        configurator.register(StreamConfigurationComponent)
    return {"appid": "tgstream"}
