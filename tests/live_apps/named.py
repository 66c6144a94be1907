"""``application``, for servers that import it: see ``run.py``, which names it."""

from __future__ import annotations

import os

from tests.live_apps.run import APP, DRAINS, make_named
from tests.pages import DOCS, blocks

application = make_named(os.environ[APP].split("\n"))
if DRAINS in os.environ[APP]:  # as the page says; other programs are not asked for it
    shown = blocks((DOCS / "servers.rst").read_text())
    exec(next(each for each in shown if "uwsgidecorators" in each))
