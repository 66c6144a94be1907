"""Loading an application, and the findings if that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.doctor.applications import failed_checks, parse_findings
from tests.doctor.conftest import Run
from tgstream.doctor.loader import main


@pytest.mark.parametrize(
    ("factory", "error"),
    [
        ("broken", "LookupError: no such thing, in sampleapp.py, line "),
        ("missing", "AttributeError: module 'sampleapp' has no attribute"),
    ],
)
def test_application_that_raises_is_reported_without_a_traceback(
    run: Run, factory: str, error: str
) -> None:
    """The finding has the error, and its file and line in the application."""
    status, text = run(factory=factory)
    assert status == 1
    assert [*parse_findings(text)] == ["application"]
    result = parse_findings(text)["application"][1]
    assert result.startswith(f"test.ini cannot be loaded: {error}")
    assert result.endswith("-> Fix this first.")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"[app:main", "MissingSectionHeaderError: "),
        (b"[app:main]\nname = \xff\n", "UnicodeDecodeError: "),
    ],
    ids=["syntax", "encoding"],
)
def test_invalid_file_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, error: str
) -> None:
    """Its options cannot be read, but that raises no second error."""
    (folder / "test.ini").write_bytes(content)
    assert main("test.ini", "/") == 1
    result = parse_findings(capsys.readouterr().out)["application"][1]
    assert f"test.ini cannot be loaded: {error}" in result


def test_missing_paste_deploy_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tgstream does not require it."""
    monkeypatch.setitem(sys.modules, "paste.deploy", None)
    status, text = run()
    assert status == 1
    result = parse_findings(text)["application"][1]
    assert result.startswith(
        "test.ini cannot be loaded: PasteDeploy is not installed. Install gearbox"
    )


@pytest.mark.parametrize("factory", ["main", "unplugged"])
def test_invalid_option_value_is_reported(run: Run, factory: str) -> None:
    """Even if it prevents the application from being loaded, as with ``plugme()``."""
    status, text = run(factory=factory, options="tgstream.chunk_size = many")
    assert status == 1
    assert "options" in failed_checks(text)
    result = parse_findings(text)["options"][1]
    assert result.startswith("tgstream.chunk_size has an invalid value: 'many'")
    assert "omit it for the default 32768" in result
