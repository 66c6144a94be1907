"""Starts one application under one real server, on a free port of this machine.

    python -m tests.live_apps.run waitress stream_app plugged=no

It prints ``port N`` when it listens, and serves until it is terminated.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.pages import DOCS, blocks

MakeApp = Callable[[], Any]
Serve = Callable[[MakeApp], None]
THREADS = 6
APP = "TGSTREAM_LIVE_APP"
DRAINS = "drains=yes"
LOOKS = "looks="
ROOT = Path(__file__).parents[2]


def option(name: str, default: Any = "") -> str:
    """An option that is the server's, among those of the application."""
    found = re.search(f"^{name}=(.*)$", os.environ[APP], re.MULTILINE)
    return str(found[1] if found else default)


def threads() -> int:
    """How many requests a server of threads serves at once."""
    return int(option("threads", THREADS))


def host() -> str:
    """The address where a server listens."""
    return option("host", "127.0.0.1")


def set_patience(listener: socket.socket) -> None:
    """Have the kernel give up what a client has not taken for so many milliseconds.

    The connections of a listening socket inherit it.
    """
    if milliseconds := int(option("patience", 0)):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def say_port(port: int) -> None:
    """What ``LiveServer`` waits for."""
    # In one write: another process may write there, too.
    os.write(sys.stdout.fileno(), f"\nport {port}\n".encode())


def bound() -> socket.socket:
    """A socket that listens on a free port, which is said."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    say_port(listener.getsockname()[1])
    return listener


# Servers that are called.


def wsgiref(make_app: MakeApp) -> None:
    """One request at a time, as the standard library serves."""
    from wsgiref.simple_server import make_server

    server = make_server("127.0.0.1", 0, make_app())
    say_port(server.server_port)
    server.serve_forever()


def waitress(make_app: MakeApp) -> None:
    """Threads of one process."""
    from waitress.server import create_server

    listener = socket.create_server((host(), 0))
    set_patience(listener)
    server = create_server(
        make_app(),
        sockets=[listener],
        threads=threads(),
        channel_request_lookahead=int(LOOKS in os.environ[APP]),
    )
    drains("os.kill(os.getpid(), signal.SIGINT)")
    say_port(listener.getsockname()[1])
    server.run()


def cheroot(make_app: MakeApp) -> None:
    """The server of CherryPy."""
    from cheroot.wsgi import Server

    server = Server(("127.0.0.1", 0), make_app(), numthreads=THREADS)
    server.prepare()
    say_port(server.bind_addr[1])
    server.serve()


def drains(word: str) -> dict[str, Any]:
    """What the block of ``docs/servers.rst`` with this word sets, if asked for."""
    found: dict[str, Any] = {}
    if DRAINS in os.environ[APP]:
        shown = blocks((DOCS / "servers.rst").read_text())
        exec(next(each for each in shown if word in each), found)
    return found


def ready(arbiter: Any) -> None:
    """Tell where gunicorn listens, before its worker is forked."""
    listener = arbiter.LISTENERS[0].sock
    set_patience(listener)
    say_port(listener.getsockname()[1])


def gunicorn(worker_class: str) -> Serve:
    """One worker process, in which the application is made as it is there."""

    def serve(make_app: MakeApp) -> None:
        from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

        class Application(BaseApplication):
            def load_config(self) -> None:
                for name, value in {
                    "bind": f"{host()}:0",
                    "worker_class": worker_class,
                    "threads": threads() if worker_class == "gthread" else 1,
                    "loglevel": "warning",
                    "graceful_timeout": 1,
                    "when_ready": ready,
                }.items():
                    self.cfg.set(name, value)
                hook = "post_worker_init"
                if hook in (file := drains(f"def {hook}")):
                    self.cfg.set(hook, file[hook])

            def load(self) -> Any:
                return make_app()

        Application().run()

    return serve


def uvicorn(adapter: str) -> Serve:
    """An ASGI server, and what makes an ASGI application of a WSGI one."""

    def serve(make_app: MakeApp) -> None:
        from uvicorn import Config, Server

        if adapter == "a2wsgi":
            from a2wsgi import WSGIMiddleware

            app: Any = WSGIMiddleware(make_app(), workers=THREADS)
        else:
            from asgiref import wsgi

            adapt: Any = wsgi.WsgiToAsgi
            app = adapt(make_app())
        config = Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
        Server(config).run(sockets=[bound()])

    return serve


def hypercorn(make_app: MakeApp) -> None:
    """An ASGI server that takes WSGI applications."""
    from hypercorn.asyncio import serve as serve_forever
    from hypercorn.config import Config

    config = Config()
    listener = bound()
    config.bind = [f"fd://{listener.fileno()}"]
    app: Any = make_app()
    asyncio.run(serve_forever(app, config, mode="wsgi"))


# Servers that are programs, and import the application by its name.


def program(arguments: Callable[[int, Path], list[str]]) -> Serve:
    """A server in a process below this one, which hands its signals on."""

    def serve(make_app: MakeApp) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)  # Apache's workers are another user
            server = subprocess.Popen(arguments(port, Path(folder)), cwd=ROOT)
            signal.signal(signal.SIGTERM, lambda *_: server.terminate())
            while server.poll() is None and not answers(port):
                pass
            say_port(port)
            server.wait()

    return serve


def answers(port: int) -> bool:
    """Whether somebody listens on that port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def granian(port: int, folder: Path) -> list[str]:
    """Granian's own loop, in Rust."""
    options = "--interface wsgi --host 127.0.0.1 --no-ws --blocking-threads"
    command = [sys.executable, "-m", "granian", *options.split(), str(THREADS)]
    options = "--workers-kill-timeout 1 --log-level warning --port"
    return [*command, *options.split(), str(port), "tests.live_apps.named:application"]


