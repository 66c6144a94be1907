"""The section on limits of ``docs/operating.rst``: its code runs as it describes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
import tg
from sqlalchemy.orm import Session

import tgstream
from tests.conftest import MakeApp
from tests.docs.test_docs import user
from tests.live_apps import page_app
from tests.pages import DOCS, blocks, provide
from tests.wsgi import Call, get


def make_root(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A root with the controllers of the section."""
    for name in "myapp", "myapp.lib", "myapp.lib.base", "myapp.model":
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    provide("myapp.lib.base", BaseController=tg.TGController)
    provide("myapp.model", **vars(page_app))
    code = next(
        block
        for block in blocks((DOCS / "operating.rst").read_text())
        if "limit_by" in block
    )
    names: dict[str, Any] = {"__name__": "myapp.page"}
    exec(compile(code, "<page>", "exec"), names)
    return page_app.root_of(names)


def test_controllers_have_the_limits_of_the_section(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A user has three feeds and one export. The public feed is open for all."""
    url = f"sqlite:///{tmp_path}/test.db"

    def plug(base_config: Any) -> None:
        base_config.update_blueprint(page_app.database(url))
        tgstream.plugme(base_config)

    app = make_app(make_root(monkeypatch), plug=plug)
    ada, bob = user("ada"), user("bob")
    feeds = [Call(app, "/feeds/news", **ada) for _ in range(4)]
    assert feeds[0].read().endswith(b"event: replaced\nretry: 3600000\ndata: \n\n")
    with Session(tg.config["tg.app_globals"].sa_engine) as session:
        session.add_all(page_app.User(user_name=f"user{n}") for n in range(5000))
        session.commit()
    export = Call(app, "/feeds/export", **ada)
    refused = get(app, "/feeds/export", **ada)
    assert (refused.status_int, refused.headers["Retry-After"]) == (503, "5")
    assert get(app, "/feeds/export", **bob).status_int == 200
    public = Call(app, "/feeds/public")
    assert next(public).startswith(b": open\n")
    for call in [*feeds, export, public]:
        call.close()
    page_app.DBSession.remove()
    engine: sa.Engine = tg.config["tg.app_globals"].sa_engine
    engine.dispose()
