"""What an application's settings mean for its streams.

Rule: each check reads the configuration of the application, and changes nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from tg.support.converters import asbool

from ..core.settings import OPTIONS, option
from ..database.engines import get_factory_binds, has_one_connection
from ..database.registry import scoped_sessions
from ..live.channel import REDIS, own_words, shown_url
from .finding import FAIL, NOTE, OK, WARN, Finding, said

Config = Mapping[str, Any]
_OWN = {"tgstream.guard", "tgstream.said", "tgstream.looks", "tgstream.told_of_memory"}
"""What tgstream itself keeps in a configuration."""


def settings(config: Config) -> Iterator[Finding]:
    """The checks of all settings, in the order in which they are told."""
    yield from options(config)
    yield _channels(config)
    yield from _database(config)
    yield from _prepared_statements(config)
    yield _transactions(config)
    yield _registry_streaming(config)
    yield _tracing(config)
    yield from _slow_requests(config)
    yield from _debugbar(config)
    yield _session(config)
    yield _orjson()


def options(config: Config) -> list[Finding]:
    """The options of tgstream: their names, and whether their values can be read."""
    given = {name for name in config if name.startswith("tgstream.")} - _OWN
    found = [
        Finding(
            FAIL,
            "options",
            f"tgstream has no option {name}",
            f"Its options are {', '.join(sorted(OPTIONS))}.",
        )
        for name in sorted(given - OPTIONS.keys())
    ]
    for name in sorted(given & OPTIONS.keys()):
        try:
            option(config, name)
        except (ValueError, TypeError):
            row = f"The default is {OPTIONS[name].default!r}; leave it out for that."
            found.append(
                Finding(
                    FAIL,
                    "options",
                    f"{name} is {config[name]!r}, which cannot be read",
                    row,
                )
            )
    changed = [
        f"{name} = {_shown(name, config[name])}"
        for name in sorted(given & OPTIONS.keys())
        if config[name] != OPTIONS[name].default
    ]
    return found or [Finding(OK, "options", ", ".join(changed) or "all by default")]


def _shown(name: str, value: Any) -> str:
    return shown_url(value) if name == "tgstream.channels" else str(value)


def _channels(config: Config) -> Finding:
    url = str(config.get("tgstream.channels", OPTIONS["tgstream.channels"].default))
    if url == "memory://":
        return Finding(OK, "channels", "memory://, for a server of one process")
    shown = shown_url(url)
    if not url.startswith(REDIS):
        return Finding(
            FAIL,
            "channels",
            f"tgstream.channels is {shown!r}, which is none of its kinds",
            "Write memory://, or redis://host:port/db for a Redis or a Valkey.",
        )
    if shown.endswith("..."):
        return _unreadable(shown)
    if own := own_words(url):
        found = f"{shown} says {', '.join(own)}, which tgstream sets itself"
        return Finding(FAIL, "channels", found, "Leave it out, behind the '?'.")
    try:
        from ..live.backends.redis import reach

        reach(url)
    except ImportError:
        found = f"{shown}, and the package redis is not installed"
        return Finding(FAIL, "channels", found, "pip install 'tgstream[redis]'")
    except ValueError:  # which tells parts of it
        return _unreadable(shown)
    except Exception as error:
        return Finding(
            FAIL,
            "channels",
            f"{shown} cannot be reached: {said(error)}",
            "Start it, or set tgstream.channels to where it is.",
        )
    return Finding(OK, "channels", f"{shown} answers")


def _unreadable(shown: str) -> Finding:
    return Finding(
        FAIL,
        "channels",
        f"{shown} cannot be read",
        "Write redis://host:port/db, and percent-encode what is in a password.",
    )


def _database(config: Config) -> Iterator[Finding]:
    try:
        found = scoped_sessions(config)
    except ValueError as error:
        yield Finding(FAIL, "database", str(error))
        return
    binds = [get_factory_binds(scoped) for scoped in found]
    names = [_name_of(config, scoped) for scoped in found]
    places = [_place(*each) for each in zip(names, binds, strict=True)]
    alone = [
        not any(has_one_connection(bind.engine) for bind in each) for each in binds
    ]
    if all(alone):
        yield Finding(OK, "database", ", ".join(places) or "no scoped session")
        return
    yield Finding(
        WARN,
        "database",
        f"{places[alone.index(False)]}, which is one connection for all sessions of a "
        "thread: a stream's transaction cannot be kept apart",
        "Use a file, in test.ini: sqlalchemy.url = sqlite:///%(here)s/test.db",
    )


def _place(name: str, binds: list[Any]) -> str:
    urls = [unquote(str(bind.engine.url.set(query={}))) for bind in binds]
    return f"{name} on {' and '.join(urls)}" if urls else name


def _prepared_statements(config: Config) -> Iterator[Finding]:
    """Whether psycopg 3 prepares statements, and on PostgreSQL itself.

    A pooler gives each client a key to cancel by, with a number that is not the pid of
    the backend. No parameter names the pooler, or its mode.
    """
    try:
        found = scoped_sessions(config)
    except ValueError:
        return  # the check of the database reports it
    for scoped in found:
        for bind in get_factory_binds(scoped):
            if bind.engine.dialect.driver == "psycopg":
                place = _place(_name_of(config, scoped), [bind])
                yield _prepared_on(bind.engine, place)


def _prepared_on(engine: Any, place: str) -> Finding:
    try:
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            pooled = pid != driver.info.backend_pid
            prepares = driver.prepare_threshold is not None
    except Exception as error:
        return Finding(
            WARN,
            "prepared statements",
            f"{place} cannot be reached: {said(error)}",
            "Start the database, and run the doctor again.",
        )
    return _pooler(place, pooled, prepares)


def _pooler(place: str, pooled: bool, prepares: bool) -> Finding:
    if not prepares:
        return Finding(OK, "prepared statements", f"{place}: off")
    if not pooled:
        found = f"{place}: on, and no connection pooler is in between"
        return Finding(OK, "prepared statements", found)
    return Finding(
        WARN,
        "prepared statements",
        f"{place} is behind a connection pooler such as PgBouncer, and psycopg "
        "prepares statements: in transaction mode, streams fail with '_pg3_0 does not "
        "exist'",
        "In config/app_cfg.py: base_config.update_blueprint({"
        '"sqlalchemy.connect_args": {"prepare_threshold": None}}).',
    )


def _name_of(config: Config, scoped: Any) -> str:
    for name in "DBSession", "SQLASession":
        if config.get(name) is scoped:
            return name
    return "a session of tgstream.sessions"


def _transactions(config: Config) -> Finding:
    if asbool(config.get("tm.enabled")):
        return Finding(OK, "transactions", "tm.enabled is on")
    return Finding(
        NOTE,
        "transactions",
        "tm.enabled is off: what a controller wrote and did not commit is gone when it "
        "returns its generator",
        "Commit in the controller, or write in the generator, which has a transaction.",
    )


def _registry_streaming(config: Config) -> Finding:
    state = "on" if config.get("registry_streaming", True) else "off"
    return Finding(OK, "registry_streaming", f"{state}; streams do not need it")


def _tracing(config: Config) -> Finding:
    if importlib.util.find_spec("backlash") is None:
        return Finding(OK, "error tracing", "none: backlash is not installed")
    if asbool(config.get("debug")):
        return Finding(
            NOTE,
            "error tracing",
            "debug is on: backlash's debugger is around the application",
            "Set debug = false wherever others can reach it.",
        )
    enabled = config.get("tg.errorware", {}).get("enable", True)
    state = "backlash's" if enabled else "none: trace_errors.enable is off"
    return Finding(OK, "error tracing", state)


def _slow_requests(config: Config) -> Iterator[Finding]:
    slow = config.get("tg.slowreqs", {})
    if slow.get("enable") and not asbool(config.get("debug")):
        yield Finding(
            WARN,
            "slow requests",
            "trace_slowreqs is on: each stream that is longer than "
            f"{slow.get('interval', 25)} s is reported",
            "Add the paths of streams to trace_slowreqs.exclude.",
        )


def _debugbar(config: Config) -> Iterator[Finding]:
    if asbool(config.get("debug")) and config.get("debugbar.engine"):
        yield Finding(
            WARN,
            "debugbar",
            "tgext.debugbar is on: it keeps every query of a stream until it ends",
            "Set debug = false for long streams; their pages have no debugbar anyway.",
        )


def _session(config: Config) -> Finding:
    if not asbool(config.get("session.enabled")):
        return Finding(OK, "tg.session", "off")
    if importlib.util.find_spec("beaker") is None:
        return Finding(OK, "tg.session", "none: Beaker is not installed")
    kind = config.get("session.type") or "file or memory"
    return Finding(
        OK, "tg.session", f"Beaker's, {kind}; it is saved before the first chunk leaves"
    )


def _orjson() -> Finding:
    if importlib.util.find_spec("orjson") is not None:
        return Finding(OK, "orjson", "installed")
    return Finding(
        NOTE,
        "orjson",
        "not installed",
        "pip install 'tgstream[orjson]' makes JSON several times as quick.",
    )
