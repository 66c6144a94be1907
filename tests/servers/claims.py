"""The claims about a server. Each check returns a few words about the client's view.

tgstream and TurboGears alone get the same checks, so the checks do not fail.
``expected.py`` has the results that are promised.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.conftest import LiveServer
from tests.model import Model

SECONDS = 8.0
"""Seconds until a server counts as hanging."""

NUMBERS = list(range(1, 11))
USERS = [None, 1, 2, 3, *[None] * 6]


class RunningApp(NamedTuple):
    """A running server, and its database."""

    live: LiveServer
    model: Model


class Answer(NamedTuple):
    """A response, as its client received it."""

    status: int
    body: bytes
    error: str
    """``hangs`` or ``breaks``, if the response did not end normally."""


def ask(
    app: RunningApp, path: str, method: str = "GET", kind: str = "traced"
) -> Answer:
    """Make a request, and read as much of the response as the server sends."""
    connection = http.client.HTTPConnection("127.0.0.1", app.live.port, SECONDS)
    body = b""
    try:
        headers = {"Connection": "close"}
        connection.request(method, f"/{kind}/{path}", headers=headers)
        response = connection.getresponse()
        while chunk := response.read1():
            body += chunk
        return Answer(response.status, body, "")
    except TimeoutError:
        return Answer(0, body, "hangs")
    except (http.client.HTTPException, OSError):
        return Answer(0, body, "breaks")
    finally:
        connection.close()


@contextmanager
def pipe() -> Iterator[Path]:
    """Make a named pipe, with which client and generator wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "pipe")
        os.mkfifo(path)
        os.chmod(path, 0o666)
        yield path


def read_pipe(reader: int) -> str:
    """Return the generator's text from the pipe, or "nothing"."""
    if not select.select([reader], [], [], SECONDS)[0]:
        return "nothing"
    return os.read(reader, 100).decode()


def open_response(app: RunningApp, path: str) -> http.client.HTTPResponse:
    """Return a response whose body is still unread."""
    connection = http.client.HTTPConnection("127.0.0.1", app.live.port, SECONDS)
    connection.request("GET", f"/traced/{path}", headers={"Connection": "close"})
    return connection.getresponse()


# The claims.


def cookbook(app: RunningApp) -> str:
    """Return how many of the four controllers of TG's cookbook work."""
    added = ask(app, "added?of=cookbook").body == b"Added\n" * 9
    lines = ask(app, "lines").body
    correct = [
        parse(ask(app, "numbers")) == NUMBERS,
        lines == b"/lines/1\n/lines/2\n/lines/3\n",
        parse(ask(app, "users")) == USERS,
        added and count_notes(app.model, "cookbook") == 9,
    ]
    return f"{sum(correct)} of 4"


def parse(answer: Answer) -> object:
    try:
        return json.loads(answer.body) if not answer.error else answer.error
    except ValueError:
        return answer.body


def count_notes(model: Model, prefix: str) -> int:
    """Return how many committed notes have this prefix."""
    return sum(text.startswith(prefix) for text in model.texts())


def first_chunk(app: RunningApp) -> str:
    """Return whether the client receives the first chunk before the second is made."""
    with pipe() as path:
        try:
            response = open_response(app, f"wait?pipe={path}")
            first = response.read(5)
            writer = os.open(path, os.O_RDWR)  # does not block until there is a reader
            os.write(writer, b"second\n")
            rest = response.read()
            os.close(writer)
        except (TimeoutError, http.client.HTTPException, OSError):
            return "no"
        return "at once" if (first, rest) == (b"first", b"second\n") else "no"


def failure(app: RunningApp) -> str:
    """Return how a client sees a stream that fails after two chunks."""
    results = [fail(app, wiring) for wiring in ("traced", "untraced")]
    if count_notes(app.model, "never"):
        return " / ".join([*results, "stores"])
    return results[0] if results[0] == results[1] else " / ".join(results)


def fail(app: RunningApp, wiring: str) -> str:
    answer = ask(app, "fails", kind=wiring)
    url = f"http://127.0.0.1:{app.live.port}/{wiring}/fails"
    curl = subprocess.run(["curl", "-sS", "-m", "8", url], capture_output=True)
    if answer.error == "breaks" and curl.returncode in (18, 52, 56):
        return "breaks"
    if answer.error:
        return answer.error
    return "looks whole" if curl.stdout == b"one\ntwo\n" else "text appended"


