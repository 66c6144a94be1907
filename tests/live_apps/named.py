"""``application``, for servers that import it: see ``run.py``, which names it."""

from __future__ import annotations

import os

from tests.live_apps.run import APP, make_named

application = make_named(os.environ[APP].split("\n"))
