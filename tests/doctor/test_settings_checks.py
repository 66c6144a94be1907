"""The checks of an application's settings, its databases and its channels."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tg
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.doctor.applications import failed_checks, parse_findings
from tests.doctor.conftest import Run
from tgstream import Channel, stream
from tgstream.doctor.finding import Finding, format_findings
from tgstream.doctor.settings_checks import check_options, check_settings
from tgstream.testing import open_stream


def find(config: dict[str, Any], check: str) -> Finding:
    """The finding of one check."""
    [finding] = [each for each in check_settings(config) if each.check == check]
    return finding


# Options.


def test_unknown_option_fails(run: Run) -> None:
    """The finding lists the options that exist."""
    status, text = run(options="tgstream.chunksize = 9")
    assert status == 1
    result = parse_findings(text)["options"][1]
    assert result.startswith("unknown option tgstream.chunksize -> The options are ")
    assert "tgstream.chunk_size" in result


def test_changed_options_are_listed(run: Run) -> None:
    """So the output shows which file was read."""
    status, text = run(options="tgstream.chunk_size = 9")
    expected = 0, "tgstream.chunk_size = 9"
    assert (status, parse_findings(text)["options"][1]) == expected


def test_state_that_tgstream_keeps_in_the_configuration_is_not_an_option(
    make_app: MakeApp,
) -> None:
    """An application may have streamed and published before it is checked."""

    class Root(TGController):
        @expose(content_type="text/plain")
        @stream
        def words(self) -> Iterator[str]:
            Channel("words").publish("one", now=True)
            yield from ("one", "two", "three")

    app = make_app(Root())
    environ: dict[str, Any] = {"wsgi.multiprocess": True}
    with open_stream(app, "/words", **environ) as response:
        response.read()
    state = {name for name in tg.config if name.startswith("tgstream.")}
    assert len(state) >= 2
    [finding] = check_options(tg.config)
    assert (finding.mark, finding.result) == ("ok", "default values")


# Databases.


def test_database_in_memory_is_a_warning(run: Run) -> None:
    """The advice is the README's."""
    status, text = run(url="sqlite:///:memory:")
    mark, result = parse_findings(text)["database"]
    assert (status, mark) == (0, "warn")
    assert result.startswith("DBSession on sqlite:///:memory: uses one connection for")
    assert result.endswith("sqlalchemy.url = sqlite:///%(here)s/test.db")


def test_session_that_does_not_exist_fails(run: Run, folder: Path) -> None:
    """No stream can start, and no mail is sent about it."""
    status, text = run(options="tgstream.sessions = sampleapp.Other")
    assert status == 1
    assert failed_checks(text) == ["database", "first chunk"]
    findings = parse_findings(text)
    assert "a stream cannot start: ValueError: " in findings["first chunk"][1]
    assert not (folder / "reported").exists()
    assert "sampleapp.Other" in findings["database"][1]


def test_sessions_are_listed_with_their_databases(run: Run) -> None:
    """A stream gets its own of each of them."""
    status, text = run(options="tgstream.sessions = sampleapp.Second")
    assert status == 0
    database = parse_findings(text)["database"][1]
    first = "DBSession on sqlite:///development.db"
    assert database == f"{first}, a session of tgstream.sessions"


def test_query_of_a_database_url_is_not_printed() -> None:
    """Drivers accept passwords there. The session factory may be any callable."""
    engine = create_engine("sqlite:///some.db?timeout=7")
    bound: list[Any] = [
        sessionmaker(engine),
        sessionmaker(binds={Session: engine}),
        lambda: Session(engine),
        partial(Session, engine),
    ]
    unbound: list[Any] = [sessionmaker(), Session, lambda: Session(tg.request.engine)]
    for factory in bound + unbound:
        database = find({"DBSession": scoped_session(factory)}, "database")
        place = " on sqlite:///some.db" if factory in bound else ""
        assert (database.mark, database.result) == ("ok", f"DBSession{place}")


def test_database_in_memory_is_found_for_any_session_factory() -> None:
    """The factory may be a function, or choose an engine for each class."""
    engine = create_engine("sqlite://")
    factories: list[Any] = [
        lambda: Session(engine),
        sessionmaker(binds={Session: engine}),
    ]
    for factory in factories:
        database = find({"DBSession": scoped_session(factory)}, "database")
        assert database.mark == "warn"
        assert "one connection for all sessions" in database.result
    engine.dispose()


