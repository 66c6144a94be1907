"""The controllers of a page of the docs, as an application that a server serves."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import tg
from sqlalchemy.orm import DeclarativeBase as Declarative
from sqlalchemy.orm import scoped_session, sessionmaker
from tg import FullStackApplicationConfigurator, TGController
from zope.sqlalchemy import register

from tests.pages import DOCS, provide, run_blocks

DBSession = scoped_session(sessionmaker())
register(DBSession)


class DeclarativeBase(Declarative):
    pass


class User(DeclarativeBase):  # with the names that a quickstarted application has
    __tablename__ = "tg_user"
    user_id = sa.Column(sa.Integer, primary_key=True)
    user_name = sa.Column(sa.Unicode(16), unique=True, nullable=False)
    display_name = sa.Column(sa.Unicode(255))


@sa.event.listens_for(User, "init")
def wait(user: User, args: Any, fields: dict[str, Any]) -> None:
    """Wait for a line in the client's named pipe, where a user of that name is made."""
    if fields["user_name"] == "wait" and (pipe := tg.request.headers.get("X-Wait")):
        with open(pipe) as file:
            file.readline()


def init_model(engine: sa.Engine) -> None:  # TG calls it
    DBSession.configure(bind=engine)
    DeclarativeBase.metadata.drop_all(engine)
    DeclarativeBase.metadata.create_all(engine)


def tell(report: Any) -> None:
    """Write how a stream ended into the client's named pipe."""
    if pipe := tg.request.headers.get("X-Tell"):
        with open(pipe, "w") as file:
            file.write(report.reason)


def shown(page: str, **names: Any) -> dict[str, Any]:
    """What the Python blocks of a page define, run in this process.

    :param names: what they find beside ``myapp``.
    """
    provide("myapp.lib.base", BaseController=TGController)
    provide("myapp.model", **vars(sys.modules[__name__]))
    text = (DOCS / f"{page}.rst").read_text()
    return run_blocks(text, __name__="myapp.page", **names)


def root_of(names: dict[str, Any]) -> TGController:
    """A controller with each controller class of a page under its name."""
    root = TGController()
    for name, each in names.items():
        if isinstance(each, type) and issubclass(each, TGController):
            setattr(root, name.lower(), each())
    return root


def database(url: str) -> dict[str, Any]:
    """What an application with this database has in its configuration."""
    model = sys.modules[__name__]
    return {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": model}


def make_app(page: str, url: str) -> Any:
    """The application.

    :param page: its name.
    :param url: of the database, whose tables are made anew.
    """
    import tgstream

    root = root_of(shown(page, engine=None))
    base_config = FullStackApplicationConfigurator()
    base_config.update_blueprint(
        {
            "root_controller": root,
            "renderers": ["json"],
            "default_renderer": "json",
            "errorpage.enabled": False,
            "app_globals": SimpleNamespace,
            "helpers": SimpleNamespace,
            "i18n.enabled": False,
            **database(url),
        }
    )
    tgstream.plugme(base_config)
    tg.hooks.register("tgstream.finished", tell)
    return base_config.make_wsgi_app({}, {})
