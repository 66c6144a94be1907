"""The doctor: what it finds in real applications, each loaded from an ``.ini`` file."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tg
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from tests.conftest import MakeApp, assert_thread_clean
from tests.servers.expected import EXPECTED
from tgstream.doctor import loader as _loading
from tgstream.doctor.cli import main
from tgstream.doctor.finding import Finding, text_of
from tgstream.doctor.package_checks import (
    BROKEN,
    compared,
    environment,
    is_below,
    server,
)
from tgstream.doctor.package_checks import SERVERS as DOCTORS_SERVERS
from tgstream.doctor.settings_checks import settings

APP = '''
"""An application as a quickstarted one, in one module."""

import types
from pathlib import Path

from sqlalchemy.orm import scoped_session, sessionmaker
from tg import FullStackApplicationConfigurator, TGController, expose
from tg.appwrappers.base import ApplicationWrapper
from zope.sqlalchemy import register

DBSession = scoped_session(sessionmaker())
register(DBSession)
Second = scoped_session(sessionmaker())


class Model(types.ModuleType):
    DBSession = DBSession

    def init_model(self, engine):
        DBSession.configure(bind=engine)


class RootController(TGController):
    def _before(self, *args, **params):
        Path("ran").touch()

    @expose()
    def _default(self, *args, **params):
        Path("ran").touch()


class Globals:
    pass


class Reporter:
    def report(self, traceback):
        Path("reported").touch()


class Minifying(ApplicationWrapper):
    def __call__(self, controller, environ, context):
        response = self.next_handler(controller, environ, context)
        response.body = response.body + b""
        return response


def base_config(**options):
    config = FullStackApplicationConfigurator()
    config.update_blueprint(
        {
            "root_controller": RootController(),
            "renderers": ["json"],
            "default_renderer": "json",
            "app_globals": Globals,
            "helpers": Globals,
            "use_sqlalchemy": True,
            "model": Model("model"),
            "trace_errors.reporters": [Reporter()],
            **options,
        }
    )
    return config


def main(global_conf, **app_conf):
    """Plugged."""
    import tgstream

    config = base_config()
    tgstream.plugme(config)
    return config.make_wsgi_app(global_conf, app_conf)


def unplugged(global_conf, **app_conf):
    """As it is where controllers import tgstream, and nobody before them."""
    return base_config().make_wsgi_app(global_conf, app_conf)


def lazy(global_conf, **app_conf):
    """As a quickstarted one: its root controller is imported by the first request."""
    config = base_config(package=__import__("package"))
    config._blueprint.pop("root_controller")
    return config.make_wsgi_app(global_conf, app_conf)


def wrapped(global_conf, **app_conf):
    """With an application wrapper that reads the body."""
    import tgstream

    config = base_config()
    tgstream.plugme(config)
    config.register_application_wrapper(Minifying)
    return config.make_wsgi_app(global_conf, app_conf)


def broken(global_conf, **app_conf):
    raise LookupError("no such\\n   thing")


def plain(global_conf, **app_conf):
    return lambda environ, start_response: []
'''

MIDDLEWARES = '''
"""Middlewares as applications have them, each with one fault, or none."""

import contextlib
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import webob
import webob.dec

HELD = []


class Middleware:
    def __init__(self, app):
        self.app = app


class Joining(Middleware):
    def __call__(self, environ, start_response):
        body = self.app(environ, start_response)
        try:
            return [b"".join(body)]
        finally:
            body.close()


class Packing(Middleware):
    def __call__(self, environ, start_response):
        response = webob.Request(environ).get_response(self.app)
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            response.encode_content()
        response.body  # all of it
        del response.content_length
        return response(environ, start_response)


class JoiningPages(Middleware):
    def __call__(self, environ, start_response):
        started = []

        def start(status, headers, exc_info=None):
            started.append(dict(headers)["Content-Type"])
            return start_response(status, headers, exc_info)

        body = self.app(environ, start)
        if not started or not started[0].startswith("text/html"):
            return body
        try:
            return [b"".join(body)]
        finally:
            body.close()


class Counting(Middleware):
    def __call__(self, environ, start_response):
        def start(status, headers, exc_info=None):
            headers = [*headers, ("Content-Length", "131072")]
            return start_response(status, headers, exc_info)

        return self.app(environ, start)


class Compressing(Middleware):
    flush = None

    def __call__(self, environ, start_response):
        if "gzip" not in environ.get("HTTP_ACCEPT_ENCODING", ""):
            return self.app(environ, start_response)

        def start(status, headers, exc_info=None):
            headers = [*headers, ("Content-Encoding", "gzip")]
            return start_response(status, headers, exc_info)

        return self.compressed(self.app(environ, start))

    def compressed(self, body):
        zipper = zlib.compressobj(wbits=31)
        try:
            for chunk in body:
                data = zipper.compress(chunk)
                if self.flush is not None:
                    data += zipper.flush(self.flush)
                if data:
                    yield data
            yield zipper.flush()
        finally:
            body.close()


class Collecting(Compressing):
    def compressed(self, body):
        return [b"".join(super().compressed(body))]


class Flushing(Compressing):
    flush = zlib.Z_SYNC_FLUSH


class Swallowing(Middleware):
    def __call__(self, environ, start_response):
        body = self.app(environ, start_response)
        try:
            yield from body
        except Exception:
            pass
        finally:
            body.close()


class Mapping(Middleware):
    def __call__(self, environ, start_response):
        return map(bytes, self.app(environ, start_response))


class Keeping(Mapping):
    def __call__(self, environ, start_response):
        HELD.append(super().__call__(environ, start_response))
        return HELD[-1]


class Elsewhere(Middleware):
    def __call__(self, environ, start_response):
        return self.pulled(self.app(environ, start_response))

    def pulled(self, body):
        chunks = iter(body)
        with ThreadPoolExecutor(1) as other:
            try:
                while chunk := other.submit(next, chunks, b"").result():
                    yield chunk
            finally:
                body.close()


class Answering(Middleware):
    """It reports an error as PEP 3333 says: with ``exc_info``."""

    def __call__(self, environ, start_response):
        try:
            yield from self.app(environ, start_response)
        except Exception:
            start_response("500 Oh", [], sys.exc_info())
            yield b"an error page"


class Bound(Middleware):
    """It is for the thread that it was called on."""

    def __call__(self, environ, start_response):
        return self.checked(self.app(environ, start_response), threading.get_ident())

    def checked(self, body, thread):
        with contextlib.closing(body):
            for chunk in body:
                if threading.get_ident() != thread:
                    raise RuntimeError("another thread")
                yield chunk


class Leaking(Middleware):
    def __call__(self, environ, start_response):
        if not HELD:
            HELD.append(sys.modules["doctored"].DBSession.get_bind().connect())
        return self.app(environ, start_response)


def unguarded(app):
    guard = app.__closure__[0].cell_contents  # what passing() stands around
    return guard.app


class Anything(Middleware):
    def __call__(self, *args, **kwargs):
        return self.app(*args, **kwargs)


@webob.dec.wsgify.middleware
def reading(request, app):
    response = request.get_response(app)
    response.md5_etag()
    return response


class Picky(Middleware):
    def __call__(self, environ, start_response):
        def start(status, headers, exc_info=None):
            if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
                status = "406 Not Acceptable"
            elif dict(headers)["Content-Type"].startswith("text/html"):
                raise ValueError("no page")
            return start_response(status, headers, exc_info)

        return self.app(environ, start)


class Raising(Middleware):
    def __call__(self, environ, start_response):
        raise LookupError("no way")


class Lazy:
    @property
    def __class__(self):
        raise LookupError("not within a request")


class Lending(Middleware):
    def __call__(self, environ, start_response):
        return self.lend(Lazy(), environ, start_response)

    def lend(self, lazy, environ, start_response):
        return self.app(environ, start_response)


class Asking(Middleware):
    def __call__(self, environ, start_response):
        if environ["PATH_INFO"].startswith("/open"):
            return self.app(environ, start_response)
        start_response("302 Found", [("Location", "/login")])
        return [b""]


def passing(app):
    def pass_on(environ, start_response):
        return app(environ, start_response)

    return pass_on


def factory(global_conf, name):
    return globals()[name]
'''

INI = """
[pipeline:main]
pipeline = {pipeline}

