"""The module that servers import by its name: ``run.py`` starts such servers."""

from __future__ import annotations

import os

from tests.live_apps.run import APP, DRAINS, make_named
from tests.pages import DOCS, blocks

application = make_named(os.environ[APP].split("\n"))
if DRAINS in os.environ[APP]:  # only uWSGI gets this option
    code_blocks = blocks((DOCS / "servers.rst").read_text())
    exec(next(block for block in code_blocks if "uwsgidecorators" in block))
