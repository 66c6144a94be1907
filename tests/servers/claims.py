"""What is claimed of a server, each as a few words of what a client saw.

They are asked of tgstream and of TG alone in the same way, so nothing here fails: what
is promised is in ``expected.py``.
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
"""After so many, it hangs."""

NUMBERS = list(range(1, 11))
USERS = [None, 1, 2, 3, *[None] * 6]


class Stand(NamedTuple):
    """One running server, and its database seen from outside."""

    live: LiveServer
    model: Model


class Answer(NamedTuple):
    """What a client had of a response."""

    status: int
    body: bytes
    error: str
    """How its reading ended, if not well."""


def ask(stand: Stand, path: str, method: str = "GET", kind: str = "traced") -> Answer:
    """One request, read to its end as far as that comes."""
    connection = http.client.HTTPConnection("127.0.0.1", stand.live.port, SECONDS)
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
    """A named pipe, by which client and generator wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "pipe")
        os.mkfifo(path)
        os.chmod(path, 0o666)
        yield path


def told(reader: int) -> str:
    """What the generator writes into the pipe, if it does so at all."""
    if not select.select([reader], [], [], SECONDS)[0]:
        return "nothing"
    return os.read(reader, 100).decode()


def opened(stand: Stand, path: str) -> http.client.HTTPResponse:
    """A response of which nothing has been read."""
    connection = http.client.HTTPConnection("127.0.0.1", stand.live.port, SECONDS)
    connection.request("GET", f"/traced/{path}", headers={"Connection": "close"})
    return connection.getresponse()


# The claims.


def cookbook(stand: Stand) -> str:
    """How many of the four controllers of TG's cookbook do what they say."""
    added = ask(stand, "added?of=cookbook").body == b"Added\n" * 9
    lines = ask(stand, "lines").body
    right = [
        parsed(ask(stand, "numbers")) == NUMBERS,
        lines == b"/lines/1\n/lines/2\n/lines/3\n",
        parsed(ask(stand, "users")) == USERS,
        added and stored(stand, "cookbook") == 9,
    ]
    return f"{sum(right)} of 4"


def parsed(answer: Answer) -> object:
    try:
        return json.loads(answer.body) if not answer.error else answer.error
    except ValueError:
        return answer.body


def stored(stand: Stand, of: str) -> int:
    """How many notes of that name are committed."""
    return sum(text.startswith(of) for text in stand.model.texts())


def first_chunk(stand: Stand) -> str:
    """Whether the client has the first chunk while the generator waits for it."""
    with pipe() as path:
        try:
            response = opened(stand, f"wait?pipe={path}")
            first = response.read(5)
            go = os.open(path, os.O_RDWR)  # which does not wait for the other side
            os.write(go, b"second\n")
            rest = response.read()
            os.close(go)
        except (TimeoutError, http.client.HTTPException, OSError):
            return "no"
        return "at once" if (first, rest) == (b"first", b"second\n") else "no"


def failure(stand: Stand) -> str:
    """What a client makes of a stream that fails after two chunks."""
    seen = [fail(stand, wiring) for wiring in ("traced", "untraced")]
    seen += ["stores"] if stored(stand, "never") else []
    return seen[0] if seen[0] == seen[1] and len(seen) == 2 else " / ".join(seen)


def fail(stand: Stand, wiring: str) -> str:
    answer = ask(stand, "fails", kind=wiring)
    url = f"http://127.0.0.1:{stand.live.port}/{wiring}/fails"
    curl = subprocess.run(["curl", "-sS", "-m", "8", url], capture_output=True)
    if answer.error == "breaks" and curl.returncode in (18, 52, 56):
        return "breaks"
    if answer.error:
        return answer.error
    return "looks whole" if curl.stdout == b"one\ntwo\n" else "text appended"


def early(stand: Stand) -> str:
    """What becomes of a 404, a redirect and an error before the first chunk."""
    answers = [ask(stand, f"early?how={how}") for how in ("404", "302", "500")]
    return " ".join(str(answer.status or answer.error) for answer in answers)


def disconnect(stand: Stand) -> str:
    """Whether the generator is closed soon when its client has left."""
    return leave(stand, "paced")


def bound(stand: Stand) -> str:
    """The same, for a stream with ``max_seconds``."""
    return leave(stand, "bounded")


def leave(stand: Stand, path: str) -> str:
    with pipe() as named:
        reader = os.open(named, os.O_RDONLY | os.O_NONBLOCK)
        try:
            response = opened(stand, f"{path}?pipe={named}")
            response.read1(1)
            response.close()
        except (TimeoutError, http.client.HTTPException, OSError):
            return "hangs"
        end = told(reader)
        os.close(reader)
    if end == "made all":
        return "never noticed"
    made = int(end.removeprefix("closed at ")) if end.startswith("closed") else 0
    return f"closed ({made} chunks)" if made else end


def head(stand: Stand) -> str:
    """The status of a ``HEAD`` request."""
    answer = ask(stand, "lines", "HEAD")
    return str(answer.status or answer.error)


def zero(stand: Stand) -> str:
    """The status of a stream without a chunk."""
    answer = ask(stand, "empty")
    return str(answer.status or answer.error)


def four(stand: Stand) -> str:
    """Whether four streams at once keep to their request and their transaction."""
    before = stored(stand, "mixed")
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda of: ask(stand, f"mixed?of={of}"), "wxyz"))
    mixed = 0
    for of, answer in zip("wxyz", answers, strict=True):
        lines = [
            json.loads(line) for line in answer.body.splitlines() if line[:1] == b"["
        ]
        mixed += len(lines) < 20 or bool(answer.error)
        mixed += any(line[0] != of for line in lines)
        mixed += len({line[2] for line in lines}) != 1
    rows = stored(stand, "mixed") - before
    return "never mix" if not mixed and rows == 80 else f"mix, {rows} of 80 rows"


def left(stand: Stand) -> str:
    """What is left of all that, on any thread and in the database."""
    deadline = time.monotonic() + SECONDS
    state: dict[str, int] = {}
    while time.monotonic() < deadline:
        answer = ask(stand, "state")
        if answer.error:
            return answer.error
        state = json.loads(answer.body)
        del state["process"]
        if not any(state.values()):
            return "nothing"
    return ", ".join(f"{count} {name}" for name, count in state.items() if count)


def sigterm(stand: Stand) -> str:
    """What becomes of a stream when its server is told to end."""
    with pipe() as named:
        reader = os.open(named, os.O_RDONLY | os.O_NONBLOCK)
        try:
            response = opened(stand, f"paced?pipe={named}")
            body = response.read1(2)
            stand.live.process.terminate()
            while chunk := response.read1():
                body += chunk
            seen = "whole" if body.endswith(b"25\n") else "looks whole"
        except TimeoutError:
            seen = "hangs"
        except (http.client.HTTPException, OSError):
            seen = "breaks"
        stand.live.stop()
        end = os.read(reader, 100) if select.select([reader], [], [], 0)[0] else b""
        os.close(reader)
    return (
        f"{seen}, {'closed' if end.startswith(b'closed') else 'not closed'}"
        if (seen != "whole")
        else seen
    )


CLAIMS: dict[str, Callable[[Stand], str]] = {
    "cookbook": cookbook,
    "first chunk": first_chunk,
    "failure": failure,
    "before it": early,
    "client leaves": disconnect,
    "max_seconds": bound,
    "HEAD": head,
    "no chunk": zero,
    "four at once": four,
    "left behind": left,
    "SIGTERM": sigterm,
}
