"""What is installed beside tgstream: what it requires, its extras, and servers.

Rule: nothing is imported; the metadata of packages says it all.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata

from .finding import FAIL, NOTE, OK, WARN, Finding

EXTRAS = {
    "orjson": "JSON several times as quick",
    "redis": "channels for many processes",
}
BROKEN = "a failed stream breaks"
UNNOTICED = f"{BROKEN}; clients that leave are not noticed"
CUT = "a failed stream ends like a whole one"
SERVERS: dict[str, tuple[str, str, str]] = {
    "waitress": (OK, BROKEN, ""),
    "gunicorn": (
        NOTE,
        BROKEN,
        "Take gthread or gevent: a sync worker serves one stream at a time, and is "
        "killed after --timeout.",
    ),
    "cheroot": (OK, BROKEN, ""),
    "granian": (OK, BROKEN, ""),
    "uvicorn": (
        NOTE,
        f"with a2wsgi or asgiref: {UNNOTICED}",
        "Give a long stream max_seconds.",
    ),
    "hypercorn": (NOTE, UNNOTICED, "Give a long stream max_seconds."),
    "uWSGI": (
        WARN,
        CUT,
        "Tell the client in the data; with gevent, write --gevent-early-monkey-patch.",
    ),
    "pyuwsgi": (
        WARN,
        CUT,
        "Tell the client in the data; with gevent, write --gevent-early-monkey-patch.",
    ),
    "mod_wsgi": (WARN, CUT, "Tell the client in the data."),
}
"""In the words of the page on servers."""
FLOORS = {"granian": ("2.8.9", CUT, "Upgrade it to 2.8.9 or later.")}


def environment() -> list[Finding]:
    """Every check of what is installed."""
    required = _required()
    known = sorted(_requirements(required), key=lambda each: each.name.lower())
    return [_python(), *known, *_extras(required), *_servers()]


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parts(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare by."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def is_below(version: str, floor: str) -> bool:
    """Whether ``version`` is older than ``floor``."""
    have, need = parts(version), parts(floor)
    length = max(len(have), len(need))
    pad = (0,) * length
    return (have + pad)[:length] < (need + pad)[:length]


def _python() -> Finding:
    have, floor = platform.python_version(), ">=3.10"
    with contextlib.suppress(metadata.PackageNotFoundError):
        floor = metadata.metadata("tgstream")["Requires-Python"]
    return compared("Python", have, floor.removeprefix(">="))


def compared(name: str, have: str | None, floor: str) -> Finding:
    """What is to say of a version of what tgstream requires; None is not installed."""
    if have is None:
        found = Finding(FAIL, name, "not installed")
    elif is_below(have, floor):
        found = Finding(FAIL, name, f"{have}, and tgstream needs {floor} or later")
    else:
        return Finding(OK, name, f"{have} ({floor} or later)")
    return found._replace(advice=f"Install {name} {floor} or later.")


def _required() -> dict[str, str]:
    """The oldest version of each package that tgstream takes, those of extras too."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        lines = metadata.requires("tgstream") or []
        found = [re.match(r"([\w.-]+)\s*>=\s*([\w.]+)(;.*)?", each) for each in lines]
        return {
            each[1]: each[2]
            for each in found
            if each and (not each[3] or each[1] in EXTRAS)
        }
    return {}


def _requirements(required: dict[str, str]) -> Iterator[Finding]:
    if not required:
        yield Finding(
            NOTE,
            "tgstream",
            "not installed as a package, so that its requirements are not known",
            "pip install it.",
        )
    for name in required.keys() - EXTRAS.keys():
        have = version_of(name)
        known = name if have is None else metadata.metadata(name)["Name"]
        yield compared(known, have, required[name])


def _extras(required: dict[str, str]) -> Iterator[Finding]:
    for name, use in EXTRAS.items():
        have = version_of(name)
        if have is None or is_below(have, required.get(name, "0")):
            state = "not installed" if have is None else f"{have}, which is too old"
            advice = f"pip install 'tgstream[{name}]' where you want that."
            yield Finding(NOTE, name, f"{state}: {use}", advice)
        else:
            yield Finding(OK, name, f"{have}: {use}")


def _servers() -> list[Finding]:
    found = [(name, version_of(name)) for name in SERVERS]
    return [server(name, have) for name, have in found if have is not None] or [
        Finding(
            NOTE,
            "servers",
            "none that tgstream was run under; wsgiref serves one request at a time",
            "pip install waitress",
        )
    ]


def server(name: str, have: str) -> Finding:
    """What the page on servers says of this version of one."""
    mark, phrase, advice = SERVERS[name]
    if name in FLOORS and is_below(have, FLOORS[name][0]):
        mark, (_, phrase, advice) = WARN, FLOORS[name]
    return Finding(mark, name, f"{have}: {phrase}", advice)
