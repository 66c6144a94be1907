"""Applications with unusual databases, or without parts of the stack."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tg import TGController, expose
from tg.configuration.sqla.balanced_session import BalancedSession

import tgstream
from tests.conftest import MakeApp, assert_clean, pool
from tests.database.conftest import ModelRoot, find_user
from tests.model import MakeModel, User
from tests.wsgi import Call, get
from tgstream import Stream

# tm.enabled is off.


@pytest.mark.parametrize("zope", [True, False])
@pytest.mark.parametrize("commit", ["end", "each", "manual"])
def test_stream_with_tm_off_has_its_own_transaction(
    make_app: MakeApp, make_model: MakeModel, url: str, zope: bool, commit: str
) -> None:
    """Changes that the controller has not committed are rolled back."""
    model = make_model(url, zope=zope)
    model.seed("ada")
    kept: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(find_user(model, "ada"))
            kept[0].name = "gone"
            model.DBSession.add(User(name="gone, too"))
            model.DBSession.flush()
            return super().index()

    def body() -> Iterator[str]:
        assert model.names() == ["ada"]
        yield kept[0].name
        model.DBSession.add(User(name="undone"))
        model.DBSession.flush()
        tgstream.rollback()
        model.DBSession.add(User(name="bob"))
        if commit == "manual":
            tgstream.commit()
        yield "two"

    app = make_app(Loading(model, body, commit=commit), model, tm__enabled=False)
    assert get(app).text == "adatwo"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


@pytest.mark.parametrize("zope", [True, False])
def test_stream_with_tm_off_leaves_the_thread_clean(
    make_app: MakeApp, make_model: MakeModel, url: str, zope: bool
) -> None:
    """Failed and dropped streams do not block their thread or reach a commit."""
    model = make_model(url, zope=zope)

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="lost"))
        model.DBSession.flush()
        yield "one"
        raise ValueError("no")

    def writing() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        yield "one"

    app = make_app(ModelRoot(model, body), model, tm__enabled=False)
    with pytest.raises(ValueError, match="no"):
        get(app)
    call = Call(app, checked=False)
    next(call)
    call.drop()
    app = make_app(ModelRoot(model, writing), model, tm__enabled=False)
    assert get(app).text == "one"
    assert model.names() == ["ada"]
    assert_clean(model)


def test_stream_of_an_unregistered_session_commits(
    make_app: MakeApp, make_model: MakeModel, url: str
) -> None:
    """A session that is not registered with zope.sqlalchemy is committed, too."""
    model = make_model(url, zope=False)
    model.seed("ada")
    kept: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.append(find_user(model, "ada"))
            kept[0].name = "gone"
            return super().index()

    def body() -> Iterator[str]:
        assert pool(model).checkedout() == 0
        yield kept[0].name
        model.DBSession.add(User(name="bob"))

    assert get(make_app(Loading(model, body), model)).text == "ada"
    assert model.names() == ["ada", "bob"]
    assert_clean(model)


# Engines.


def test_balanced_session_reads_slaves_and_writes_the_master(
    make_app: MakeApp, make_model: MakeModel, tmp_path: Path
) -> None:
    """TG's master and slaves work in a stream like in a request."""
    slave = make_model(f"sqlite:///{tmp_path}/slave.db")
    slave.seed("of the slave")
    url = f"sqlite:///{tmp_path}/master.db"
    model = make_model(url, class_=BalancedSession)
    kept: list[User] = []

    class Loading(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            kept.extend(model.DBSession.query(User))
            return super().index()

    def body() -> Iterator[str]:
        yield kept[0].name
        model.DBSession.add(User(id=2, name="of the master"))
        tgstream.commit()
        yield "".join(each.name for each in model.DBSession.query(User.name))
        with model.DBSession().using_engine("master"):  # type: ignore[attr-defined]
            yield "".join(each.name for each in model.DBSession.query(User.name))

    app = make_app(
        Loading(model, body),
        model,
        **{
            "sqlalchemy.master.url": url,
            "sqlalchemy.slaves.first.url": f"sqlite:///{tmp_path}/slave.db",
        },
    )
    assert get(app).text == "of the slave" * 2 + "of the master"
    assert model.names() == ["of the master"]
    assert slave.names() == ["of the slave"]
    for engine in tg.config["balanced_engines"]["all"].values():
        assert engine.pool.checkedout() == 0
        engine.dispose()
    assert_clean(model)


def test_database_in_memory_warns_once_an_engine(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """In-memory SQLite uses one connection for all sessions of a thread."""

    url = "sqlite://?timeout=7"  # some drivers take a password there
    engines = [sa.create_engine(url) for _ in range(3)]
    by_function: Any = lambda: Session(engines[1])  # noqa: E731
    sessions: list[scoped_session[Session]] = [
        scoped_session(sessionmaker(engines[0])),
        scoped_session(by_function),
        scoped_session(sessionmaker(binds={User: engines[2]})),
    ]

    def body() -> Iterator[str]:
        for session in sessions:
            bound = {"mapper": User} if session is sessions[2] else {}
            session.execute(sa.text("SELECT 1"), bind_arguments=bound)
        yield "one"

    class Streams(TGController):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            return Stream(body())

    app = make_app(Streams(), tgstream__sessions=sessions)
    for _ in range(3):
        assert get(app).text == "one"
    warnings = [
        each.getMessage()
        for each in caplog.records
        if each.levelno == logging.WARNING and "one connection" in each.getMessage()
    ]
    assert len(warnings) == 3
    assert "sqlalchemy.url = sqlite:///%(here)s/test.db" in warnings[0]
    assert "timeout" not in warnings[0]
    for engine in engines:
        engine.dispose()


# Packages that are not installed.


NO_DATABASE = """
import sys
sys.modules['sqlalchemy'] = None  # as if not installed: TG imports it where it is
from tg import MinimalApplicationConfigurator, TGController, expose
import tgstream

class Root(TGController):
    @expose(content_type='text/plain')
    @tgstream.stream
    def index(self, fail=None):
        yield 'one'
        if fail:
            raise ValueError('no')
        yield 'two'

configurator = MinimalApplicationConfigurator()
configurator.update_blueprint({'root_controller': Root()})
tgstream.plugme(configurator)
app = configurator.make_wsgi_app({}, {})

from tests.wsgi import get
assert get(app).text == 'onetwo'
try:
    get(app, '/?fail=1')
except ValueError:
    print('raised')
for name in ('zope.sqlalchemy', 'transaction', 'tgstream.database.database'):
    print(name, name in sys.modules)
"""


def test_application_without_a_database_imports_no_database_package() -> None:
    """It streams without SQLAlchemy, zope.sqlalchemy and transaction."""
    done = subprocess.run(
        [sys.executable, "-c", NO_DATABASE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "raised",
        "zope.sqlalchemy False",
        "transaction False",
        "tgstream.database.database False",
    ]


NO_SQLALCHEMY = """
import sys
sys.modules['sqlalchemy'] = None  # as if it was not installed
import transaction
from tg import FullStackApplicationConfigurator, TGController, expose
import tgstream

class Root(TGController):
    @expose(content_type='text/plain')
    @tgstream.stream(commit='each')
    def index(self):
        yield 'one'
        transaction.get()
        yield 'two'
        raise ValueError('no')

class AppGlobals:
    pass

configurator = FullStackApplicationConfigurator()
configurator.update_blueprint({
    'root_controller': Root(), 'renderers': ['json'], 'default_renderer': 'json',
    'errorpage.enabled': False, 'helpers': object, 'app_globals': AppGlobals,
})
tgstream.plugme(configurator)
app = configurator.make_wsgi_app({}, {})

from tests.wsgi import get
try:
    get(app)
except ValueError:
    print('raised')
"""


def test_application_with_transactions_needs_no_sqlalchemy() -> None:
    """TG's transaction manager alone, for example for mails, needs no SQLAlchemy."""
    done = subprocess.run(
        [sys.executable, "-c", NO_SQLALCHEMY], capture_output=True, text=True
    )
    assert "raised" in done.stdout, done.stderr
