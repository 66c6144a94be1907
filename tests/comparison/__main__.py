"""Ask all questions, and print the answers as a table in reStructuredText.

python -m tests.comparison [name ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from sqlalchemy.orm import Session

from tests.comparison.expected import EXPECTED, unexpected
from tests.comparison.frameworks import FRAMEWORKS, Framework
from tests.comparison.questions import QUESTIONS, RunningApp
from tests.comparison.table import table
from tests.conftest import LiveServer
from tests.model import Model, Note, User
from tests.servers.__main__ import postgresql


@contextmanager
def run_app(framework: Framework, url: str) -> Iterator[RunningApp]:
    """Run an application, on its own database."""
    model = Model(url)
    with Session(model.outside) as session:
        notes = [Note(text="one"), Note(text="two")]
        session.add(User(name="ada", notes=notes))
        session.commit()
    options = [word.format(url=url) for word in framework.options]
    live = LiveServer(framework.server, *options, run="tests.comparison.serve")
    try:
        yield RunningApp(framework, live, model)
    finally:
        live.stop()
        model.dispose()


def versions(framework: Framework) -> str:
    """Return the versions of the framework's packages."""
    return ", ".join(f"{name} {version(name)}" for name in framework.packages)


def main(names: list[str]) -> int:
    """Print the table.

    :returns: how many cells differ from ``expected.py``.
    """
    all_answers: dict[str, dict[str, str]] = {}
    with postgresql() as url:
        for name in names or FRAMEWORKS:
            with run_app(FRAMEWORKS[name], url) as app:
                all_answers[name] = {
                    question: answer(app) for question, answer in QUESTIONS.items()
                }
    last_row = {name: versions(FRAMEWORKS[name]) for name in all_answers}
    print(table(all_answers, last_row), end="")
    wrong = 0
    for name, answers in all_answers.items():
        for question, answer in unexpected(name, answers).items():
            wrong += 1
            pinned = EXPECTED[name].get(question)
            print(f"{name}, {question}: {answer}, not {pinned}", file=sys.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
