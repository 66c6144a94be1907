"""Start an application on a real server, on a free port of this machine.

    python -m tests.live_apps.run waitress stream_app plugged=no

It prints ``port N`` when the server listens, and serves until it is terminated.
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
    """Return an option of the server, which stands among those of the application."""
    match = re.search(f"^{name}=(.*)$", os.environ[APP], re.MULTILINE)
    return str(match[1] if match else default)


def threads() -> int:
    """Return how many threads a server with threads has."""
    return int(option("threads", THREADS))


def host() -> str:
    """Return the address on which the server listens."""
    return option("host", "127.0.0.1")


def set_patience(listener: socket.socket) -> None:
    """Set ``TCP_USER_TIMEOUT``, in milliseconds, if the option ``patience`` does.

    The connections of a listening socket inherit it.
    """
    if milliseconds := int(option("patience", 0)):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def print_port(port: int) -> None:
    """Print the line that ``LiveServer`` waits for."""
    # In one write, because another process may write to stdout too.
    os.write(sys.stdout.fileno(), f"\nport {port}\n".encode())


def open_listener() -> socket.socket:
    """Return a socket that listens on a free port, and print the port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    print_port(listener.getsockname()[1])
    return listener


# Servers that run in this process.


def wsgiref(make_app: MakeApp) -> None:
    """The server of the standard library, one request at a time."""
    from wsgiref.simple_server import make_server

    server = make_server("127.0.0.1", 0, make_app())
    print_port(server.server_port)
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
    run_drain_block("os.kill(os.getpid(), signal.SIGINT)")
    print_port(listener.getsockname()[1])
    server.run()


def cheroot(make_app: MakeApp) -> None:
    """The server of CherryPy."""
    from cheroot.wsgi import Server

    server = Server(("127.0.0.1", 0), make_app(), numthreads=THREADS)
    server.prepare()
    print_port(server.bind_addr[1])
    server.serve()


def run_drain_block(word: str) -> dict[str, Any]:
    """Run the block of ``docs/servers.rst`` with this word, if the option is given.

    :returns: the names that the block defines.
    """
    names: dict[str, Any] = {}
    if DRAINS in os.environ[APP]:
        code_blocks = blocks((DOCS / "servers.rst").read_text())
        exec(next(block for block in code_blocks if word in block), names)
    return names


def when_ready(arbiter: Any) -> None:
    """Print gunicorn's port, before it forks its worker."""
    listener = arbiter.LISTENERS[0].sock
    set_patience(listener)
    print_port(listener.getsockname()[1])


def gunicorn(worker_class: str) -> Serve:
    """gunicorn with one worker process, which makes the application."""

    def serve(make_app: MakeApp) -> None:
        from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]

        class Application(BaseApplication):
            def load_config(self) -> None:
                for name, value in {
                    "bind": f"{host()}:0",
                    "worker_class": worker_class,
                    "threads": threads() if worker_class == "gthread" else 1,
                    "loglevel": "warning",
                    "graceful_timeout": 30 if DRAINS in os.environ[APP] else 1,
                    "max_requests": int(option("max_requests", 0)),
                    "when_ready": when_ready,
                }.items():
                    self.cfg.set(name, value)
                block = run_drain_block("def post_worker_init")
                for name in block.keys() & self.cfg.settings.keys():
                    self.cfg.set(name, block[name])

            def load(self) -> Any:
                return make_app()

        Application().run()

    return serve


def uvicorn(adapter: str) -> Serve:
    """An ASGI server, with an adapter from WSGI to ASGI."""

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
        Server(config).run(sockets=[open_listener()])

    return serve


def hypercorn(make_app: MakeApp) -> None:
    """An ASGI server that accepts WSGI applications."""
    from hypercorn.asyncio import serve as serve_forever
    from hypercorn.config import Config

    config = Config()
    listener = open_listener()
    config.bind = [f"fd://{listener.fileno()}"]
    app: Any = make_app()
    asyncio.run(serve_forever(app, config, mode="wsgi"))


# Servers that are separate programs, and import the application by its name.


def program(arguments: Callable[[int, Path], list[str]]) -> Serve:
    """A server in a child process. This process passes SIGTERM on to it."""

    def serve(make_app: MakeApp) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)  # Apache's workers are another user
            server = subprocess.Popen(arguments(port, Path(folder)), cwd=ROOT)
            signal.signal(signal.SIGTERM, lambda *_: server.terminate())
            while server.poll() is None and not accepts_connections(port):
                pass
            print_port(port)
            server.wait()

    return serve


def accepts_connections(port: int) -> bool:
    """Return whether a server listens on this port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def granian(port: int, folder: Path) -> list[str]:
    """Granian, whose loop is in Rust."""
    options = "--interface wsgi --host 127.0.0.1 --no-ws --blocking-threads"
    command = [sys.executable, "-m", "granian", *options.split(), str(THREADS)]
    options = "--workers-kill-timeout 1 --log-level warning --port"
    return [*command, *options.split(), str(port), "tests.live_apps.named:application"]


def uwsgi(options: str) -> Serve:
    """uWSGI, in the mode of these options."""

    def arguments(port: int, folder: Path) -> list[str]:
        commands = Path(sys.executable).parent
        mercy = "60" if DRAINS in os.environ[APP] else "1"  # as uWSGI has it, or soon
        common = "--master --need-app --enable-threads --die-on-term --disable-logging"
        return [
            str(commands / "uwsgi"),
            *(f"--http-socket 127.0.0.1:{port} {common} {options}").split(),
            *("--worker-reload-mercy", mercy, "--virtualenv", sys.prefix),
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
"""
"""The configuration that every Apache of these tests needs."""

MOD_WSGI = """
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
    """Apache with Debian's module, and one daemon process.

    The process runs as www-data without this environment, so its file sets it.
    """
    site = [path for path in sys.path if path.endswith("site-packages")]
    path = ":".join([str(ROOT), *site])
    script = f"import os; os.environ[{APP!r}] = {os.environ[APP]!r}\n"
    script += "from tests.live_apps.named import application\n"
    (folder / "app.wsgi").write_text(script)
    conf = (APACHE + MOD_WSGI).format(folder=folder, port=port, path=path)
    (folder / "conf").write_text(conf)
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
    """Return the application of a module of this package, made with options."""
    app, *options = words
    keywords = dict(option.split("=", 1) for option in options)
    return import_module(f"tests.live_apps.{app}").make_app(**keywords)


def main(server: str, *words: str) -> None:
    """Serve ``tests.live_apps.<app>.make_app(**options)``."""
    del sys.argv[1:]  # gunicorn would read these arguments
    os.environ[APP] = "\n".join(words)  # for servers that are separate programs
    # Make it only in the server's process, after gevent's worker has patched it.
    SERVERS[server](lambda: make_named([*words]))


if __name__ == "__main__":
    main(*sys.argv[1:])
