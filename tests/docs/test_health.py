"""The readiness probe of ``docs/operating.rst``."""

from __future__ import annotations

import json
from typing import Any

from tg import TGController

from tests.conftest import MakeApp
from tests.pages import DOCS, blocks
from tests.wsgi import get
from tgstream import drain


def test_readiness_probe_fails_while_the_process_drains(make_app: MakeApp) -> None:
    """Its JSON has the state of the process, and the status is 503."""
    page = (DOCS / "operating.rst").read_text()
    [block] = [block for block in blocks(page) if "HealthController" in block]
    names: dict[str, Any] = {"BaseController": TGController}
    exec(block, names)

    class Root(TGController):
        health = names["HealthController"]()

    app = make_app(Root(), renderers=["json"])
    answer = get(app, "/health/ready")
    assert answer.status_int == 200
    assert json.loads(answer.text) == {"draining": False, "open_streams": 0}
    assert drain()
    answer = get(app, "/health/ready")
    assert answer.status_int == 503
    assert json.loads(answer.text) == {"draining": True, "open_streams": 0}