[filter:middleware]
use = call:doctored_middlewares:factory
name = {middleware}

[filter:passing]
use = call:doctored_middlewares:factory
name = passing

[app:app]
use = call:doctored:{factory}
sqlalchemy.url = {url}
{options}
"""

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the application's modules, which is the current one."""
    (tmp_path / "doctored.py").write_text(APP)
    (tmp_path / "doctored_middlewares.py").write_text(MIDDLEWARES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in "doctored", "doctored_middlewares":
        for held in getattr(sys.modules.pop(name, None), "HELD", ()):
            getattr(held, "close", list)()
            if hasattr(held, "engine"):
                held.engine.dispose()


def write(
    folder: Path,
    factory: str = "main",
    middleware: str = "",
    options: str = "",
    url: str = "sqlite:///development.db",
) -> None:
    """An ``.ini`` file for an application, with a middleware around it."""
    pipeline = "middleware passing app" if middleware else "app"
    text = INI.format(
        pipeline=pipeline,
        middleware=middleware,
        factory=factory,
        options=options,
        url=url,
    )
    (folder / "test.ini").write_text(text)


@pytest.fixture
def run(folder: Path, make_app: MakeApp, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the doctor in this process, and returns its exit status and its text."""

    def run(*arguments: str, **application: str) -> tuple[int, str]:
        write(folder, **application)
        code = main(["doctor", "test.ini", *arguments])
        return code, capsys.readouterr().out

    return run


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in a process of its own, as a user does."""
    ran = subprocess.run(
        [sys.executable, "-m", "tgstream", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ran.returncode, ran.stdout + ran.stderr


def checks(text: str) -> dict[str, tuple[str, str]]:
    """The checks of an output: the mark of each, and all of its text on one line."""
    found = {}
    for each in re.split(r"\n(?=\S)", text)[:-1]:
        said = " ".join(each[26:].split())
        found[each[6:26].strip()] = (each[:6].strip(), said)
    return found


def failed(text: str) -> list[str]:
    """The names of the checks that failed."""
    return [name for name, (mark, _) in checks(text).items() if mark == "FAIL"]


# Applications that stream.


@pytest.mark.parametrize("options", ["", "debug = true", "registry_streaming = false"])
def test_good_application_passes(run: Run, options: str) -> None:
    """Every check is told, and none of them is a warning."""
    code, text = run(options=options)
    assert code == 0
    assert {mark for mark, _ in checks(text).values()} <= {"ok", "note"}
    assert [*checks(text)] == [
        *("application", "options", "channels", "database", "transactions"),
        *("registry_streaming", "error tracing", "tg.session", "orjson"),
        *("middlewares", "guard", "first chunk", "Content-Length", "gzip"),
        *("close", "threads", "failure", "left behind"),
    ]
    assert max(map(len, text.splitlines())) <= 88


def test_layer_may_take_its_arguments_as_it_likes(run: Run) -> None:
    """As ``wsgiref.validate`` does."""
    code, text = run(middleware="Anything")
    layers = checks(text)["middlewares"][1].split(", ")
    assert (code, layers[0]) == (0, "doctored_middlewares.Anything")


def test_proxy_of_an_application_is_not_asked_for_what_it_stands_for(run: Run) -> None:
    """It might make a query, or raise outside of a request."""
    code, text = run(middleware="Lending")
    assert (code, failed(text)) == (0, [])


@pytest.mark.parametrize("debug", ["false", "true"])
def test_layers_are_those_that_a_request_comes_through(run: Run, debug: str) -> None:
    """Outermost first, those of TurboGears and application wrappers too."""
    _, text = run(middleware="Flushing", options=f"debug = {debug}")
    layers = checks(text)["middlewares"][1].split(", ")
    outside = ["doctored_middlewares.Flushing", "doctored_middlewares.passing.pass_on"]
    assert layers[:3] == [*outside, "tgstream.Guard"]
    assert "tg.DBSessionRemoverMiddleware" in layers
    assert layers[-1].startswith("tg.") and layers[-1].endswith("Wrapper")


def test_compression_that_flushes_is_told_and_passes(run: Run) -> None:
    """What arrives is decompressed before it is judged."""
    code, text = run(middleware="Flushing")
    assert code == 0
    assert checks(text)["gzip"] == ("ok", "gzip, a chunk at a time")


# Applications that do not.


@pytest.mark.parametrize(
    ("middleware", "check", "found"),
    [
        ("Joining", "first chunk", "until all 64 chunks are made (text/plain)"),
        ("JoiningPages", "first chunk", "until all 64 chunks are made (text/html)"),
        ("Counting", "Content-Length", "is sent with Content-Length: 131072"),
        ("Collecting", "gzip", "until all 64 chunks are made (text/plain)"),
        ("Compressing", "gzip", "chunks are made (text/plain)"),
        ("Swallowing", "failure", "it looks whole"),
        ("Keeping", "close", "a client that leaves does not end it: "),
        ("Elsewhere", "threads", "made on another thread than the server's"),
        ("Bound", "threads", "on another thread than the first raises RuntimeError"),
        ("Leaking", "left behind", "connections checked out"),
    ],
)
def test_middleware_that_breaks_streams_is_named(
    run: Run, middleware: str, check: str, found: str
) -> None:
    """With what it does, and with advice; nothing else is blamed."""
    code, text = run(middleware=middleware)
    assert code == 1
    assert failed(text) == [check]
    said = checks(text)[check][1]
    assert found in said
    assert (f"doctored_middlewares.{middleware}" in said) == (middleware != "Leaking")
    assert "pass_on" not in said
    assert " -> " in said


def test_middleware_that_does_not_pass_on_close_is_warned_of(run: Run) -> None:
    """The stream ends all the same when the server drops the body, in CPython."""
    code, text = run(middleware="Mapping")
    mark, said = checks(text)["close"]
    assert (code, mark) == (0, "warn")
    assert "only when the server lets go of the body: doctored_middlewares.M" in said


def test_middleware_that_refuses_streams_is_told_of(run: Run) -> None:
    """Of some type, or for some clients."""
    code, text = run(middleware="Picky", options="trace_errors.enable = false")
    assert code == 1
    assert failed(text) == ["first chunk", "gzip"]
    found = checks(text)
    assert "a stream of text/html raises ValueError: no page" in found["first chunk"][1]
    assert "stream of text/plain is answered 406 Not Acceptable" in found["gzip"][1]


def test_middleware_that_packs_what_it_holds_back_anyway_is_told_of(run: Run) -> None:
    """It is no fault of the compression, and none of its merits."""
    code, text = run(middleware="Packing")
    assert code == 1
    assert failed(text) == ["first chunk"]
    assert checks(text)["gzip"] == ("ok", "gzip, held back as without it")


def test_middleware_of_webob_is_named(run: Run) -> None:
    """By its function."""
    code, text = run(middleware="reading")
    assert code == 1
    assert failed(text) == ["first chunk", "Content-Length"]
    for name in "middlewares", *failed(text):
        assert "doctored_middlewares.reading" in checks(text)[name][1]


def test_application_wrapper_that_reads_the_body_is_named(run: Run) -> None:
    """It is inside of TurboGears, where no layer can be asked by itself."""
    code, text = run(factory="wrapped")
    assert code == 1
    assert failed(text) == ["first chunk", "Content-Length"]
    for name in failed(text):
        assert "doctored.Minifying" in checks(text)[name][1]


@pytest.mark.parametrize(
    ("options", "appended"),
    [("", "'Internal Server Error'"), ("debug = true", "'<!DOCTYPE HTML")],
)
def test_missing_guard_lets_foreign_text_through(
    run: Run, options: str, appended: str
) -> None:
    """On servers that take a second ``start_response``."""
    code, text = run(middleware="unguarded", options=options)
    assert code == 1
    assert failed(text) == ["failure"]
    assert f"{appended}" in checks(text)["failure"][1]
    assert "was made before tgstream was imported" in checks(text)["guard"][1]


def test_middleware_that_answers_as_it_may_passes(run: Run) -> None:
    """An error page with ``exc_info`` is for the server to decide."""
    assert run(middleware="Answering")[0] == 0


def test_application_without_a_guard_fails(folder: Path) -> None:
    """As it is in its server, where nobody has imported tgstream before it is made."""
    write(folder, factory="unplugged")
    code, text = command(folder, "doctor", "test.ini")
    assert code == 1
    assert failed(text) == ["failure"]
    assert "'Internal Server Error' is appended" in checks(text)["failure"][1]
    assert "backlash.tracing.errors.middleware.Trace" in checks(text)["failure"][1]
    mark, guard = checks(text)["guard"]
    assert mark == "warn"
    assert "nothing in the application or its root controller imports" in guard
    assert "tgstream.plugme(base_config)" in guard


def test_root_controller_that_imports_tgstream_is_too_late(folder: Path) -> None:
    """In a quickstarted application it is imported by the first request."""
    controllers = folder / "package/controllers"
    controllers.mkdir(parents=True)
    (folder / "package/__init__.py").touch()
    (controllers / "__init__.py").touch()
    (controllers / "root.py").write_text(
        "import tgstream\nfrom doctored import RootController as RootController\n"
    )
    write(folder, factory="lazy", options="trace_errors.enable = false")
    code, text = command(folder, "doctor", "test.ini")
    assert code == 0  # there is nothing that the guard would have to hold back
    guard = checks(text)["guard"]
    assert guard[0] == "warn"
    assert "the application was made before tgstream was imported" in guard[1]


def test_request_that_does_not_reach_turbogears_is_told(run: Run) -> None:
    """With what answered; another path may be asked for."""
    code, text = run(middleware="Asking")
    assert code == 1
    assert failed(text) == ["middlewares"]
    said = checks(text)["middlewares"][1]
    assert "/tgstream-doctor is answered 302 Found before TurboGears has it" in said
    code, text = run("--path", "/open/door", middleware="Asking")
    assert code == 0
    code, text = run(middleware="Raising")
    assert code == 1
    said = checks(text)["middlewares"][1]
    assert "raises LookupError: no way, in doctored_middlewares.py, line " in said
    assert said.endswith("Mend this first.")


# What is set.


@pytest.mark.parametrize("factory", ["main", "unplugged"])
def test_option_that_cannot_be_read_is_named(run: Run, factory: str) -> None:
    """Also where the application does not load because of it."""
    code, text = run(factory=factory, options="tgstream.chunk_size = many")
    assert code == 1
    assert "options" in failed(text)
    said = checks(text)["options"][1]
    assert said.startswith("tgstream.chunk_size is 'many', which cannot be read")
    assert "The default is 32768" in said


def test_option_that_does_not_exist_is_named(run: Run) -> None:
    """With those that do."""
    code, text = run(options="tgstream.chunksize = 9")
    assert code == 1
    said = checks(text)["options"][1]
    assert said.startswith("tgstream has no option tgstream.chunksize -> Its options")
    assert "tgstream.chunk_size" in said


def test_options_that_are_set_are_told(run: Run) -> None:
    """So that one sees which file was read."""
    code, text = run(options="tgstream.chunk_size = 9")
    assert (code, checks(text)["options"][1]) == (0, "tgstream.chunk_size = 9")


def test_database_in_memory_is_warned_of(run: Run) -> None:
    """With the advice of the README."""
    code, text = run(url="sqlite:///:memory:")
    mark, said = checks(text)["database"]
    assert (code, mark) == (0, "warn")
    assert said.startswith("DBSession on sqlite:///:memory:, which is one connection")
    assert said.endswith("sqlalchemy.url = sqlite:///%(here)s/test.db")


def test_session_that_cannot_be_found_fails(run: Run, folder: Path) -> None:
    """The option names it; no stream can begin, of which nobody gets a mail."""
    code, text = run(options="tgstream.sessions = doctored.Other")
    assert code == 1
    assert failed(text) == ["database", "first chunk"]
    assert (
        "a stream cannot begin: ValueError: the opt" in checks(text)["first chunk"][1]
    )
    assert not (folder / "reported").exists()
    assert "tgstream.sessions names doctored.Other" in checks(text)["database"][1]


def test_sessions_are_named_with_their_databases(run: Run) -> None:
    """Each of which a stream gets its own."""
    code, text = run(options="tgstream.sessions = doctored.Second")
    assert code == 0
    database = checks(text)["database"][1]
    first = "DBSession on sqlite:///development.db"
    assert database == f"{first}, a session of tgstream.sessions"


def test_settings_that_do_not_go_with_streams_are_told() -> None:
    """Each with what to do about it."""
    found = {
        each.name: each
        for each in settings(
            {"tg.slowreqs": {"enable": True, "interval": 7}, "session.enabled": "no"}
        )
    }
    assert "longer than 7 s" in found["slow requests"].found
    assert "trace_slowreqs.exclude" in found["slow requests"].advice
    assert found["transactions"].mark == "note"
    assert found["tg.session"].found == "off"
    assert found["database"].found == "no scoped session"
    debugged = {
        each.name: each for each in settings({"debug": "true", "debugbar.engine": 1})
    }
    assert "keeps every query" in debugged["debugbar"].found
    assert debugged["error tracing"].mark == "note"


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it matters, and how to get it."""
    for name in "backlash", "beaker", "orjson":
        monkeypatch.setitem(sys.modules, name, None)
    config = {"session.enabled": True, "tm.enabled": True}
    found = {each.name: each for each in settings(config)}
    assert found["error tracing"].found == "none: backlash is not installed"
    assert found["tg.session"].found == "none: Beaker is not installed"
    assert "pip install 'tgstream[orjson]'" in found["orjson"].advice


def channels(url: str) -> Finding:
    """What is found of an option ``tgstream.channels``."""
    found = settings({"tgstream.channels": url})
    return next(each for each in found if each.name == "channels")


def test_channels_that_cannot_be_reached_fail() -> None:
    """The server is asked; no password is told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = channels(f"redis://user:secret@127.0.0.1:{port}/0")
    assert found.mark == "FAIL"
    assert f"redis://127.0.0.1:{port}/0 cannot be reached" in found.found
    assert "secret" not in found.found


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
def test_no_password_is_told(url: str, shown: str) -> None:
    """Neither with the options, nor where they cannot be used, or not be read."""
    found = [*settings({"tgstream.channels": url})]
    assert found[0].found == f"tgstream.channels = {shown}"
    assert shown in found[1].found
    assert found[1].mark == "FAIL"
    assert not re.search("secret|sec/|sec#|'sec'", text_of(found))


def test_no_query_of_a_database_is_told_and_any_factory_is_fine() -> None:
    """Drivers take passwords there; and a factory of sessions may be a function."""
    engine = create_engine("sqlite:///some.db?timeout=7")
    bound: list[Any] = [
        sessionmaker(engine),
        sessionmaker(binds={Session: engine}),
        lambda: Session(engine),
        partial(Session, engine),
    ]
    unbound: list[Any] = [sessionmaker(), Session, lambda: Session(tg.request.engine)]
    for factory in bound + unbound:
        found = settings({"DBSession": scoped_session(factory)})
        [database] = [each for each in found if each.name == "database"]
        assert database.mark == "ok"
        place = " on sqlite:///some.db" if factory in bound else ""
        assert database.found == f"DBSession{place}"


def test_database_in_memory_is_found_behind_any_factory() -> None:
    """A function, or a session with an engine for each class."""
    engine = create_engine("sqlite://")
    factories: list[Any] = [
        lambda: Session(engine),
        sessionmaker(binds={Session: engine}),
    ]
    for factory in factories:
        found = settings({"DBSession": scoped_session(factory)})
        [database] = [each for each in found if each.name == "database"]
        assert database.mark == "warn"
        assert "one connection for all sessions" in database.found
    engine.dispose()


def test_pooler_is_told_from_postgresql_itself(postgresql: str) -> None:
    """Only behind a pooler does psycopg have to prepare nothing."""
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (postgresql, {}, "ok", "no connection pooler is in between"),
        (postgresql, {"prepare_threshold": None}, "ok", "off"),
        (f"{postgresql}/nowhere", {}, "warn", "cannot be reached"),
    ]
    for url, arguments, mark, words in cases:
        engine = create_engine(url, connect_args=arguments, poolclass=NullPool)
        config = {"DBSession": scoped_session(sessionmaker(engine))}
        (found,) = [x for x in settings(config) if x.name == "prepared statements"]
        assert found.mark == mark
        assert words in found.found


def test_query_of_a_redis_that_is_tgstreams_is_told() -> None:
    """It would be heard by the package redis, and nothing by those who listen."""
    found = channels("redis://127.0.0.1/0?protocol=3&db=1&decode_responses=true")
    assert found.mark == "FAIL"
    assert "says decode_responses, protocol, which tgstream sets itself" in found.found


def test_missing_package_redis_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra of tgstream."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "tgstream.live.backends.redis", raising=False)
    found = channels("redis://127.0.0.1/0")
    assert found.mark == "FAIL"
    assert "the package redis is not installed" in found.found


# Applications that cannot be loaded.


@pytest.mark.parametrize(
    ("factory", "error"),
    [
        ("broken", "it raises LookupError: no such thing, in doctored.py, line "),
        ("missing", "it raises AttributeError: module 'doctored' has no attribute"),
    ],
)
def test_application_that_cannot_be_loaded_is_told_in_a_sentence(
    run: Run, factory: str, error: str
) -> None:
    """No traceback, but where in the application it came from."""
    code, text = run(factory=factory)
    assert code == 1
    assert [*checks(text)] == ["application"]
    assert f"test.ini cannot be loaded: {error}" in checks(text)["application"][1]


def test_file_that_cannot_be_read_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a sentence, too."""
    (folder / "test.ini").write_text("[app:main")
    assert main(["doctor", "test.ini"]) == 1
    said = checks(capsys.readouterr().out)["application"][1]
    assert "it raises MissingSectionHeaderError: " in said


def test_file_that_is_no_text_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that is no configuration."""
    (folder / "test.ini").write_bytes(b"[app:main]\nname = \xff\n")
    assert main(["doctor", "test.ini"]) == 1
    said = checks(capsys.readouterr().out)["application"][1]
    assert "it raises UnicodeDecodeError: " in said


def test_missing_paste_deploy_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not a requirement of tgstream."""
    monkeypatch.setitem(sys.modules, "paste.deploy", None)
    code, text = run()
    assert code == 1
    assert "PasteDeploy, which reads the file, is not" in checks(text)["application"][1]


def test_application_without_turbogears_fails(run: Run) -> None:
    """There is nothing that could be asked."""
    code, text = run(factory="plain")
    assert code == 1
    assert "no application of TurboGears" in checks(text)["application"][1]


# The page on it.

PAGE = (Path(__file__).parents[2] / "docs/doctor.rst").read_text()
SHOWN = [
    re.sub("^    ", "", block, flags=re.MULTILINE)
    for block in re.findall(r"code-block:: text\n\n((?: {4}.*\n)+)", PAGE)
]


@pytest.mark.parametrize(
    ("shown", "file", "application"),
    [
        (SHOWN[0], "development.ini", {}),
        (
            SHOWN[1],
            "broken.ini",
            {
                "factory": "unplugged",
                "middleware": "Collecting",
                "options": "tgstream.chunksize = 65536",
                "url": "sqlite:///:memory:",
            },
        ),
    ],
    ids=["good", "broken"],
)
def test_page_shows_what_is_printed(
    tmp_path: Path, shown: str, file: str, application: dict[str, str]
) -> None:
    """Of an application whose modules are ``myapp`` and ``myapp.lib``."""
    (tmp_path / "myapp").mkdir()
    (tmp_path / "myapp/__init__.py").write_text(APP)
    (tmp_path / "myapp/lib.py").write_text(MIDDLEWARES)
    write(tmp_path, **application)
    text = (tmp_path / "test.ini").read_text().replace("passing app", "app")
    text = text.replace("doctored_middlewares", "myapp.lib").replace(
        "doctored", "myapp"
    )
    (tmp_path / file).write_text(text)
    code, printed = command(tmp_path, "doctor", file)
    assert printed == shown
    assert code == ("FAIL" in shown)


def test_page_shows_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its version; of servers those that are here."""
    main(["doctor"])

    def without_versions(text: str) -> dict[str, tuple[str, str]]:
        return checks(re.sub(r"\d+(\.\w+)+(?= \(|: )", "N", text))

    printed = without_versions(capsys.readouterr().out)
    shown = without_versions(SHOWN[2])
    assert printed.items() <= shown.items()
    assert {"Python", "TurboGears2", "orjson", "redis", "waitress"} <= printed.keys()


# What it leaves.


def test_doctor_runs_no_controller_and_leaves_nothing(
    run: Run, folder: Path, make_app: MakeApp
) -> None:
    """No file, no connection, no mail, no hook, no context, no setting."""
    before = {name: [*hooks] for name, hooks in tg.hooks._hooks.items()}
    write(folder, middleware="Joining")
    loaded = _loading.load("test.ini")
    [tg_app] = loaded.tg_apps
    files = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    config, root = dict(tg_app.config), dict(tg_app.controller_instances)
    from tgstream.doctor.examine import examine

    examine("test.ini", loaded, "/anywhere")
    assert files == {
        path for path in folder.rglob("*") if "__pycache__" not in path.parts
    }
    assert (tg_app.config, tg_app.controller_instances) == (config, root)
    after = {name: hooks for name, hooks in tg.hooks._hooks.items() if hooks}
    assert after.keys() <= before.keys() | {"before_render", "after_wsgi_middlewares"}
    assert tg.config["trace_errors.reporters"]
    assert_thread_clean()


# The command.


def test_command_has_exit_statuses_for_scripts(folder: Path) -> None:
    """1 for streams that will break; the page has others. A section may be named."""
    write(folder, middleware="Joining")
    code, text = command(folder, "doctor", "test.ini#main")
    assert (code, failed(text)) == (1, ["first chunk"])
    assert "Traceback" not in text


def test_reader_that_has_had_enough_is_no_error() -> None:
    """As ``head -1`` is; the exit status is what it would have been."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as output:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tgstream", "doctor"],
            cwd=Path(__file__).parents[2],
            stdout=output,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_wrong_command_is_told_how_it_is_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And exits with 2."""
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: python -m tgstream")
    (folder / "test.ini").touch()
    for wrong in ["nothing.ini"], ["."], [""], ["test.ini", "--path", "x"], ["--wrong"]:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *wrong])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("usage: python -m tgstream ")


def test_help_tells_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    """For those who call it from a script."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    assert "Exit status: 1 where streams will break" in capsys.readouterr().out


# The environment.


def test_environment_is_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every requirement of tgstream, its extras, and the servers that are there."""
    assert main(["doctor"]) == 0
    found = checks(capsys.readouterr().out)
    assert {"Python", "TurboGears2", "SQLAlchemy", "orjson", "waitress"} <= found.keys()
    assert found["waitress"][1].endswith(": a failed stream breaks")
    assert "sync worker" in found["gunicorn"][1]


@pytest.mark.parametrize("name", DOCTORS_SERVERS)
def test_server_is_told_of_as_it_was_seen(name: str) -> None:
    """What the page on servers has in its table."""
    wanted = {"pyuwsgi": "uwsgi"}.get(name, name.lower())
    seen = [cells for row, cells in EXPECTED.items() if row.startswith(wanted)]
    seen = [cells for cells in seen if cells["failure"] != "refused"]
    assert seen
    said = server(name, "9").found
    for cells in seen:
        assert (BROKEN in said) == (cells["failure"] == "breaks")
        assert ("not noticed" in said) == (cells["client leaves"] == "never noticed")


def test_package_that_is_too_old_fails() -> None:
    """Or is not there."""
    assert compared("WebOb", None, "1.8.9").mark == "FAIL"
    old = compared("WebOb", "1.8.8", "1.8.9")
    assert (old.mark, old.advice) == ("FAIL", "Install WebOb 1.8.9 or later.")
    assert server("granian", "2.8.8").mark == "warn"
    assert server("granian", "2.8.9").mark == "ok"


@pytest.mark.parametrize(
    ("have", "floor", "below"),
    [
        ("2.5.0", "2.5", False),
        ("2.5", "2.5.0", False),
        ("2.10", "2.9.1", False),
        ("2.4.99", "2.5.0", True),
        ("3.0rc1", "3.0", False),
        ("unknown", "1", True),
    ],
)
def test_versions_are_compared_by_their_numbers(
    have: str, floor: str, below: bool
) -> None:
    """As many as there are."""
    assert is_below(have, floor) is below


def test_finding_is_plain_text_of_one_width() -> None:
    """A word that is longer stays whole."""
    long = "x" * 70
    text = text_of([Finding("warn", "name", f"found {long}", "do_this, " * 10)])
    lines = text.splitlines()
    assert lines[0] == "warn  name                found"
    assert lines[1] == " " * 26 + long
    assert lines[2].startswith(" " * 26 + "-> do_this,")
    assert lines[3].startswith(" " * 29 + "do_this,")
    assert {each.mark for each in environment()} <= {"ok", "note", "warn"}
