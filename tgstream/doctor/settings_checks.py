"""The checks of settings: what the configuration of an application means for streams.

They read the configuration and change nothing. A check of a database or a Redis server
connects to it.
"""

from __future__ import annotations

import configparser
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from tg.support.converters import asbool

from ..core.settings import OPTIONS, read_option
from ..database.engines import get_factory_binds, has_one_connection
from ..database.registry import scoped_sessions
from ..live.backends import DATABASE, REDIS_SCHEMES, redact_url, reserved_url_options
from ..live.protocols import UnknownUrlOption
from .channel_tables import check_channel_tables
from .finding import FAIL, NOTE, OK, WARN, Finding, describe_error

Config = Mapping[str, Any]
_STATE = {"tgstream.diagnostics", "tgstream.told_of_memory"}
"""The keys of a configuration in which tgstream remembers what it has logged."""


def check_settings(config: Config) -> Iterator[Finding]:
    """The checks of all settings."""
    yield from check_options(config)
    yield _check_channels(config)
    yield from _check_database(config)
    yield from _check_prepared_statements(config)
    yield _check_transactions(config)
    yield _check_registry_streaming(config)
    yield _check_error_tracing(config)
    yield from _check_slow_requests(config)
    yield from _check_debugbar(config)
    yield _check_session(config)
    yield _check_orjson()


def read_options(config: str) -> dict[str, str]:
    """The options of tgstream in an ``.ini`` file, even if the rest of it is invalid.

    :param config: the file, with or without ``#name``.
    """
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read(config.partition("#")[0])
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return {
        name: value
        for section in parser.values()
        for name, value in section.items()
        if name.startswith("tgstream.")
    }


def check_options(config: Config) -> list[Finding]:
    """The options of tgstream: their names, and whether their values are valid."""
    given = {name for name in config if name.startswith("tgstream.")} - _STATE
    findings = [
        Finding(
            FAIL,
            "options",
            f"unknown option {name}",
            f"The options are {', '.join(sorted(OPTIONS))}.",
        )
        for name in sorted(given - OPTIONS.keys())
    ]
    known = sorted(given & OPTIONS.keys())
    for name in known:
        try:
            read_option(config, name)
        except (ValueError, TypeError):
            result = f"{name} has an invalid value: {config[name]!r}"
            advice = (
                f"Correct it, or omit it for the default {OPTIONS[name].default!r}."
            )
            findings.append(Finding(FAIL, "options", result, advice))
    changed = [
        f"{name} = {_show_option(name, config[name])}"
        for name in known
        if config[name] != OPTIONS[name].default
    ]
    return findings or [Finding(OK, "options", ", ".join(changed) or "default values")]


def _show_option(name: str, value: Any) -> str:
    is_url = name in ("tgstream.channels", "tgstream.channel_listen_url")
    return redact_url(value) if is_url else str(value)


def _check_channels(config: Config) -> Finding:
    url = str(config.get("tgstream.channels", OPTIONS["tgstream.channels"].default))
    if url == "memory://":
        return Finding(OK, "channels", "memory://, for a server with one process")
    if url == DATABASE:
        return check_channel_tables(config)
    shown = redact_url(url)
    if not url.startswith(REDIS_SCHEMES):
        return Finding(
            FAIL,
            "channels",
            f"unsupported URL in tgstream.channels: {shown}",
            "Use memory://, database://, redis://, rediss://, unix://, "
            "redis+sentinel:// or redis+cluster://.",
        )
    if shown.endswith("..."):
        return _report_invalid_url(shown)
    if reserved := reserved_url_options(url):
        result = f"{shown} sets {', '.join(reserved)}, which only tgstream may set"
        advice = "Remove it from the URL, after the '?'."
        return Finding(FAIL, "channels", result, advice)
    try:
        from ..live.backends.redis import ping

        ping(url)
    except ImportError:
        result = f"{shown} needs the package redis, which is not installed"
        return Finding(FAIL, "channels", result, "pip install 'tgstream[redis]'")
    except UnknownUrlOption as error:
        return Finding(FAIL, "channels", f"{shown}: {error}")
    except ValueError:  # its message may contain a part of the password
        return _report_invalid_url(shown)
    except Exception as error:
        return Finding(
            FAIL,
            "channels",
            f"cannot connect to {shown}: {describe_error(error)}",
            "Start the server, or correct tgstream.channels.",
        )
    return Finding(OK, "channels", f"{shown} responds")


def _report_invalid_url(shown: str) -> Finding:
    return Finding(
        FAIL,
        "channels",
        f"invalid URL in tgstream.channels: {shown}",
        "Write redis://host:port/db, and percent-encode special characters of the "
        "password.",
    )


def _check_database(config: Config) -> Iterator[Finding]:
    try:
        sessions = scoped_sessions(config)
    except ValueError as error:
        yield Finding(FAIL, "database", str(error))
        return
    descriptions = []
    for scoped in sessions:
        binds = get_factory_binds(scoped)
        description = _describe_session(config, scoped, binds)
        if any(has_one_connection(bind.engine) for bind in binds):
            yield Finding(
                WARN,
                "database",
                f"{description} uses one connection for all sessions of a thread, so a "
                "stream cannot have its own transaction",
                "Use a database file, in test.ini: "
                "sqlalchemy.url = sqlite:///%(here)s/test.db",
            )
            return
        descriptions.append(description)
    yield Finding(OK, "database", ", ".join(descriptions) or "no scoped session")


