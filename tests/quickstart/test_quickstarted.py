"""tgstream in applications as ``gearbox quickstart`` makes them, on real servers.

They have repoze.who, Beaker's sessions and backlash's error tracing; with ``debug`` on,
also backlash's debugger and tgext.debugbar.
"""

from __future__ import annotations

import contextlib
import json
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
    """The client of the stack, who is nobody again after the test."""
    yield stack.client
    stack.client.cookies.clear()


def logged(stack: Stack, *words: str) -> str:
    """The line of the log with these words, once it is there."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in [*stack.server.log]:
            if all(word in line for word in words):
                return line
        time.sleep(0.01)
    raise AssertionError("".join(stack.server.log))


def test_debugbar_is_there_with_debug(stack: Stack, client: httpx.Client) -> None:
    """The stack is the one that is meant."""
    page = client.get("/login").text
    assert ("tgdb_debugbar" in page) == stack.debug


def test_stream_knows_who_is_logged_in(stack: Stack, client: httpx.Client) -> None:
    """After a real login, the identity and its lazily loaded groups are there."""
    stack.log_in(*MANAGER)
    expected = "".join(f"{number} manager ['managers']\n" for number in range(3))
    assert client.get("/probe/who").text == expected


def test_anonymous_is_sent_to_the_login(client: httpx.Client) -> None:
    """A stream behind @require does as any controller: repoze.who asks who it is."""
    for path in "/probe/who", "/export/users", "/live/feed":
        answer = client.get(path)
        assert answer.status_code == 302
        assert "/login?came_from=" in answer.headers["Location"]


def test_users_are_exported_to_who_may(stack: Stack, client: httpx.Client) -> None:
    """The manager gets the file; the editor the application's own 403."""
    stack.log_in(*EDITOR)
    refused = client.get("/export/users")
    assert refused.status_code == 403
    assert "<h1>Error 403</h1>" in refused.text
    client.cookies.clear()
    stack.log_in(*MANAGER)
    export = client.get("/export/users")
    assert export.headers["Content-Disposition"] == 'attachment; filename="users.csv"'
    assert export.text.startswith(HEADER + "1,manager,manager@somedomain.com\r\n")


def test_event_of_another_request_arrives(stack: Stack, client: httpx.Client) -> None:
    """What is said in one request is heard in another, while that runs."""
    stack.log_in(*MANAGER)
    with connect_sse(client, "GET", "/live/feed") as feed:
        # Unlike a browser, this client hands out the comment, for it has an id.
        events = (event for event in feed.iter_sse() if event.data)
        said = client.post("/live/say", data={"text": "Grüße"})
        assert said.status_code == 204
        assert json.loads(next(events).data) == {"user": "manager", "text": "Grüße"}


def test_page_with_the_feed_is_rendered(stack: Stack, client: httpx.Client) -> None:
    """Its script arrives as it was written."""
    stack.log_in(*MANAGER)
    assert "feed.onmessage = event => {" in client.get("/live").text


def test_abort_before_the_first_chunk_is_an_error_page(client: httpx.Client) -> None:
    """It is the application's own, with the words of the generator."""
    page = client.get("/probe/missing")
    assert page.status_code == 404
    assert "<h1>Error 404</h1>" in page.text
    assert "There is no such export" in page.text


def test_error_before_the_first_chunk_is_a_500(
    stack: Stack, client: httpx.Client
) -> None:
    """With debug it is backlash's page, without it the application's own."""
    page = client.get("/probe/fails", params={"at": "once"})
    assert page.status_code == 500
    assert ("RuntimeError: it fails at once" in page.text) == stack.debug
    assert ("<h1>Error 500</h1>" in page.text) == (not stack.debug)


def test_flash_message_is_shown_by_the_next_page(
    stack: Stack, client: httpx.Client
) -> None:
    """What is set before the first chunk goes out with it: flash and session."""
    assert client.get("/probe/welcome").text == "1\nTrue\n"
    assert "webflash" in client.cookies
    page = client.get("/login").text
    assert "They are on their way" in page
    assert "webflash" not in client.cookies
    assert client.get("/probe/welcome").text == "2\nTrue\n"  # Beaker's, in a cookie


def test_option_of_the_ini_file_takes_effect(
    stack: Stack, client: httpx.Client
) -> None:
    """With ``tgstream.chunk_size = 1000`` a chunk has ten lines of a hundred bytes."""
    body = client.get("/probe/chunks").text
    assert body.splitlines() == ["number", *["x" * 98] * 100]
    assert "10 chunks" in logged(stack, "DEBUG [tgstream]", "/probe/chunks")


def test_failure_is_logged_by_the_application_s_logging(
    stack: Stack, client: httpx.Client
) -> None:
    """In the form of its ini file, with the traceback."""
    answer = None
    with contextlib.suppress(httpx.RemoteProtocolError):
        answer = client.get("/probe/fails").text
    # wsgiref ends every body by closing the connection.
    assert answer == ("the first half\n" if "gearbox" in stack.name else None)
    assert logged(stack, "ERROR [tgstream]", "ProbeController.fails", "failed")
    assert logged(stack, "RuntimeError: it fails half-way")
