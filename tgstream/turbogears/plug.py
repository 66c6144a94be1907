"""``plugme``: adds the ``tgstream.*`` options to an application's configuration."""

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

from ..core.settings import OPTIONS, read_option

log = logging.getLogger("tgstream")


class StreamConfigurationComponent(ConfigurationComponent):  # type: ignore[misc]
    """The options of tgstream.

    Options:

        * ``tgstream.chunk_size``: Bytes of output that a format, or a long page of
          ``render()``, buffers before a chunk is sent, by default 32768.
        * ``tgstream.flush_seconds``: Maximum seconds to buffer output before sending a
          chunk, checked when the next item arrives, by default 0.05.
        * ``tgstream.idle_transaction_seconds``: Seconds that a stream may be idle in a
          transaction before a warning is logged, by default 10. 0 turns it off.
        * ``tgstream.disconnect_check_seconds``: Maximum seconds between two checks
          whether the client of a stream has disconnected, by default 10.
        * ``tgstream.sessions``: Scoped sessions besides ``DBSession``, as objects or as
          dotted names. Each stream gets its own sessions. None by default.
        * ``tgstream.channels``: The store of the events of channels, by default
          ``memory://``, which only this process can read. ``redis://host:port/db``,
          ``rediss://`` or ``unix://`` for Redis or Valkey. ``database://`` for the
          database of the application.
        * ``tgstream.channel_history``: Events of a channel that are kept for clients
          that reconnect, by default 1000.
        * ``tgstream.channel_seconds``: Seconds after its last event at which a channel
          is removed, by default 604800, a week.
        * ``tgstream.channel_backlog``: Events that this process keeps while it cannot
          send them to Redis, by default 10000.
        * ``tgstream.publish_timeout``: Maximum seconds that a request waits for Redis
          for all its events, by default 1.
        * ``tgstream.channel_poll_seconds``: Seconds between two looks for new events
          with ``database://``, by default 0.25.
        * ``tgstream.channel_listen_url``: The URL of a direct connection for
          ``LISTEN``, if the engine has a pooler. None by default.
        * ``tgstream.heartbeat_seconds``: Seconds without an event after which a
          listener is sent a comment, by default 15.

    """

    id = "tgstream"

    def get_defaults(self) -> dict[str, Any]:
        """The defaults. TG merges them into the blueprint."""
        return {name: option.default for name, option in OPTIONS.items()}

    def get_coercion(self) -> dict[str, Callable[[Any], Any]]:
        """The functions with which TG converts the text of an ``.ini`` file."""
        return {name: partial(_convert, name) for name in OPTIONS}

    def get_actions(self) -> tuple[Any, ...]:
        """The checks that TG runs when the application's configuration is complete."""
        return (ConfigReadyConfigurationAction(_warn_of_unknown_options),)


def _convert(name: str, value: Any) -> Any:
    return read_option({name: value}, name)


def _warn_of_unknown_options(config: Mapping[str, Any], app: Any) -> None:
    names = {name for name in config if name.startswith("tgstream.")}
    for name in sorted(names - OPTIONS.keys()):
        log.warning(
            "tgstream has no option %s. Its options are %s",
            name,
            ", ".join(sorted(OPTIONS)),
        )


def plugme(
    configurator: Any, options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Plug tgstream into an application: its options, and the error guard.

    Call it in ``config/app_cfg.py``, or use ``plug(base_config, 'tgstream')`` of
    tgext.pluggable, which calls it. A second call is allowed.

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
            f"tgstream has no option {', '.join(unknown)}. Its options are "
            f"{', '.join(sorted(OPTIONS))}"
        )
    # AppConfig, which older applications use, wraps a configurator.
    configurator = getattr(configurator, "_configurator", configurator)
    configurator.update_blueprint(defaults)
    with suppress(KeyError):  # TG raises it if the component is registered already
        configurator.register(StreamConfigurationComponent)
    return {"appid": "tgstream"}
