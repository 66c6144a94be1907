"""tgstream in applications from ``gearbox quickstart``, on real servers.

They have repoze.who, Beaker's sessions and backlash's error tracing. With ``debug`` on,
they also have backlash's debugger and tgext.debugbar.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator

import httpx
import pytest
from httpx_sse import connect_sse

from tests.quickstart.conftest import Stack

MANAGER = ("manager", "managepass")
EDITOR = ("editor", "editpass")
HEADER = "user_id,user_name,email_address\r\n"


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    """The client of the stack, which is logged out after the test."""
    yield stack.client
    stack.client.cookies.clear()


def logged(stack: Stack, *words: str) -> str:
    """Wait for the line of the log with these words, and return it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in [*stack.server.log]:
            if all(word in line for word in words):
                return line
        time.sleep(0.01)
    raise AssertionError("".join(stack.server.log))


def test_debugbar_is_shown_with_debug(stack: Stack, client: httpx.Client) -> None:
    """The application has the setting that its name states."""
    page = client.get("/login").text
    assert ("tgdb_debugbar" in page) == stack.debug


def test_stream_has_the_user_who_is_logged_in(
    stack: Stack, client: httpx.Client
) -> None:
    """After a login, the generator can use the identity and load its groups."""
    stack.log_in(*MANAGER)
    expected = "".join(f"{number} manager ['managers']\n" for number in range(3))
    assert client.get("/probe/who").text == expected


def test_each_user_has_a_limit(stack: Stack, client: httpx.Client) -> None:
    """``limit_by='user'`` counts by the user who is logged in."""
    with contextlib.ExitStack() as opened:
        for login in MANAGER, EDITOR, None:
            client.cookies.clear()
            if login is not None:
                stack.log_in(*login)
            mine = opened.enter_context(client.stream("GET", "/probe/mine"))
            chunks = mine.iter_bytes()  # closes the connection when it is dropped
            assert next(chunks) == b"data: open\n\n"
            assert client.get("/probe/mine").status_code == 503


def test_anonymous_is_redirected_to_the_login(client: httpx.Client) -> None:
    """@require protects a stream like any other controller."""
    for path in "/probe/who", "/export/users", "/live/feed":
        response = client.get(path)
        assert response.status_code == 302
        assert "/login?came_from=" in response.headers["Location"]


def test_export_needs_the_permission(stack: Stack, client: httpx.Client) -> None:
    """The manager gets the file. The editor gets the application's 403 page."""
    stack.log_in(*EDITOR)
    forbidden = client.get("/export/users")
    assert forbidden.status_code == 403
    assert "<h1>Error 403</h1>" in forbidden.text
    client.cookies.clear()
    stack.log_in(*MANAGER)
    export = client.get("/export/users")
    assert export.headers["Content-Disposition"] == 'attachment; filename="users.csv"'
    assert export.text.startswith(HEADER + "1,manager,manager@somedomain.com\r\n")


def test_stream_of_a_user_without_permission_ends(
    stack: Stack, client: httpx.Client
) -> None:
    """The groups of the user are read again. The client that reconnects gets 403."""
    stack.log_in(*MANAGER)
    with client.stream("GET", "/probe/ticks") as ticks:
        lines = ticks.iter_lines()
        assert [next(lines), next(lines)] == ["data: manager", ""]
        database = sqlite3.connect(stack.folder / "devdata.db")
        members = database.execute("SELECT * FROM tg_user_group").fetchall()
        with database:
            database.execute("DELETE FROM tg_user_group")
        for line in lines:
            assert line in ("data: manager", "")
    assert client.get("/probe/ticks").status_code == 403
    with database:
        database.executemany("INSERT INTO tg_user_group VALUES (?, ?)", members)
    database.close()
    assert "refused" in logged(stack, "DEBUG [tgstream]", "/probe/ticks")


def test_event_of_another_request_arrives(stack: Stack, client: httpx.Client) -> None:
    """A running stream receives the event that another request publishes."""
    stack.log_in(*MANAGER)
    with connect_sse(client, "GET", "/live/feed") as feed:
        # Unlike a browser, this client returns the comment too, because it has an id.
        events = (event for event in feed.iter_sse() if event.data)
        response = client.post("/live/say", data={"text": "Grüße"})
        assert response.status_code == 204
        assert json.loads(next(events).data) == {"user": "manager", "text": "Grüße"}


def test_page_with_the_feed_is_rendered(stack: Stack, client: httpx.Client) -> None:
    """Its script is not escaped."""
    stack.log_in(*MANAGER)
    assert "feed.onmessage = event => {" in client.get("/live").text


def test_abort_before_the_first_chunk_is_an_error_page(client: httpx.Client) -> None:
    """The application's error page has the message of the generator."""
    page = client.get("/probe/missing")
    assert page.status_code == 404
    assert "<h1>Error 404</h1>" in page.text
    assert "There is no such export" in page.text


def test_error_before_the_first_chunk_is_a_500(
    stack: Stack, client: httpx.Client
) -> None:
    """With debug it is backlash's page. Otherwise it is the application's page."""
    page = client.get("/probe/fails", params={"at": "once"})
    assert page.status_code == 500
    assert ("RuntimeError: it fails at once" in page.text) == stack.debug
    assert ("<h1>Error 500</h1>" in page.text) == (not stack.debug)


def test_flash_message_is_shown_by_the_next_page(
    stack: Stack, client: httpx.Client
) -> None:
    """Flash messages and sessions that are set before the first chunk are sent."""
    assert client.get("/probe/welcome").text == "1\nTrue\n"
    assert "webflash" in client.cookies
    page = client.get("/login").text
    assert "They are on their way" in page
    assert "webflash" not in client.cookies
    assert client.get("/probe/welcome").text == "2\nTrue\n"  # of Beaker's session


def test_option_of_the_ini_file_takes_effect(
    stack: Stack, client: httpx.Client
) -> None:
    """With ``tgstream.chunk_size = 1000`` a chunk has ten lines of 100 bytes."""
    body = client.get("/probe/chunks").text
    assert body.splitlines() == ["number", *["x" * 98] * 100]
    assert "10 chunks" in logged(stack, "DEBUG [tgstream]", "/probe/chunks")


def test_failure_is_logged_by_the_application_s_logging(
    stack: Stack, client: httpx.Client
) -> None:
    """The log line has the format of the .ini file, and the traceback."""
    text = None
    with contextlib.suppress(httpx.RemoteProtocolError):
        text = client.get("/probe/fails").text
    # wsgiref ends every body by closing the connection.
    assert text == ("the first half\n" if "gearbox" in stack.name else None)
    assert logged(stack, "ERROR [tgstream]", "ProbeController.fails", "failed")
    assert logged(stack, "RuntimeError: it fails halfway")
