"""The checks of installed packages: requirements of tgstream, its extras, and servers.

They read the metadata of the packages, and import none of them.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata

from .finding import FAIL, NOTE, OK, WARN, Finding

EXTRAS = {
    "orjson": "JSON several times faster",
    "redis": "channels across processes",
}
ABORTED = "a failed stream is aborted"
UNNOTICED = f"{ABORTED}, but disconnects are not noticed"
LOOKS_COMPLETE = "a failed stream looks complete"
_BOUND = "Give a long stream max_seconds."
_MARK_END = "Mark the end in the data, with NDJSON(end=...) or length=."
_UWSGI = f"{_MARK_END} With gevent, use --gevent-early-monkey-patch."
SERVERS: dict[str, tuple[str, str, str]] = {
    "waitress": (OK, ABORTED, ""),
    "gunicorn": (
        NOTE,
        ABORTED,
        "Use gthread or gevent. A sync worker serves one stream at a time, and is "
        "killed after --timeout.",
    ),
    "cheroot": (OK, ABORTED, ""),
    "granian": (OK, ABORTED, ""),
    "uvicorn": (NOTE, f"with a2wsgi or asgiref: {UNNOTICED}", _BOUND),
    "hypercorn": (NOTE, UNNOTICED, _BOUND),
    "uWSGI": (WARN, LOOKS_COMPLETE, _UWSGI),
    "pyuwsgi": (WARN, LOOKS_COMPLETE, _UWSGI),
    "mod_wsgi": (WARN, LOOKS_COMPLETE, _MARK_END),
}
"""The mark, result and advice for each server that is tested."""
OLDEST = {"granian": ("2.8.9", LOOKS_COMPLETE, "Upgrade it to 2.8.9 or later.")}
"""The oldest version that ``SERVERS`` is true of, and what an older one gets."""


def check_packages() -> list[Finding]:
    """Every check of installed packages."""
    required = _read_requirements()
    requirements = sorted(
        _check_requirements(required), key=lambda finding: finding.check.lower()
    )
    return [
        _check_python(),
        *requirements,
        *_check_extras(required),
        *_check_servers(),
    ]


def installed_version(package: str) -> str | None:
    """The version of a package. None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parse_version(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def is_below(version: str, oldest: str) -> bool:
    """Whether ``version`` is older than ``oldest``."""
    numbers, limit = parse_version(version), parse_version(oldest)
    length = max(len(numbers), len(limit))
    zeros = (0,) * length
    return (numbers + zeros)[:length] < (limit + zeros)[:length]


def _check_python() -> Finding:
    oldest = ">=3.10"
    with contextlib.suppress(metadata.PackageNotFoundError):
        oldest = metadata.metadata("tgstream")["Requires-Python"]
    return check_version("Python", platform.python_version(), oldest.removeprefix(">="))


def check_version(name: str, version: str | None, oldest: str) -> Finding:
    """The finding for a requirement of tgstream.

    :param version: the installed version. None if it is not installed.
    :param oldest: the oldest version that tgstream supports.
    """
    if version is None:
        result = "not installed"
    elif is_below(version, oldest):
        result = f"{version}, but tgstream requires {oldest} or later"
    else:
        return Finding(OK, name, f"{version} ({oldest} or later)")
    return Finding(FAIL, name, result, f"Install {name} {oldest} or later.")


def _read_requirements() -> dict[str, str]:
    """The packages that tgstream requires, its extras included: the oldest versions."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        lines = metadata.requires("tgstream") or []
        matches = [re.match(r"([\w.-]+)\s*>=\s*([\w.]+)(;.*)?", line) for line in lines]
        return {
            match[1]: match[2]
            for match in matches
            if match and (not match[3] or match[1] in EXTRAS)
        }
    return {}


def _check_requirements(required: dict[str, str]) -> Iterator[Finding]:
    if not required:
        yield Finding(
            NOTE,
            "tgstream",
            "not installed as a package, so its requirements are unknown",
            "Install it with pip.",
        )
    for name in required.keys() - EXTRAS.keys():
        version = installed_version(name)
        shown = name if version is None else metadata.metadata(name)["Name"]
        yield check_version(shown, version, required[name])


def _check_extras(required: dict[str, str]) -> Iterator[Finding]:
    for name, use in EXTRAS.items():
        version = installed_version(name)
        if version is None or is_below(version, required.get(name, "0")):
            state = "not installed" if version is None else f"{version} is too old"
            advice = f"If you need it: pip install 'tgstream[{name}]'."
            yield Finding(NOTE, name, f"{state} ({use})", advice)
        else:
            yield Finding(OK, name, f"{version}: {use}")


def _check_servers() -> list[Finding]:
    versions = {name: installed_version(name) for name in SERVERS}
    return [
        check_server(name, version)
        for name, version in versions.items()
        if version is not None
    ] or [
        Finding(
            NOTE,
            "servers",
            "no tested server is installed. wsgiref serves one request at a time",
            "pip install waitress",
        )
    ]


def check_server(name: str, version: str) -> Finding:
    """The finding for a version of a server, a key of ``SERVERS``."""
    mark, result, advice = SERVERS[name]
    if name in OLDEST and is_below(version, OLDEST[name][0]):
        mark, (_, result, advice) = WARN, OLDEST[name]
    return Finding(mark, name, f"{version}: {result}", advice)