def _describe_session(config: Config, scoped: Any, binds: list[Any]) -> str:
    """The name of a scoped session, and the URLs of its databases without queries."""
    names = [
        name for name in ("DBSession", "SQLASession") if config.get(name) is scoped
    ]
    name = names[0] if names else "a session of tgstream.sessions"
    urls = [unquote(str(bind.engine.url.set(query={}))) for bind in binds]
    return f"{name} on {' and '.join(urls)}" if urls else name


def _check_prepared_statements(config: Config) -> Iterator[Finding]:
    """Whether psycopg 3 prepares statements, and whether a pooler is in between.

    A pooler gives each client its own key for cancel requests, so its number is not the
    pid of the backend. No parameter contains the pooler's name or its mode.
    """
    try:
        sessions = scoped_sessions(config)
    except ValueError:
        return  # _check_database() has reported it
    for scoped in sessions:
        for bind in get_factory_binds(scoped):
            if bind.engine.dialect.driver == "psycopg":
                description = _describe_session(config, scoped, [bind])
                yield _check_psycopg(bind.engine, description)


def _check_psycopg(engine: Any, description: str) -> Finding:
    try:
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            is_pooled = pid != driver.info.backend_pid
            prepares = driver.prepare_threshold is not None
    except Exception as error:
        return Finding(
            WARN,
            "prepared statements",
            f"cannot connect to {description}: {describe_error(error)}",
            "Start the database, and run the doctor again.",
        )
    if not prepares:
        return Finding(OK, "prepared statements", f"{description}: off")
    if not is_pooled:
        result = f"{description}: on, and no connection pooler is in between"
        return Finding(OK, "prepared statements", result)
    return Finding(
        WARN,
        "prepared statements",
        f"{description} is behind a connection pooler such as PgBouncer, and psycopg "
        "prepares statements. In transaction mode, streams fail with '_pg3_0 does not "
        "exist'",
        "In config/app_cfg.py: base_config.update_blueprint({"
        '"sqlalchemy.connect_args": {"prepare_threshold": None}}).',
    )


def _check_transactions(config: Config) -> Finding:
    if asbool(config.get("tm.enabled")):
        return Finding(OK, "transactions", "tm.enabled is on")
    return Finding(
        NOTE,
        "transactions",
        "tm.enabled is off: changes that a controller does not commit are lost when it "
        "returns its generator",
        "Commit in the controller, or write in the generator, which has a transaction.",
    )


def _check_registry_streaming(config: Config) -> Finding:
    state = "on" if config.get("registry_streaming", True) else "off"
    return Finding(OK, "registry_streaming", f"{state} (streams do not need it)")


def _check_error_tracing(config: Config) -> Finding:
    if importlib.util.find_spec("backlash") is None:
        return Finding(OK, "error tracing", "off: backlash is not installed")
    if asbool(config.get("debug")):
        return Finding(
            NOTE,
            "error tracing",
            "debug is on, and with it the debugger of backlash",
            "Set debug = false wherever others can reach the application.",
        )
    enabled = config.get("tg.errorware", {}).get("enable", True)
    state = "backlash" if enabled else "off: trace_errors.enable is off"
    return Finding(OK, "error tracing", state)


def _check_slow_requests(config: Config) -> Iterator[Finding]:
    slow = config.get("tg.slowreqs", {})
    if slow.get("enable") and not asbool(config.get("debug")):
        yield Finding(
            WARN,
            "slow requests",
            "trace_slowreqs is on: backlash reports each stream that is longer than "
            f"{slow.get('interval', 25)} s",
            "Add the paths of streams to trace_slowreqs.exclude.",
        )


def _check_debugbar(config: Config) -> Iterator[Finding]:
    if asbool(config.get("debug")) and config.get("debugbar.engine"):
        yield Finding(
            WARN,
            "debugbar",
            "tgext.debugbar is on: it keeps every query of a stream until the stream "
            "ends",
            "Set debug = false for long streams. They show no debugbar anyway.",
        )


def _check_session(config: Config) -> Finding:
    if not asbool(config.get("session.enabled")):
        return Finding(OK, "tg.session", "off")
    if importlib.util.find_spec("beaker") is None:
        return Finding(OK, "tg.session", "off: Beaker is not installed")
    storage = config.get("session.type") or "file or memory"
    result = f"Beaker ({storage}), saved before the first chunk is sent"
    return Finding(OK, "tg.session", result)


def _check_orjson() -> Finding:
    if importlib.util.find_spec("orjson") is not None:
        return Finding(OK, "orjson", "installed")
    return Finding(
        NOTE,
        "orjson",
        "not installed",
        "pip install 'tgstream[orjson]' makes JSON several times faster.",
    )
