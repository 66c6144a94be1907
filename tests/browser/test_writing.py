"""The JavaScript of ``docs/writing.rst``, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.conftest import Browser
from tests.conftest import LiveServer
from tests.pages import DOCS, blocks

FORM = """
window.told = [], window.ended = [];
window.show = line => told.push(line);
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
    """A page that has what the page on writing shows, and a form."""
    url = f"sqlite:///{tmp_path}/test.db"
    live = live_server("waitress", "page_app", "page=writing", f"url={url}")
    browser.open(f"127.0.0.1:{live.port}/jobs/progress?job=none")
    [script] = blocks((DOCS / "writing.rst").read_text(), "javascript")
    browser.run(f"{FORM} {script} window.send = send;")
    yield browser


def test_upload_is_told_line_by_line(page: Browser) -> None:
    """Each row, and at last that it is complete."""
    page.run("upload([...Array(250).keys()].map(number => `user${number}`))")
    assert page.until("ended.length && ended") == ["well"]
    assert page.run("return told.length") == 251
    assert page.run("return told[250]") == {"end": True, "items": 250}


def test_upload_of_a_wrong_file_says_why(page: Browser) -> None:
    """It is an error page, which the error has."""
    page.run("upload([], 'name')")
    [error] = page.until("ended.length && ended")
    assert "user_name,display_name" in error


def test_upload_that_fails_is_seen_to_fail(page: Browser) -> None:
    """The transfer breaks behind the rows that were told."""
    page.run("upload([...Array(4000).keys(), 1].map(number => `user${number}`))")
    [error] = page.until("ended.length && ended")
    assert "TypeError" in error  # as fetch says it
    assert page.run("return told.length") > 0