def early(app: RunningApp) -> str:
    """Return the statuses of a 404, a redirect and an error before the first chunk."""
    answers = [ask(app, f"early?how={how}") for how in ("404", "302", "500")]
    return " ".join(str(answer.status or answer.error) for answer in answers)


def disconnect(app: RunningApp) -> str:
    """Return whether the generator is closed soon after its client disconnects."""
    return read_and_disconnect(app, "paced")


def expire(app: RunningApp) -> str:
    """Return the same for a stream with ``max_seconds``."""
    return read_and_disconnect(app, "bounded")


def read_and_disconnect(app: RunningApp, path: str) -> str:
    with pipe() as named:
        reader = os.open(named, os.O_RDONLY | os.O_NONBLOCK)
        try:
            response = open_response(app, f"{path}?pipe={named}")
            response.read1(1)
            response.close()
        except (TimeoutError, http.client.HTTPException, OSError):
            return "hangs"
        end = read_pipe(reader)
        os.close(reader)
    if end == "made all":
        return "never noticed"
    made = int(end.removeprefix("closed at ")) if end.startswith("closed") else 0
    return f"closed ({made} chunks)" if made else end


def head(app: RunningApp) -> str:
    """Return the status of a ``HEAD`` request."""
    answer = ask(app, "lines", "HEAD")
    return str(answer.status or answer.error)


def no_chunk(app: RunningApp) -> str:
    """Return the status of a stream without chunks."""
    answer = ask(app, "empty")
    return str(answer.status or answer.error)


def concurrent_streams(app: RunningApp) -> str:
    """Return whether four concurrent streams keep their request and transaction."""
    before = count_notes(app.model, "mixed")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda of: ask(app, f"mixed?of={of}"), "wxyz"))
    mixed = 0
    for of, answer in zip("wxyz", answers, strict=True):
        lines = [
            json.loads(line) for line in answer.body.splitlines() if line[:1] == b"["
        ]
        mixed += len(lines) < 20 or bool(answer.error)
        mixed += any(line[0] != of for line in lines)
        mixed += len({line[2] for line in lines}) != 1
    rows = count_notes(app.model, "mixed") - before
    return "never mix" if not mixed and rows == 80 else f"mix, {rows} of 80 rows"


def left_behind(app: RunningApp) -> str:
    """Return the state that remains on any thread and in the database."""
    deadline = time.monotonic() + SECONDS
    state: dict[str, int] = {}
    while time.monotonic() < deadline:
        answer = ask(app, "state")
        if answer.error:
            return answer.error
        state = json.loads(answer.body)
        del state["process"]
        if not any(state.values()):
            return "nothing"
    return ", ".join(f"{count} {name}" for name, count in state.items() if count)


def sigterm(app: RunningApp) -> str:
    """Return how a stream ends when its server gets SIGTERM."""
    with pipe() as named:
        reader = os.open(named, os.O_RDONLY | os.O_NONBLOCK)
        try:
            response = open_response(app, f"paced?pipe={named}")
            body = response.read1(2)
            app.live.process.terminate()
            while chunk := response.read1():
                body += chunk
            result = "whole" if body.endswith(b"25\n") else "looks whole"
        except TimeoutError:
            result = "hangs"
        except (http.client.HTTPException, OSError):
            result = "breaks"
        app.live.stop()
        end = os.read(reader, 100) if select.select([reader], [], [], 0)[0] else b""
        os.close(reader)
    if result == "whole":
        return result
    return f"{result}, {'closed' if end.startswith(b'closed') else 'not closed'}"


CLAIMS: dict[str, Callable[[RunningApp], str]] = {
    "cookbook": cookbook,
    "first chunk": first_chunk,
    "failure": failure,
    "before it": early,
    "client leaves": disconnect,
    "max_seconds": expire,
    "HEAD": head,
    "no chunk": no_chunk,
    "four at once": concurrent_streams,
    "left behind": left_behind,
    "SIGTERM": sigterm,
}