def test_prepared_statements_pass_without_a_pooler(postgresql: str) -> None:
    """A database that cannot be reached is a warning."""
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (postgresql, {}, "ok", "no connection pooler is in between"),
        (postgresql, {"prepare_threshold": None}, "ok", "off"),
        (f"{postgresql}/nowhere", {}, "warn", "cannot connect to DBSession on "),
    ]
    for url, arguments, mark, text in cases:
        engine = create_engine(url, connect_args=arguments, poolclass=NullPool)
        config = {"DBSession": scoped_session(sessionmaker(engine))}
        finding = find(config, "prepared statements")
        assert finding.mark == mark
        assert text in finding.result


# Settings of TurboGears and its neighbours.


def test_settings_that_harm_streams_are_reported_with_advice() -> None:
    """They do not make streams fail."""
    config = {"tg.slowreqs": {"enable": True, "interval": 7}, "session.enabled": "no"}
    findings = {finding.check: finding for finding in check_settings(config)}
    assert "longer than 7 s" in findings["slow requests"].result
    assert "trace_slowreqs.exclude" in findings["slow requests"].advice
    assert findings["transactions"].mark == "note"
    assert findings["tg.session"].result == "off"
    assert findings["database"].result == "no scoped session"
    debug = {"debug": "true", "debugbar.engine": 1}
    assert "keeps every query" in find(debug, "debugbar").result
    assert find(debug, "error tracing").mark == "note"


def test_optional_packages_that_are_missing_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The finding for orjson has the command that installs it."""
    for name in "backlash", "beaker", "orjson":
        monkeypatch.setitem(sys.modules, name, None)
    config = {"session.enabled": True, "tm.enabled": True}
    findings = {finding.check: finding for finding in check_settings(config)}
    assert findings["error tracing"].result == "off: backlash is not installed"
    assert findings["tg.session"].result == "off: Beaker is not installed"
    assert "pip install 'tgstream[orjson]'" in findings["orjson"].advice


# Channels.


def test_channels_server_that_cannot_be_reached_fails() -> None:
    """The doctor connects to it, and prints no password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"redis://user:secret@127.0.0.1:{port}/0"
    channels = find({"tgstream.channels": url}, "channels")
    assert channels.mark == "FAIL"
    assert f"cannot connect to redis://127.0.0.1:{port}/0: " in channels.result
    assert "secret" not in channels.result


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@127.0.0.1:1/0", "redis://127.0.0.1:1/0"),
        ("redis://127.0.0.1:1/0?password=secret", "redis://127.0.0.1:1/0"),
        ("redis://user:sec/secret@127.0.0.1:1/0", "redis://..."),
        ("redis://user:sec#secret@127.0.0.1:1/0", "redis://..."),
        ("redis://127.0.0.1:1/0#secret", "redis://127.0.0.1:1/0"),
        ("redis://user:12/secret@127.0.0.1:1/0", "redis://..."),
        ("redis://127.0.0.1:secret", "redis://..."),
        ("redis:user:secret@127.0.0.1:1", "redis:..."),
        ("user:secret@127.0.0.1", "user:..."),
        ("rediss//:secret@127.0.0.1", "..."),
        ("secret@127.0.0.1", "..."),
        ("secret", "..."),
        ("amqp://user:secret@there/", "amqp://there/"),
    ],
)
def test_password_of_the_channels_url_is_not_printed(url: str, shown: str) -> None:
    """Neither among the options, nor if the URL is invalid or unsupported."""
    findings = [*check_settings({"tgstream.channels": url})]
    assert findings[0].result == f"tgstream.channels = {shown}"
    assert shown in findings[1].result
    assert findings[1].mark == "FAIL"
    assert not re.search("secret|sec/|sec#|'sec'", format_findings(findings))


def test_reserved_option_in_the_channels_url_fails() -> None:
    """The package redis would use it, and listeners would receive no event."""
    url = "redis://127.0.0.1/0?protocol=3&db=1&decode_responses=true"
    channels = find({"tgstream.channels": url}, "channels")
    assert channels.mark == "FAIL"
    assert "sets decode_responses, protocol, which only tgstream may" in channels.result


def test_unknown_option_in_the_channels_url_fails() -> None:
    """No connection could be made, and listeners would wait forever."""
    channels = find({"tgstream.channels": "redis://127.0.0.1/0?speed=3"}, "channels")
    assert channels.mark == "FAIL"
    assert "argument 'speed'. Remove the option from the URL" in channels.result


def test_missing_package_redis_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra of tgstream."""
    monkeypatch.setitem(sys.modules, "redis", None)
    for module in [m for m in sys.modules if "tgstream.live.backends.redis" in m]:
        monkeypatch.delitem(sys.modules, module)
    channels = find({"tgstream.channels": "redis://127.0.0.1/0"}, "channels")
    assert channels.mark == "FAIL"
    assert "needs the package redis, which is not installed" in channels.result
