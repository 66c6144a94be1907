"""Sample applications with middlewares, and the doctor's findings for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

APP = '''
"""An application like a quickstarted one, in one module."""

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


class Minifier(ApplicationWrapper):
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
    """With plugme()."""
    import tgstream

    config = base_config()
    tgstream.plugme(config)
    return config.make_wsgi_app(global_conf, app_conf)


def unplugged(global_conf, **app_conf):
    """Without plugme(): only controllers may import tgstream."""
    return base_config().make_wsgi_app(global_conf, app_conf)


def lazy(global_conf, **app_conf):
    """Like a quickstarted one: the first request imports its root controller."""
    config = base_config(package=__import__("package"))
    config._blueprint.pop("root_controller")
    return config.make_wsgi_app(global_conf, app_conf)


def wrapped(global_conf, **app_conf):
    """With an application wrapper that reads the body."""
    import tgstream

    config = base_config()
    tgstream.plugme(config)
    config.register_application_wrapper(Minifier)
    return config.make_wsgi_app(global_conf, app_conf)


def broken(global_conf, **app_conf):
    raise LookupError("no such\\n   thing")


def plain(global_conf, **app_conf):
    return lambda environ, start_response: []
'''

MIDDLEWARES = '''
"""Middlewares of applications. Each has one fault or none."""

import contextlib
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import webob
import webob.dec

KEPT = []


class Middleware:
    def __init__(self, app):
        self.app = app


class Joiner(Middleware):
    def __call__(self, environ, start_response):
        body = self.app(environ, start_response)
        try:
            return [b"".join(body)]
        finally:
            body.close()


class BufferedCompressor(Middleware):
    def __call__(self, environ, start_response):
        response = webob.Request(environ).get_response(self.app)
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            response.encode_content()
        response.body  # all of it
        del response.content_length
        return response(environ, start_response)


class PageJoiner(Middleware):
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


class LengthSetter(Middleware):
    def __call__(self, environ, start_response):
        def start(status, headers, exc_info=None):
            headers = [*headers, ("Content-Length", "131072")]
            return start_response(status, headers, exc_info)

        return self.app(environ, start)


class UnflushedCompressor(Middleware):
    flush = None

    def __call__(self, environ, start_response):
        if "gzip" not in environ.get("HTTP_ACCEPT_ENCODING", ""):
            return self.app(environ, start_response)

        def start(status, headers, exc_info=None):
            headers = [*headers, ("Content-Encoding", "gzip")]
            return start_response(status, headers, exc_info)

        return self.compress(self.app(environ, start))

    def compress(self, body):
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


class Compressor(UnflushedCompressor):
    def compress(self, body):
        return [b"".join(super().compress(body))]


class FlushingCompressor(UnflushedCompressor):
    flush = zlib.Z_SYNC_FLUSH


class ErrorSwallower(Middleware):
    def __call__(self, environ, start_response):
        body = self.app(environ, start_response)
        try:
            yield from body
        except Exception:
            pass
        finally:
            body.close()


class Mapper(Middleware):
    def __call__(self, environ, start_response):
        return map(bytes, self.app(environ, start_response))


class BodyKeeper(Mapper):
    def __call__(self, environ, start_response):
        KEPT.append(super().__call__(environ, start_response))
        return KEPT[-1]


class ThreadSwitcher(Middleware):
    def __call__(self, environ, start_response):
        return self.iterate(self.app(environ, start_response))

    def iterate(self, body):
        chunks = iter(body)
        with ThreadPoolExecutor(1) as other:
            try:
                while chunk := other.submit(next, chunks, b"").result():
                    yield chunk
            finally:
                body.close()


class ErrorResponder(Middleware):
    """It responds to an error with ``exc_info``, as PEP 3333 allows."""

    def __call__(self, environ, start_response):
        try:
            yield from self.app(environ, start_response)
        except Exception:
            start_response("500 Oh", [], sys.exc_info())
            yield b"an error page"


class ThreadChecker(Middleware):
    """It raises if another thread iterates its body."""

    def __call__(self, environ, start_response):
        return self.check(self.app(environ, start_response), threading.get_ident())

    def check(self, body, thread):
        with contextlib.closing(body):
            for chunk in body:
                if threading.get_ident() != thread:
                    raise RuntimeError("another thread")
                yield chunk


class ConnectionLeaker(Middleware):
    def __call__(self, environ, start_response):
        if not KEPT:
            KEPT.append(sys.modules["sampleapp"].DBSession.get_bind().connect())
        return self.app(environ, start_response)


def remove_guard(app):
    guard = app.__closure__[0].cell_contents  # the application of pass_through()
    return guard.app


class AnyArguments(Middleware):
    def __call__(self, *args, **kwargs):
        return self.app(*args, **kwargs)


@webob.dec.wsgify.middleware
def add_etag(request, app):
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


class Raiser(Middleware):
    def __call__(self, environ, start_response):
        raise LookupError("no way")


class Proxy:
    @property
    def __class__(self):
        raise LookupError("not within a request")


class ProxyPasser(Middleware):
    def __call__(self, environ, start_response):
        return self.call(Proxy(), environ, start_response)

    def call(self, proxy, environ, start_response):
        return self.app(environ, start_response)


class LoginRedirect(Middleware):
    def __call__(self, environ, start_response):
        if environ["PATH_INFO"].startswith("/open"):
            return self.app(environ, start_response)
        start_response("302 Found", [("Location", "/login")])
        return [b""]


def pass_through(app):
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
use = call:sampleapp_middlewares:factory
name = {middleware}

[filter:pass_through]
use = call:sampleapp_middlewares:factory
name = pass_through

[app:app]
use = call:sampleapp:{factory}
sqlalchemy.url = {url}
{options}
"""


def write_application(
    folder: Path,
    factory: str = "main",
    middleware: str = "",
    options: str = "",
    url: str = "sqlite:///development.db",
) -> None:
    """Write an ``.ini`` file of an application.

    :param folder: the folder for the file, ``test.ini``.
    :param factory: a function of ``APP``.
    :param middleware: the name of a middleware of ``MIDDLEWARES`` around it, if any.
    :param options: more lines of the application's section.
    :param url: of its database.
    """
    pipeline = "middleware pass_through app" if middleware else "app"
    text = INI.format(
        pipeline=pipeline,
        middleware=middleware,
        factory=factory,
        options=options,
        url=url,
    )
    (folder / "test.ini").write_text(text)


def run_command(
    folder: Path, *arguments: str, options: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Run ``python -m tgstream`` as a user does.

    :param folder: the current folder.
    :param arguments: those of the command.
    :param options: those of the interpreter.
    :returns: the exit status, and everything that was printed.
    """
    process = subprocess.run(
        [sys.executable, *options, "-m", "tgstream", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stdout + process.stderr


def parse_findings(text: str) -> dict[str, tuple[str, str]]:
    """The mark of each check, and its result and advice on one line."""
    findings = {}
    for block in re.split(r"\n(?=\S)", text)[:-1]:
        result = " ".join(block[26:].split())
        findings[block[6:26].strip()] = (block[:6].strip(), result)
    return findings


def failed_checks(text: str) -> list[str]:
    """The names of the checks that failed."""
    return [name for name, (mark, _) in parse_findings(text).items() if mark == "FAIL"]
