"""The compared frameworks: how to start each, and the helpers in its manual."""

from __future__ import annotations

from typing import NamedTuple


class Framework(NamedTuple):
    """One column of the table."""

    server: str
    """The name of its server in ``serve.py``."""

    options: list[str]
    """Its module in ``apps``, and the options of that module."""

    helpers: dict[str, str]
    """The helpers by question. The views that use them end with ``_helped``."""

    packages: list[str]
    """The packages whose versions the table shows."""


FRAMEWORKS = {
    "tgstream": Framework(
        "gunicorn-gthread",
        ["turbogears", "kind=tgstream", "url={url}"],
        {},
        ["TurboGears2", "SQLAlchemy", "gunicorn"],
    ),
    "TurboGears alone": Framework(
        "gunicorn-gthread",
        ["turbogears", "kind=plain", "url={url}"],
        {"added": "``transaction.commit()``"},
        ["TurboGears2", "backlash", "gunicorn"],
    ),
    "Flask": Framework(
        "gunicorn-gthread",
        ["in_flask", "url={url}"],
        {
            "request": "``stream_with_context``",
            "loaded": "``session.add()``",
            "added": "``session.commit()``",
            "turns": "by argument",
        },
        ["Flask", "Werkzeug", "Flask-SQLAlchemy", "gunicorn"],
    ),
    "Django": Framework(
        "gunicorn-gthread",
        ["in_django", "url={url}"],
        {
            "request": "by argument",
            "added": "``atomic()``",
            "leaves": "``atomic()``",
            "waiting": "``async`` on uvicorn",
        },
        ["Django", "gunicorn"],
    ),
    "Starlette": Framework(
        "uvicorn",
        ["in_starlette", "url={url}"],
        {
            "request": "by argument",
            "loaded": "a ``with`` of its session",
            "added": "``Session.begin()``",
            "leaves": "``async``",
        },
        ["starlette", "SQLAlchemy", "uvicorn"],
    ),
}
