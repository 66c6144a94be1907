"""The checks of installed packages."""

from __future__ import annotations

import pytest

from tests.servers.expected import EXPECTED
from tgstream.doctor.package_checks import (
    ABORTED,
    SERVERS,
    check_packages,
    check_server,
    check_version,
    is_below,
)


def test_installed_packages_are_checked() -> None:
    """They are the requirements of tgstream, its extras, and the installed servers."""
    findings = {finding.check: finding for finding in check_packages()}
    assert {"Python", "TurboGears2", "SQLAlchemy", "orjson"} <= findings.keys()
    assert findings["waitress"].result.endswith(": a failed stream is aborted")
    assert "sync worker" in findings["gunicorn"].advice
    assert {finding.mark for finding in findings.values()} <= {"ok", "note", "warn"}


@pytest.mark.parametrize("name", SERVERS)
def test_server_result_is_that_of_the_table_of_servers(name: str) -> None:
    """The table has the results of tests on real servers."""
    prefix = {"pyuwsgi": "uwsgi"}.get(name, name.lower())
    rows = [cells for server, cells in EXPECTED.items() if server.startswith(prefix)]
    rows = [cells for cells in rows if cells["failure"] != "refused"]
    assert rows
    result = check_server(name, "9").result
    for cells in rows:
        assert (ABORTED in result) == (cells["failure"] == "breaks")
        assert ("not noticed" in result) == (cells["client leaves"] == "never noticed")


def test_package_that_is_too_old_or_missing_fails() -> None:
    """An old server is a warning, because its streams still work."""
    assert check_version("WebOb", None, "1.8.9").mark == "FAIL"
    old = check_version("WebOb", "1.8.8", "1.8.9")
    assert (old.mark, old.advice) == ("FAIL", "Install WebOb 1.8.9 or later.")
    assert check_server("granian", "2.8.8").mark == "warn"
    assert check_server("granian", "2.8.9").mark == "ok"


@pytest.mark.parametrize(
    ("version", "oldest", "expected"),
    [
        ("2.5.0", "2.5", False),
        ("2.5", "2.5.0", False),
        ("2.10", "2.9.1", False),
        ("2.4.99", "2.5.0", True),
        ("3.0rc1", "3.0", False),
        ("unknown", "1", True),
    ],
)
def test_versions_are_compared_by_their_numbers(
    version: str, oldest: str, expected: bool
) -> None:
    """Missing numbers are zeros."""
    assert is_below(version, oldest) is expected
