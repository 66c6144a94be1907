"""What each server gives, pinned, also where it falls short: a better one is seen.

A cell is compared without its count of chunks, which is a matter of time.
"""

from __future__ import annotations

import re

from tests.live_apps.run import SERVERS
from tests.servers.claims import CLAIMS

MOSTLY = {
    "cookbook": "4 of 4",
    "first chunk": "at once",
    "failure": "breaks",
    "before it": "404 302 500",
    "client leaves": "closed",
    "max_seconds": "closed",
    "HEAD": "200",
    "no chunk": "200",
    "four at once": "never mix",
    "left behind": "nothing",
    "SIGTERM": "breaks, not closed",
}
BY_CLOSING = {"failure": "looks whole", "SIGTERM": "looks whole, not closed"}
"""A body that ends where the connection does: its break cannot be seen."""

DEAF = {"client leaves": "never noticed"}
DIFFERENT: dict[str, dict[str, str]] = {
    "wsgiref": BY_CLOSING,
    "uwsgi-threads": BY_CLOSING,
    "uwsgi-async": BY_CLOSING,
    "uwsgi-gevent": BY_CLOSING,
    "uwsgi-gevent-late": dict.fromkeys(CLAIMS, "refused"),
    "uvicorn-a2wsgi": DEAF,
    "uvicorn-asgiref": DEAF,
    "hypercorn": {**DEAF, "SIGTERM": "whole"},
    "mod_wsgi": {"failure": "looks whole", "SIGTERM": "breaks, closed"},
}
EXPECTED = {name: {**MOSTLY, **DIFFERENT.get(name, {})} for name in SERVERS}


def unexpected(name: str, seen: dict[str, str]) -> dict[str, str]:
    """The cells that are not as they were."""
    return {
        claim: cell
        for claim, cell in seen.items()
        if re.sub(r" \(\d+ chunks\)$", "", cell) != EXPECTED[name][claim]
    }
