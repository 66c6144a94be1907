"""The JavaScript of ``docs/writing.rst``, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.conftest import Browser
from tests.conftest import LiveServer
from tests.pages import DOCS, blocks

FORM = """
window.shown = [], window.ended = [];
window.show = line => shown.push(line);
window.form = document.createElement("form");
form.innerHTML = '<input type="file" name="file">';
window.upload = function (names, head = "user_name,display_name") {
    const lines = names.map(name => `${name},${name}\\n`).join("");
    const files = new DataTransfer();
    files.items.add(new File([head, "\\n", lines], "users.csv"));
    form.elements.file.files = files.files;
    send(form).then(() => ended.push("well"), error => ended.push(String(error)));
};
"""


@pytest.fixture
def page(
    live_server: Callable[..., LiveServer], browser: Browser, tmp_path: Path
) -> Iterator[Browser]:
    """A page with the script of ``docs/writing.rst``, and a form."""
    url = f"sqlite:///{tmp_path}/test.db"
    live = live_server("waitress", "page_app", "page=writing", f"url={url}")
    browser.open(f"127.0.0.1:{live.port}/jobs/progress?job=none")
    [script] = blocks((DOCS / "writing.rst").read_text(), "javascript")
    browser.run(f"{FORM} {script} window.send = send;")
    yield browser


def test_upload_reports_progress_line_by_line(page: Browser) -> None:
    """The page shows each row, and at last that the upload is complete."""
    page.run("upload([...Array(250).keys()].map(number => `user${number}`))")
    assert page.until("ended.length && ended") == ["well"]
    assert page.run("return shown.length") == 251
    assert page.run("return shown[250]") == {"end": True, "items": 250}


def test_upload_of_a_wrong_file_reports_the_reason(page: Browser) -> None:
    """The error has the text of the error page."""
    page.run("upload([], 'name')")
    [error] = page.until("ended.length && ended")
    assert "user_name,display_name" in error


def test_failed_upload_is_an_error(page: Browser) -> None:
    """The transfer is aborted after some rows."""
    page.run("upload([...Array(4000).keys(), 1].map(number => `user${number}`))")
    [error] = page.until("ended.length && ended")
    assert "TypeError" in error  # the error of fetch
    assert page.run("return shown.length") > 0
