"""The claims of ``tests.servers`` on three servers, and those of the comparison."""

from __future__ import annotations

import pytest

from tests.comparison import expected
from tests.comparison.__main__ import run_app
from tests.comparison.frameworks import FRAMEWORKS
from tests.comparison.questions import QUESTIONS
from tests.servers.__main__ import results_with_tgstream
from tests.servers.expected import unexpected


@pytest.mark.parametrize("name", ["waitress", "gunicorn-gthread", "gunicorn-gevent"])
def test_server_has_the_expected_results(name: str, postgresql: str) -> None:
    """All claims about the server are true."""
    assert unexpected(name, results_with_tgstream(name, postgresql)) == {}


def test_comparison_has_the_expected_results_for_tgstream(postgresql: str) -> None:
    """The fast questions have the answers of the column for tgstream."""
    slow = "Streams that wait", "Two streams in turn"
    with run_app(FRAMEWORKS["tgstream"], postgresql) as app:
        answers = {
            question: answer(app)
            for question, answer in QUESTIONS.items()
            if question not in slow
        }
    assert expected.unexpected("tgstream", answers) == {}
    assert len(answers) == len(QUESTIONS) - len(slow)
