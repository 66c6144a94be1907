"""The claims of ``tests.servers`` on three servers, and tgstream's in the README."""

from __future__ import annotations

import pytest

from tests.comparison import expected
from tests.comparison.__main__ import stand
from tests.comparison.frameworks import FRAMEWORKS
from tests.comparison.questions import QUESTIONS
from tests.servers.__main__ import seen_with_tgstream
from tests.servers.expected import unexpected


@pytest.mark.parametrize("name", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_server_gives_what_is_claimed_of_it(name: str, postgresql: str) -> None:
    """All that a client sees, and nothing is left behind."""
    assert unexpected(name, seen_with_tgstream(name, postgresql)) == {}


def test_tgstream_answers_as_it_is_compared(postgresql: str) -> None:
    """Its column of the comparison, but for what takes a second or a process each."""
    slow = "Streams that wait", "Two streams in turn"
    with stand(FRAMEWORKS["tgstream"], postgresql) as running:
        seen = {of: look(running) for of, look in QUESTIONS.items() if of not in slow}
    assert expected.unexpected("tgstream", seen) == {}
    assert len(seen) == len(QUESTIONS) - len(slow)
