"""The expected answers of each framework, where it is better included."""

from __future__ import annotations

import sys

from tests.comparison.table import Answers

DISCONNECTED = "closed, released, row undone"

EXPECTED: Answers = {
    "tgstream": {
        "Text": "works",
        "The request": "works",
        "A loaded object": "works",
        "Rows that it adds": "all or none",
        "Errors before the first chunk": "404 302 500, own pages",
        "Headers and cookies": "sent",
        "A failure half-way": "breaks",
        "A client that leaves": DISCONNECTED,
        "Two streams in turn": "own request, own connection",
        "Streams that wait": "6 of 20",
        "Server-Sent Events": "resumes, heartbeats, on commit",
    },
    "TurboGears alone": {
        "Text": "an empty 200 that breaks",
        "The request": "works",
        "A loaded object": "an empty 200",
        "Rows that it adds": "lost; ``transaction.commit()``: all or none",
        "Errors before the first chunk": "200 200 200, looks whole",
        "Headers and cookies": "ignored",
        "A failure half-way": "looks whole",
        "A client that leaves": DISCONNECTED,
        "Two streams in turn": (
            "requests mix, one connection, AssertionError, on another thread ends early"
        ),
        "Streams that wait": "6 of 20",
        "Server-Sent Events": "not in the box",
    },
    "Flask": {
        "Text": "works",
        "The request": "a 500; ``stream_with_context``: works",
        "A loaded object": "a 500; ``session.add()``: works",
        "Rows that it adds": "lost; ``session.commit()``: all or none",
        "Errors before the first chunk": "500 500 500, the server's page",
        "Headers and cookies": "ignored",
        "A failure half-way": "breaks",
        "A client that leaves": DISCONNECTED,
        "Two streams in turn": (
            "requests mix, one connection, AssertionError, LookupError,"
            " on another thread LookupError;"
            " by argument: own request, own connection"
        ),
        "Streams that wait": "6 of 20",
        "Server-Sent Events": "not in the box",
    },
    "Django": {
        "Text": "works",
        "The request": "by argument",
        "A loaded object": "works",
        "Rows that it adds": "each at once; ``atomic()``: all or none",
        "Errors before the first chunk": "500 - 500, the server's page",
        "Headers and cookies": "ignored",
        "A failure half-way": "breaks",
        "A client that leaves": (
            f"closed, released, row stays; ``atomic()``: {DISCONNECTED}"
        ),
        "Two streams in turn": "own request, one connection",
        "Streams that wait": "6 of 20; ``async`` on uvicorn: 20 of 20",
        "Server-Sent Events": "not in the box",
    },
    "Starlette": {
        "Text": "works",
        "The request": "by argument",
        "A loaded object": (
            "an empty 200 that breaks; a ``with`` of its session: works"
        ),
        "Rows that it adds": "lost; ``Session.begin()``: all or none",
        "Errors before the first chunk": "200 200 200, broken",
        "Headers and cookies": "ignored",
        "A failure half-way": "breaks",
        "A client that leaves": (
            f"not closed, connection kept, row undone; ``async``: {DISCONNECTED}"
        ),
        "Two streams in turn": "own request, own connection",
        "Streams that wait": "20 of 20",
        "Server-Sent Events": "not in the box",
    },
}


BEFORE_PYTHON_311 = {
    # Before Python 3.11 an ordinary generator is released, and so closed, at once.
    "Starlette": {"A client that leaves": f"{DISCONNECTED}; ``async``: {DISCONNECTED}"},
}


def unexpected(name: str, answers: dict[str, str]) -> dict[str, str]:
    """Return the answers that differ from the expected ones."""
    pinned = dict(EXPECTED[name])
    if sys.version_info < (3, 11):
        pinned |= BEFORE_PYTHON_311.get(name, {})
    return {
        question: answer
        for question, answer in answers.items()
        if answer != pinned.get(question)
    }
