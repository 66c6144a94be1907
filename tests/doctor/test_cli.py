"""The command ``python -m tgstream doctor``, and the page that shows its output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.applications import (
    APP,
    MIDDLEWARES,
    failed_checks,
    parse_findings,
    run_command,
    write_application,
)
from tgstream.doctor.cli import main

ROOT = Path(__file__).parents[2]

# Arguments and exit statuses.


def test_exit_status_is_1_if_a_check_fails(folder: Path) -> None:
    """``#name`` chooses a section of the file."""
    write_application(folder, middleware="Joiner")
    status, text = run_command(folder, "doctor", "test.ini#main")
    assert (status, failed_checks(text)) == (1, ["first chunk"])
    assert "Traceback" not in text


def test_wrong_command_line_prints_the_usage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 2."""
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: python -m tgstream")
    (folder / "test.ini").touch()
    for wrong in ["nothing.ini"], ["."], [""], ["test.ini", "--path", "x"], ["--wrong"]:
        with pytest.raises(SystemExit) as exit:
            main(["doctor", *wrong])
        assert exit.value.code == 2
        assert capsys.readouterr().err.startswith("usage: python -m tgstream ")


def test_help_explains_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts depend on them."""
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "Exit status: 0 if no check failed, 1 if streams will break" in text


# The child process that loads the application.

SLOW = """
import sys, time

def main(global_conf):
    print("loading", flush=True)
    time.sleep(60)
"""

INTERPRETER = """
import sys

def main(global_conf):
    print(sys.flags.optimize, sys.warnoptions, sys._xoptions, sys.path[0])
    print("tgstream" in sys.modules)
    raise SystemExit
"""


def write_module(folder: Path, source: str) -> None:
    """Write an application of one module, and its file ``test.ini``."""
    (folder / "module.py").write_text(source)
    (folder / "test.ini").write_text("[app:main]\nuse = call:module:main\n")


def test_child_has_the_options_of_the_interpreter(tmp_path: Path) -> None:
    """It does not import tgstream before the application does."""
    write_module(tmp_path, INTERPRETER)
    options = "-OO", "-W", "error::UserWarning", "-X", "utf8=1"
    status, text = run_command(tmp_path, "doctor", "test.ini", options=options)
    assert status == 1
    first, second, *_ = text.splitlines()
    assert first == f"2 ['error::UserWarning'] {{'utf8': '1'}} {tmp_path}"
    assert second == "False"


def test_child_adds_no_folder_of_tgstream_to_the_path(tmp_path: Path) -> None:
    """Modules of the application may have the names of the doctor's modules."""
    source = (
        "import client, probe, loader\ndef main(*_):\n    raise OSError(client.name)"
    )
    write_module(tmp_path, source)
    for name in "client", "probe", "loader", "finding":
        (tmp_path / f"{name}.py").write_text("name = 'of the application'")
    _, text = run_command(tmp_path, "doctor", "test.ini")
    assert "OSError: of the application" in parse_findings(text)["application"][1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [True, False])
def test_signal_ends_the_command_and_its_child(
    tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    """A terminal sends Ctrl-C to both. Other programs send a signal to the parent."""
    write_module(tmp_path, SLOW)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tgstream", "doctor", "test.ini"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell ignores SIGINT for its background jobs, such as this test.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        if to_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        # The pipe is closed when the child has ended as well.
        assert process.stdout.read() == b""
        assert process.wait(10) == 128 + number


def test_closed_output_is_not_an_error(folder: Path) -> None:
    """The exit status is the same with ``| head -1``, and nothing else is printed."""
    write_application(folder)
    for arguments in [], ["test.ini"]:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as output:
            process = subprocess.run(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "tgstream",
                    "doctor",
                    *arguments,
                ],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.PIPE,
                timeout=60,
            )
        assert (process.returncode, process.stderr) == (0, b"")


# The page of the docs.

PAGE = (ROOT / "docs/doctor.rst").read_text()
SHOWN = [
    re.sub("^    ", "", block, flags=re.MULTILINE)
    for block in re.findall(r"code-block:: text\n\n((?: {4}.*\n)+)", PAGE)
]


@pytest.mark.parametrize(
    ("shown", "file", "application"),
    [
        (SHOWN[0], "development.ini", {}),
        (
            SHOWN[1],
            "broken.ini",
            {
                "factory": "unplugged",
                "middleware": "Compressor",
                "options": "tgstream.chunksize = 65536",
                "url": "sqlite:///:memory:",
            },
        ),
    ],
    ids=["good", "broken"],
)
def test_page_shows_the_output_for_an_application(
    tmp_path: Path, shown: str, file: str, application: dict[str, str]
) -> None:
    """The modules of the application are ``myapp`` and ``myapp.lib``."""
    (tmp_path / "myapp").mkdir()
    (tmp_path / "myapp/__init__.py").write_text(APP)
    (tmp_path / "myapp/lib.py").write_text(MIDDLEWARES)
    write_application(tmp_path, **application)
    text = (tmp_path / "test.ini").read_text().replace("pass_through app", "app")
    text = text.replace("sampleapp_middlewares", "myapp.lib")
    (tmp_path / file).write_text(text.replace("sampleapp", "myapp"))
    status, printed = run_command(tmp_path, "doctor", file)
    assert printed == shown
    assert status == ("FAIL" in shown)


def test_page_shows_the_output_without_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Versions may differ, and the page has more servers than are installed."""
    assert main(["doctor"]) == 0

    def without_versions(text: str) -> dict[str, tuple[str, str]]:
        return parse_findings(re.sub(r"\d+(\.\w+)+(?= \(|: )", "N", text))

    printed = without_versions(capsys.readouterr().out)
    shown = without_versions(SHOWN[2])
    assert printed.items() <= shown.items()
    assert {"Python", "TurboGears2", "orjson", "redis", "waitress"} <= printed.keys()
