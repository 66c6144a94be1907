"""Runs the doctor on sample applications."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeApp
from tests.doctor.applications import APP, MIDDLEWARES, write_application
from tgstream.doctor.loader import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the modules of the sample applications."""
    (tmp_path / "sampleapp.py").write_text(APP)
    (tmp_path / "sampleapp_middlewares.py").write_text(MIDDLEWARES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in "sampleapp", "sampleapp_middlewares":
        for kept in getattr(sys.modules.pop(name, None), "KEPT", ()):
            getattr(kept, "close", list)()
            if hasattr(kept, "engine"):
                kept.engine.dispose()


@pytest.fixture
def run(folder: Path, make_app: MakeApp, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the doctor in this process, and returns its exit status and its output.

    tgstream is imported before the application, so every application has a guard.
    """

    def run(path: str = "/tgstream-doctor", **application: str) -> tuple[int, str]:
        write_application(folder, **application)
        status = main("test.ini", path)
        return status, capsys.readouterr().out

    return run
