"""An application with the controllers of a docs page."""

from __future__ import annotations

import sys
from typing import Any

import sqlalchemy as sa
import tg
from sqlalchemy.orm import DeclarativeBase as Declarative
from sqlalchemy.orm import scoped_session, sessionmaker
from tg import TGController
from zope.sqlalchemy import register

from tests.application import make_wsgi_app
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
    """Wait for a line in the client's named pipe when a user named wait is made."""
    if fields["user_name"] == "wait" and (pipe := tg.request.headers.get("X-Wait")):
        with open(pipe) as file:
            file.readline()


def init_model(engine: sa.Engine) -> None:  # TG calls it
    DBSession.configure(bind=engine)
    DeclarativeBase.metadata.drop_all(engine)
    DeclarativeBase.metadata.create_all(engine)


def write_reason(report: Any) -> None:
    """Write the reason of a stream's end into the client's named pipe."""
    if pipe := tg.request.headers.get("X-Tell"):
        with open(pipe, "w") as file:
            file.write(report.reason)


def shown(page: str, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page in this process, and return their names.

    :param names: the names that the blocks find, in addition to ``myapp``.
    """
    provide("myapp.lib.base", BaseController=TGController)
    provide("myapp.model", **vars(sys.modules[__name__]))
    text = (DOCS / f"{page}.rst").read_text()
    return run_blocks(text, __name__="myapp.page", **names)


def root_of(names: dict[str, Any]) -> TGController:
    """Return a root controller, with the page's controllers as its attributes."""
    root = TGController()
    for name, value in names.items():
        if isinstance(value, type) and issubclass(value, TGController):
            setattr(root, name.lower(), value())
    return root


def database(url: str) -> dict[str, Any]:
    """Return the options of an application with this database."""
    model = sys.modules[__name__]
    return {"use_sqlalchemy": True, "sqlalchemy.url": url, "model": model}


def make_app(page: str, url: str) -> Any:
    """Return the application.

    :param page: the name of the page.
    :param url: of the database. Its tables are created again.
    """
    import tgstream

    root = root_of(shown(page, engine=None))
    tg.hooks.register("tgstream.finished", write_reason)
    return make_wsgi_app({"root_controller": root, **database(url)}, tgstream.plugme)
