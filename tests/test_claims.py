"""The claims of ``tests.servers``, on the servers that most deploy on."""

from __future__ import annotations

import pytest

from tests.servers.__main__ import seen_with_tgstream
from tests.servers.expected import unexpected


@pytest.mark.parametrize("name", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_server_gives_what_is_claimed_of_it(name: str, postgresql: str) -> None:
    """All that a client sees, and nothing is left behind."""
    assert unexpected(name, seen_with_tgstream(name, postgresql)) == {}
