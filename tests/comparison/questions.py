"""What is asked of each framework; an answer is a few words of what was seen.

Nothing here fails: what is pinned is in ``expected.py``.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackagePath, files
from pathlib import Path
from typing import NamedTuple

from tests.comparison.frameworks import Framework
from tests.conftest import LiveServer
from tests.model import Model
from tests.servers.claims import SECONDS, pipe, told

AT_ONCE = 20
"""Streams that are open at once, on a server with six threads."""


class Stand(NamedTuple):
    """One running application, and its database seen from outside."""

    framework: Framework
    live: LiveServer
    model: Model


class Answer(NamedTuple):
    """What a client had of a response."""

    status: int
    headers: dict[str, str]
    body: str
    whole: bool
    """Whether it has a proper ending."""


def opened(stand: Stand, path: str) -> http.client.HTTPResponse:
    """A response of which nothing has been read."""
    connection = http.client.HTTPConnection("127.0.0.1", stand.live.port, SECONDS)
    connection.request("GET", path, headers={"Connection": "close"})
    return connection.getresponse()


def ask(stand: Stand, path: str) -> Answer:
    """One request, read to its end as far as that comes.

    :raises TimeoutError: where a server hangs, for which there is no word here.
    """
    try:
        response = opened(stand, path)
    except http.client.HTTPException:
        return Answer(0, {}, "", False)
    body, whole = b"", True
    try:
        while chunk := response.read1():
            body += chunk
    except (http.client.HTTPException, ConnectionError):
        whole = False
    response.close()
    return Answer(response.status, dict(response.headers), body.decode(), whole)


def seen(answer: Answer, body: str) -> str:
    """Whether a client got what was to come, or what it got instead."""
    if answer[::2] == (200, body) and answer.whole:
        return "works"
    if answer.status == 404:
        return "none"
    empty = "an empty" if not answer.body else "a"
    ending = "" if answer.whole else " that breaks"
    return f"{empty} {answer.status}{ending}"


def with_and_without(stand: Stand, question: str, path: str, body: str) -> str:
    """What is seen without the helper that the framework has, and then with it."""
    name, _, query = path.partition("?")
    bare = seen(ask(stand, path), body)
    helper = stand.framework.helpers.get(question)
    if bare == "works" or helper is None:
        return bare
    helped = seen(ask(stand, f"{name}_helped?{query}"), body)
    if bare == "none":
        return helper if helped == "works" else f"{helper}: {helped}"
    return f"{bare}; {helper}: {helped}"


# The questions.


def text(stand: Stand) -> str:
    """What becomes of a ``str`` that is yielded."""
    return seen(ask(stand, "/text"), "grüß dich")


def request(stand: Stand) -> str:
    """Whether, and how, the generator reads the request."""
    return with_and_without(stand, "request", "/request?of=ada", "ada\n" * 3)


def loaded(stand: Stand) -> str:
    """Whether an object that the view has loaded reads more in the generator."""
    return with_and_without(stand, "loaded", "/loaded", "one\ntwo\n")


def added(stand: Stand) -> str:
    """What becomes of rows that the generator adds, without and with a commit."""
    bare = add(stand, "adds")
    helper = stand.framework.helpers.get("added")
    return f"{bare}; {helper}: {add(stand, 'adds_helped')}" if helper else bare


def add(stand: Stand, name: str) -> str:
    """How many rows are there after the first chunk, at the end, and if it fails."""
    counts = []
    for fails in "", "yes":
        before = stored(stand, "added")
        with pipe() as path:
            response = opened(stand, f"/{name}?pipe={path}&fails={fails}")
            response.read(len("added\n"))
            counts.append(stored(stand, "added") - before)
            with open(path, "w") as go:
                go.write("go\n")
            try:
                response.read()
            except http.client.IncompleteRead:
                assert fails
        counts.append(stored(stand, "added") - before)
    words: dict[tuple[int, ...], str] = {
        (0, 3, 0, 0): "all or none",
        (1, 3, 1, 3): "each at once",
        (0, 0, 0, 0): "lost",
    }
    return words.get(tuple(counts), str(counts))


def stored(stand: Stand, of: str) -> int:
    """How many notes of that name are committed."""
    return sum(text.startswith(of) for text in stand.model.texts())


def early(stand: Stand) -> str:
    """What becomes of a 404, a redirect and an error before the first chunk."""
    answers = [ask(stand, f"/early?how={how}") for how in ("404", "302", "500")]
    codes = ["-" if a.status == 501 else str(a.status) for a in answers]
    pages = [a.body == f"our page for {a.status}" for a in answers[::2]]
    page = ", own pages" if all(pages) else ", the server's page"
    if codes[0] == "200":
        page = ", broken" if not answers[0].whole else ", looks whole"
    return f"{' '.join(codes)}{page}"


def header(stand: Stand) -> str:
    """Whether a header and a cookie that are set before the first chunk are sent."""
    headers = ask(stand, "/early?how=").headers
    there = [name in headers for name in ("X-Made", "Set-Cookie")]
    return {2: "sent", 0: "ignored"}.get(sum(there), "one of two")


def failure(stand: Stand) -> str:
    """What a client makes of a generator that fails after two chunks."""
    answer = ask(stand, "/fails")
    if not answer.whole:
        return "breaks"
    return "looks whole" if answer.body == "one\ntwo\n" else "text appended"


def leaves(stand: Stand) -> str:
    """What a client that leaves ends: the generator, its transaction, its rows."""
    helper = stand.framework.helpers.get("leaves")
    # First: what the other may keep is kept until Python collects its garbage.
    helped = f"; {helper}: {leave(stand, 'paced_helped')}" if helper else ""
    return leave(stand, "paced") + helped


def leave(stand: Stand, name: str) -> str:
    before = stored(stand, "left")
    with pipe() as path:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        response = opened(stand, f"/{name}?pipe={path}")
        response.read1(1)
        response.close()
        end = told(reader)
        os.close(reader)
    deadline = time.monotonic() + SECONDS
    while (idle := stand.model.idle_in_transaction()) and time.monotonic() < deadline:
        pass
    rows = "row stays" if stored(stand, "left") - before else "row undone"
    end = "not closed" if end == "nothing" else end
    return f"{end}, {'connection kept' if idle else 'released'}, {rows}"


def turns(stand: Stand) -> str:
    """Whether two streams in turn on a thread have a request and a connection each."""
    url = stand.model.url.render_as_string(hide_password=False)
    options = [word.format(url=url) for word in stand.framework.options]
    answers = []
    for path in "/turns", "/turns_helped":
        command = [sys.executable, "-m", "tests.comparison.turns", path, *options]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        answers.append(in_turn(**json.loads(run.stdout.splitlines()[-1])))
        if "turns" not in stand.framework.helpers:
            return answers[0]
    return f"{answers[0]}; {stand.framework.helpers['turns']}: {answers[1]}"


def in_turn(ada: list[str], bob: list[str], eve: list[str] | None = None) -> str:
    """The same of what the two gave, and a third with the help of another thread.

    A line is whose request it was made in, and by which connection; or an error.
    """
    lines = [line.split() for line in ada if " " in line]
    others = [line.split() for line in bob if " " in line]
    mixed = {of for of, _ in lines} != {"ada"} or {of for of, _ in others} != {"bob"}
    shared = {back_end for _, back_end in lines} & {back_end for _, back_end in others}
    words = ["requests mix" if mixed else "own request"]
    words.append("one connection" if shared else "own connection")
    words += dict.fromkeys(line for line in [*ada, *bob] if " " not in line)
    if eve is not None and [line.split()[0] for line in eve] != ["eve"] * 3:
        error = eve[-1] if " " not in eve[-1] else "ends early"
        words.append(f"on another thread {error}")
    return ", ".join(words)


def waiting(stand: Stand) -> str:
    """How many streams get their first chunk while all others wait.

    The helper is another server.
    """
    first = f"{wait(stand.live, 'waits')} of {AT_ONCE}"
    if "waiting" not in stand.framework.helpers:
        return first
    url = stand.model.url.render_as_string(hide_password=False)
    options = [word.format(url=url) for word in stand.framework.options]
    live = LiveServer("uvicorn", *options, "asgi=yes", run="tests.comparison.serve")
    try:
        helped = wait(live, "waits_helped")
    finally:
        live.stop()
    return f"{first}; {stand.framework.helpers['waiting']}: {helped} of {AT_ONCE}"


def wait(live: LiveServer, name: str) -> int:
    """How many have their first chunk before any has its second."""
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder, "gate")
        connections = []
        for _ in range(AT_ONCE):
            connection = http.client.HTTPConnection("127.0.0.1", live.port, SECONDS)
            connection.request("GET", f"/{name}?gate={gate}")
            connections.append(connection)
        pending = {connection.sock for connection in connections}
        # Until there is none for a second; and those who have none get theirs later.
        while ready := select.select(pending, [], [], 1)[0]:
            pending -= {*ready}
        first = AT_ONCE - len(pending)
        gate.touch()
        bodies = {connection.getresponse().read() for connection in connections}
        assert bodies == {b"first\nsecond\n"}
        for connection in connections:
            connection.close()
    return first


def events(stand: Stand) -> str:
    """Whether a feed goes on where its client was, keeps alive, and keeps to commits.

    Where no package of the framework so much as names the header by which a client
    says where it was, there is nothing to ask.
    """
    if "kind=tgstream" not in stand.framework.options:
        names = [name for name in stand.framework.packages if names_header(name)]
        return f"in {', '.join(names)}" if names else "not in the box"
    with Feed(stand) as feed:
        feed.next("id")
        ask(stand, "/publish?text=refused&fails=yes")
        ask(stand, "/publish?text=one")
        on_commit = feed.next("data") == "one"
        last = feed.id
        heartbeats = feed.next("") is not None
    ask(stand, "/publish?text=two")
    with Feed(stand, {"Last-Event-ID": last}) as feed:
        resumes = feed.next("data") == "two"
    does = {"resumes": resumes, "heartbeats": heartbeats, "on commit": on_commit}
    return ", ".join(word for word, seen in does.items() if seen)


def names_header(package: str) -> bool:
    """Whether a distribution's source has ``Last-Event-ID``, in whichever case."""
    return any(
        b"last-event-id" in path.read_bytes().lower()
        for path in map(Path, map(str, map(PackagePath.locate, files(package) or [])))
        if path.suffix == ".py"
    )


class Feed:
    """What a client of events hears, a field at a time."""

    def __init__(self, stand: Stand, headers: dict[str, str] | None = None) -> None:
        port = stand.live.port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, SECONDS)
        self.connection.request("GET", "/listen", headers=headers or {})
        self.response = self.connection.getresponse()
        self.id = ""

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.response.close()
        self.connection.close()

    def next(self, field: str) -> str | None:
        """The next value of a field; a comment's field is empty."""
        while line := self.response.readline().decode():
            name, _, value = line.rstrip("\n").partition(":")
            if name == "id":
                self.id = value.strip()
            if name == field and line != "\n":
                return value.strip()
        return None


QUESTIONS: dict[str, Callable[[Stand], str]] = {
    "Text": text,
    "The request": request,
    "A loaded object": loaded,
    "Rows that it adds": added,
    "Errors before the first chunk": early,
    "Headers and cookies": header,
    "A failure half-way": failure,
    "A client that leaves": leaves,
    "Two streams in turn": turns,
    "Streams that wait": waiting,
    "Server-Sent Events": events,
}
