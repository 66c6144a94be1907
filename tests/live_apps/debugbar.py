"""A stream with tgext.debugbar, in its own process because its listeners are global.

    python -m tests.live_apps.debugbar FILE

It prints how many queries the debugbar keeps at each item, and tgstream's warnings.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import tg
from tg import FullStackApplicationConfigurator, TGController, expose
from tgext.debugbar import enable_debugbar

from tests.conftest import make_application
from tests.model import Model, User
from tests.wsgi import get
from tgstream import stream

lines: list[str] = []
kept: list[int] = []


class RootController(TGController):  # the debugbar looks for it by this name
    @expose(content_type="text/plain")
    @stream
    def words(self) -> Iterator[str]:
        for number in range(3):
            tg.config["DBSession"].query(User).count()
            kept.append(len(getattr(tg.request, "tgdb_sqla_queries", [])))
            yield str(number)


class Lines(logging.Handler):
    """Keeps the log's messages in ``lines``."""

    def emit(self, record: logging.LogRecord) -> None:
        lines.append(record.getMessage())


def with_debugbar() -> FullStackApplicationConfigurator:
    """Return a configurator with tgext.debugbar."""
    base_config = FullStackApplicationConfigurator()
    enable_debugbar(base_config)
    return base_config


def main(file: str) -> None:
    """Serve one request, and print the result."""
    logging.getLogger("tgstream").addHandler(Lines(logging.WARNING))
    model = Model(f"sqlite:///{file}")
    options: dict[str, Any] = {
        "renderers": ["json", "kajiki"],
        "default_renderer": "kajiki",
        "application_root_module": __name__,  # the debugbar adds its pages there
    }
    app = make_application(
        RootController(), model, configurator=with_debugbar, debug=True, **options
    )
    get(app, "/words")
    model.dispose()
    print(json.dumps([kept, lines]))


if __name__ == "__main__":
    main(sys.argv[1])
