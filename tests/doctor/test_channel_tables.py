"""The command ``python -m tgstream create-tables``."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.doctor.applications import run_command, write_application
from tgstream.doctor.cli import main


def test_create_tables_creates_the_tables_of_channels(folder: Path) -> None:
    """A second call changes nothing."""
    write_application(folder, url="sqlite:///app.db")
    status, text = run_command(folder, "create-tables", "test.ini")
    created = "tgstream_channels created in sqlite:///app.db"
    assert (status, text.splitlines()[0]) == (0, created)
    status, text = run_command(folder, "create-tables", "test.ini#main")
    assert (status, text.count("exists")) == (0, 2)
    with closing(sqlite3.connect(folder / "app.db")) as connection:
        rows = connection.execute("SELECT count(*) FROM tgstream_events").fetchall()
    assert rows == [(0,)]


def test_create_tables_reports_an_application_that_cannot_have_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 1, and 2 if there is no such file."""
    write_application(folder, factory="plain")
    status, text = run_command(folder, "create-tables", "test.ini")
    assert status == 1
    assert "creates no TurboGears application" in text
    with pytest.raises(SystemExit) as exit:
        main(["create-tables", "nothing.ini"])
    assert exit.value.code == 2
    assert "file not found: 'nothing.ini'" in capsys.readouterr().err