def uwsgi(options: str) -> Serve:
    """uWSGI in one of its modes."""

    def arguments(port: int, folder: Path) -> list[str]:
        folder_of_commands = Path(sys.executable).parent
        common = "--master --need-app --enable-threads --die-on-term --disable-logging"
        return [
            str(folder_of_commands / "uwsgi"),
            *(f"--http-socket 127.0.0.1:{port} {common} {options}").split(),
            *("--worker-reload-mercy", "1", "--virtualenv", sys.prefix),
            *("--pythonpath", str(ROOT), "--module", "tests.live_apps.named"),
        ]

    return program(arguments)


APACHE = """
ServerRoot {folder}
ServerName localhost
Listen 127.0.0.1:{port}
PidFile {folder}/pid
ErrorLog /dev/stderr
LogLevel error
User www-data
Group www-data
GracefulShutdownTimeout 1
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule wsgi_module /usr/lib/apache2/modules/mod_wsgi.so
WSGISocketPrefix {folder}/wsgi
WSGIDaemonProcess app threads=6 python-path={path} home=/ shutdown-timeout=1
WSGIProcessGroup app
WSGIApplicationGroup %{{GLOBAL}}
WSGIScriptAlias / {folder}/app.wsgi
<Directory {folder}>
  Require all granted
</Directory>
"""


def mod_wsgi(port: int, folder: Path) -> list[str]:
    """Apache with Debian's module, and one daemon process of the application.

    That process gets no environment, and is www-data: what it needs is in its file.
    """
    site = [path for path in sys.path if path.endswith("site-packages")]
    path = ":".join([str(ROOT), *site])
    script = f"import os; os.environ[{APP!r}] = {os.environ[APP]!r}\n"
    script += "from tests.live_apps.named import application\n"
    (folder / "app.wsgi").write_text(script)
    (folder / "conf").write_text(APACHE.format(folder=folder, port=port, path=path))
    return ["/usr/sbin/apache2", "-DFOREGROUND", "-f", str(folder / "conf")]


SERVERS: dict[str, Serve] = {
    "wsgiref": wsgiref,
    "waitress": waitress,
    "gunicorn-sync": gunicorn("sync"),
    "gunicorn-gthread": gunicorn("gthread"),
    "gunicorn-gevent": gunicorn("gevent"),
    "cheroot": cheroot,
    "granian": program(granian),
    "uwsgi-threads": uwsgi(f"--threads {THREADS}"),
    "uwsgi-async": uwsgi(f"--async {THREADS} --ugreen"),
    "uwsgi-gevent": uwsgi(f"--gevent {THREADS} --gevent-early-monkey-patch"),
    "uwsgi-gevent-late": uwsgi(f"--gevent {THREADS} --gevent-monkey-patch"),
    "uvicorn-a2wsgi": uvicorn("a2wsgi"),
    "uvicorn-asgiref": uvicorn("asgiref"),
    "hypercorn": hypercorn,
    "mod_wsgi": program(mod_wsgi),
}


def make_named(words: list[str]) -> Any:
    """The application that a command names: a module of this package, and options."""
    app, *options = words
    keywords = dict(option.split("=", 1) for option in options)
    return import_module(f"tests.live_apps.{app}").make_app(**keywords)


def main(server: str, *words: str) -> None:
    """Serve ``tests.live_apps.<app>.make_app(**options)``."""
    del sys.argv[1:]  # which gunicorn would read
    os.environ[APP] = "\n".join(words)  # for a program
    # Made not before it is asked for: gevent's worker has patched the library by then.
    SERVERS[server](lambda: make_named([*words]))


if __name__ == "__main__":
    main(*sys.argv[1:])
