"""Stream a response with only tgstream and its requirements installed.

python -I -W error -W "ignore:'cgi' is deprecated:DeprecationWarning" tests/empty.py

WebOb causes the ignored warning. ``-I`` keeps this folder off the path, so that the
installed tgstream is imported and not the one beside this folder.
"""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from tg import MinimalApplicationConfigurator, TGController, expose
from tg.configurator.components.sqlalchemy import SQLAlchemyConfigurationComponent
from tg.configurator.components.transactions import (
    TransactionManagerConfigurationComponent,
)
from zope.sqlalchemy import register

import tgstream
from tgstream import CSV, rows, stream

DBSession: scoped_session[Session] = scoped_session(sessionmaker())
register(DBSession)
number = sa.Table("number", sa.MetaData(), sa.Column("number", sa.Integer))
COUNT = 100_000


def init_model(engine: sa.Engine) -> None:
    """TG calls it with its engine."""
    DBSession.configure(bind=engine)
    number.create(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(number), [{"number": n} for n in range(COUNT)])


class RootController(TGController):
    @expose()
    @stream(CSV, filename="numbers.csv")
    def numbers(self) -> Any:
        return rows(sa.select(number).order_by(number.c.number))


class Empty:
    """Stands for ``tg.app_globals`` and for the helpers of templates."""


def make_app(folder: str) -> Any:
    """The application, with a database in ``folder``."""
    configurator = MinimalApplicationConfigurator()
    configurator.register(SQLAlchemyConfigurationComponent)
    configurator.register(TransactionManagerConfigurationComponent)
    configurator.update_blueprint(
        {
            "root_controller": RootController(),
            "renderers": ["json"],
            "default_renderer": "json",
            "app_globals": Empty,
            "helpers": Empty,
            "use_sqlalchemy": True,
            "sqlalchemy.url": f"sqlite:///{folder}/empty.db",
            "model": sys.modules[__name__],
        }
    )
    tgstream.plugme(configurator)
    return configurator.make_wsgi_app({}, {})


def main() -> None:
    assert find_spec("pytest") is None is find_spec("orjson"), "unwanted packages"
    assert metadata.version("tgstream") == tgstream.__version__
    location = Path(tgstream.__file__).parent
    assert (location / "py.typed").exists()

    environ = {"SCRIPT_NAME": "", "PATH_INFO": "/numbers", "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    started: list[Any] = []
    with TemporaryDirectory() as folder:
        app: Any = validator(make_app(folder))
        body = app(environ, lambda *args: started.append(args))
        chunks = [*body]
        body.close()
        engine: Any = DBSession().get_bind()
        engine.dispose()

    [(status, headers)] = started
    assert status == "200 OK"
    assert dict(headers)["Content-Type"] == "text/csv; charset=utf-8"
    assert "Content-Length" not in dict(headers)
    lines = b"".join(chunks).decode().splitlines()
    assert lines == ["number", *map(str, range(COUNT))]
    installed = sorted(package.name for package in metadata.distributions())
    print(f"{len(chunks)} chunks from {location}. Installed: {', '.join(installed)}")


main()
