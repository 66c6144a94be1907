"""The pages of ``docs/htmx.rst``, with the real libraries."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tg import TGController, expose

import tgstream
from tests.application import make_wsgi_app
from tests.live_apps import page_app
from tests.pages import DOCS, provide, run_blocks
from tgstream.core.monitor import monitor

SCRIPTS = {
    "htmx.min.js": "htmx.org/dist/htmx.min.js",
    "sse.min.js": "htmx-ext-sse/dist/sse.min.js",
    "htmx-4.min.js": "htmx-4/dist/htmx.min.js",
    "hx-sse.min.js": "htmx-4/dist/ext/hx-sse.min.js",
    "hx-upsert.min.js": "htmx-4/dist/ext/hx-upsert.min.js",
    "turbo.es2017-umd.js": "@hotwired/turbo/dist/turbo.es2017-umd.js",
    "datastar.js": "@starfederation/datastar/dist/datastar.js",
}
"""The files of the packages, by their names in ``public/javascript``."""


def write_templates(page: str, folder: Path) -> None:
    """Write the templates of the page as the package ``myapp.templates``."""
    templates = folder / "myapp" / "templates"
    templates.mkdir(parents=True)
    for package in templates, templates.parent:
        (package / "__init__.py").touch()
    pattern = (
        r"code-block:: html\n    :caption: myapp/templates/(.+)\n\n((?: {4}.*\n|\n)+)"
    )
    for name, text in re.findall(pattern, page):
        text = re.sub("^    ", "", text, flags=re.MULTILINE)
        # The version in npm's registry has another name for it.
        (templates / name).write_text(text.replace("data-init=", "data-on-load="))
    sys.path.insert(0, str(folder))
    import myapp.templates  # noqa: F401  # before page_app provides other modules


def make_app(url: str, folder: str, npm: str = "", drains: str = "") -> Any:
    """Return the application.

    :param url: of the database. Its tables are created again.
    :param folder: an empty folder, for the templates and the scripts.
    :param npm: the folder ``node_modules`` with the packages. Without it the pages have
        no scripts.
    :param drains: ``yes`` for a server that drains at SIGTERM. ``run.py`` reads it.
    """
    page = (DOCS / "htmx.rst").read_text()
    write_templates(page, Path(folder))
    public = Path(folder) / "public"
    (public / "javascript").mkdir(parents=True)
    for name, path in SCRIPTS.items() if npm else ():
        shutil.copy(Path(npm) / path, public / "javascript" / name)
    provide("myapp.lib.base", BaseController=TGController)
    provide("myapp.model", **vars(page_app))
    names = run_blocks(page, __name__="myapp.page")
    htmx: Any = names["Htmx"]

    class Htmx4(htmx):
        @expose("myapp.templates.htmx4")
        def index(self) -> Any:
            return self.make_page()

    class RootController(TGController):
        htmx, htmx4 = names["Htmx"](), Htmx4()
        turbo, datastar = names["Turbo"](), names["Datastar"]()

        @expose()
        def again(self, library: str, name: str) -> None:
            """Publish a user again, as if the page had the row already."""
            user = page_app.DBSession.query(page_app.User).filter_by(user_name=name)
            getattr(self, library).publish(user.one())

        @expose()
        def drain(self) -> None:
            """End all streams, like a server that stops, and start as the next one."""
            tgstream.drain()
            monitor.draining = False

    return make_wsgi_app(
        {
            "root_controller": RootController(),
            "renderers": ["kajiki", "json"],
            "default_renderer": "kajiki",
            "serve_static": True,
            "paths": {"static_files": str(public)},
            **page_app.database(url),
        },
        lambda config: tgstream.plugme(config, {"channel_history": 10}),
    )
