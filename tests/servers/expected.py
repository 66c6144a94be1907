"""The expected results of each server, its faults included.

Results are compared without the number of chunks, which depends on timing.
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
"""Servers that mark the end of a body only by closing the connection."""

NEVER_NOTICED = {"client leaves": "never noticed"}
DIFFERENT: dict[str, dict[str, str]] = {
    "wsgiref": BY_CLOSING,
    "uwsgi-threads": BY_CLOSING,
    "uwsgi-async": BY_CLOSING,
    "uwsgi-gevent": BY_CLOSING,
    "uwsgi-gevent-late": dict.fromkeys(CLAIMS, "refused"),
    "uvicorn-a2wsgi": NEVER_NOTICED,
    "uvicorn-asgiref": NEVER_NOTICED,
    "hypercorn": {**NEVER_NOTICED, "SIGTERM": "whole"},
    "mod_wsgi": {"failure": "looks whole", "SIGTERM": "breaks, closed"},
}
EXPECTED = {name: {**MOSTLY, **DIFFERENT.get(name, {})} for name in SERVERS}


def unexpected(name: str, results: dict[str, str]) -> dict[str, str]:
    """Return the results that differ from the expected ones."""
    return {
        claim: cell
        for claim, cell in results.items()
        if re.sub(r" \(\d+ chunks\)$", "", cell) != EXPECTED[name][claim]
    }
