"""How the ``tgstream.*`` options enter an application: ``plugme``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from tg.configurator.base import (
    ConfigReadyConfigurationAction,
    ConfigurationComponent,
)

from ..core.settings import OPTIONS, option

log = logging.getLogger("tgstream")


class StreamConfigurationComponent(ConfigurationComponent):  # type: ignore[misc]
    """The options of tgstream.

    Options:

        * ``tgstream.chunk_size``: Bytes that a format, or a long page of ``render()``,
          gathers before a chunk leaves, by default 32768.
        * ``tgstream.flush_seconds``: Seconds after which a pull hands over what it
          gathered when the next item arrives, by default 0.05.
        * ``tgstream.idle_transaction_seconds``: Seconds that a stream may be idle in a
          transaction before a warning is logged, by default 10. 0 turns it off.
        * ``tgstream.disconnect_check_seconds``: Maximum seconds between two checks
          whether the client of a stream has disconnected, by default 10.
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
