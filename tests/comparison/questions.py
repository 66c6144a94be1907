"""The questions about each framework. An answer is a few words about the client's view.

The questions do not fail. ``expected.py`` has the expected answers.
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
from tests.servers.claims import SECONDS, count_notes, pipe, read_pipe

AT_ONCE = 20
"""Concurrent streams on a server with six threads."""


class RunningApp(NamedTuple):
    """A running application, and its database."""

    framework: Framework
    live: LiveServer
    model: Model


class Answer(NamedTuple):
    """A response, as its client received it."""

    status: int
    headers: dict[str, str]
    body: str
    complete: bool
    """Whether the body has a proper end."""


def open_response(app: RunningApp, path: str) -> http.client.HTTPResponse:
    """Return a response whose body is still unread."""
    connection = http.client.HTTPConnection("127.0.0.1", app.live.port, SECONDS)
    connection.request("GET", path, headers={"Connection": "close"})
    return connection.getresponse()


def ask(app: RunningApp, path: str) -> Answer:
    """Make a request, and read as much of the response as the server sends.

    :raises TimeoutError: if the server hangs. No framework's server does.
    """
    try:
        response = open_response(app, path)
    except http.client.HTTPException:
        return Answer(0, {}, "", False)
    body, complete = b"", True
    try:
        while chunk := response.read1():
            body += chunk
    except (http.client.HTTPException, ConnectionError):
        complete = False
    response.close()
    return Answer(response.status, dict(response.headers), body.decode(), complete)


def describe(answer: Answer, body: str) -> str:
    """Return "works" if the answer has this body, or the answer in a few words."""
    if (answer.status, answer.body) == (200, body) and answer.complete:
        return "works"
    if answer.status == 404:
        return "none"
    empty = "an empty" if not answer.body else "a"
    ending = "" if answer.complete else " that breaks"
    return f"{empty} {answer.status}{ending}"


def with_and_without(app: RunningApp, question: str, path: str, body: str) -> str:
    """Return the answers without the framework's helper, and with it."""
    name, _, query = path.partition("?")
    bare = describe(ask(app, path), body)
    helper = app.framework.helpers.get(question)
    if bare == "works" or helper is None:
        return bare
    helped = describe(ask(app, f"{name}_helped?{query}"), body)
    if bare == "none":
        return helper if helped == "works" else f"{helper}: {helped}"
    return f"{bare}; {helper}: {helped}"


# The questions.


def text(app: RunningApp) -> str:
    """Return how a yielded ``str`` arrives."""
    return describe(ask(app, "/text"), "grüß dich")


def request(app: RunningApp) -> str:
    """Return whether the generator can read the request, and how."""
    return with_and_without(app, "request", "/request?of=ada", "ada\n" * 3)


def loaded(app: RunningApp) -> str:
    """Return whether an object of the view can load attributes in the generator."""
    return with_and_without(app, "loaded", "/loaded", "one\ntwo\n")


def added(app: RunningApp) -> str:
    """Return when rows of the generator are stored, without and with a commit."""
    bare = add(app, "adds")
    helper = app.framework.helpers.get("added")
    return f"{bare}; {helper}: {add(app, 'adds_helped')}" if helper else bare


def add(app: RunningApp, name: str) -> str:
    """Return when rows are stored: after the first chunk, at the end, or never."""
    counts = []
    for fails in "", "yes":
        before = count_notes(app.model, "added")
        with pipe() as path:
            response = open_response(app, f"/{name}?pipe={path}&fails={fails}")
            response.read(len("added\n"))
            counts.append(count_notes(app.model, "added") - before)
            with open(path, "w") as writer:
                writer.write("go\n")
            try:
                response.read()
            except http.client.IncompleteRead:
                assert fails
        counts.append(count_notes(app.model, "added") - before)
    words: dict[tuple[int, ...], str] = {
        (0, 3, 0, 0): "all or none",
        (1, 3, 1, 3): "each at once",
        (0, 0, 0, 0): "lost",
    }
    return words.get(tuple(counts), str(counts))


def early(app: RunningApp) -> str:
    """Return the results of a 404, a redirect and an error before the first chunk."""
    answers = [ask(app, f"/early?how={how}") for how in ("404", "302", "500")]
    codes = ["-" if answer.status == 501 else str(answer.status) for answer in answers]
    pages = [answer.body == f"our page for {answer.status}" for answer in answers[::2]]
    page = ", own pages" if all(pages) else ", the server's page"
    if codes[0] == "200":
        page = ", broken" if not answers[0].complete else ", looks whole"
    return f"{' '.join(codes)}{page}"


def header(app: RunningApp) -> str:
    """Return whether a header and a cookie of the generator are sent."""
    headers = ask(app, "/early?how=").headers
    sent = [name in headers for name in ("X-Made", "Set-Cookie")]
    return {2: "sent", 0: "ignored"}.get(sum(sent), "one of two")


def failure(app: RunningApp) -> str:
    """Return how a client sees a generator that fails after two chunks."""
    answer = ask(app, "/fails")
    if not answer.complete:
        return "breaks"
    return "looks whole" if answer.body == "one\ntwo\n" else "text appended"


def disconnect(app: RunningApp) -> str:
    """Return what a disconnect ends: the generator, its transaction, its rows."""
    helper = app.framework.helpers.get("leaves")
    # With the helper first: the other may keep a connection until a garbage collection.
    helped = ""
    if helper:
        helped = f"; {helper}: {read_and_disconnect(app, 'paced_helped')}"
    return read_and_disconnect(app, "paced") + helped


def read_and_disconnect(app: RunningApp, name: str) -> str:
    before = count_notes(app.model, "left")
    with pipe() as path:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        response = open_response(app, f"/{name}?pipe={path}")
        response.read1(1)
        response.close()
        end = read_pipe(reader)
        os.close(reader)
    deadline = time.monotonic() + SECONDS
    while (idle := app.model.idle_in_transaction()) and time.monotonic() < deadline:
        pass
    stays = count_notes(app.model, "left") > before
    rows = "row stays" if stays else "row undone"
    end = "not closed" if end == "nothing" else end
    return f"{end}, {'connection kept' if idle else 'released'}, {rows}"


def turns(app: RunningApp) -> str:
    """Return whether two streams in turn on a thread keep request and connection."""
    url = app.model.url.render_as_string(hide_password=False)
    options = [word.format(url=url) for word in app.framework.options]
    answers = []
    for path in "/turns", "/turns_helped":
        command = [sys.executable, "-m", "tests.comparison.turns", path, *options]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = json.loads(run.stdout.splitlines()[-1])
        answers.append(describe_turns(**lines))
        if "turns" not in app.framework.helpers:
            return answers[0]
    return f"{answers[0]}; {app.framework.helpers['turns']}: {answers[1]}"


def describe_turns(ada: list[str], bob: list[str], eve: list[str] | None = None) -> str:
    """Describe the lines of two streams in turn, and of a third on two threads.

    A line has the request's parameter and the number of the connection, or an error.
    """
    lines = [line.split() for line in ada if " " in line]
    others = [line.split() for line in bob if " " in line]
    mixed = {of for of, _ in lines} != {"ada"} or {of for of, _ in others} != {"bob"}
    shared = {backend for _, backend in lines} & {backend for _, backend in others}
    words = ["requests mix" if mixed else "own request"]
    words.append("one connection" if shared else "own connection")
    words += dict.fromkeys(line for line in [*ada, *bob] if " " not in line)
    if eve is not None and [line.split()[0] for line in eve] != ["eve"] * 3:
        error = eve[-1] if " " not in eve[-1] else "ends early"
        words.append(f"on another thread {error}")
    return ", ".join(words)


def waiting(app: RunningApp) -> str:
    """Return how many streams get their first chunk while all others wait.

    The helper is another server.
    """
    first = f"{wait(app.live, 'waits')} of {AT_ONCE}"
    if "waiting" not in app.framework.helpers:
        return first
    url = app.model.url.render_as_string(hide_password=False)
    options = [word.format(url=url) for word in app.framework.options]
    live = LiveServer("uvicorn", *options, "asgi=yes", run="tests.comparison.serve")
    try:
        helped = wait(live, "waits_helped")
    finally:
        live.stop()
    return f"{first}; {app.framework.helpers['waiting']}: {helped} of {AT_ONCE}"


def wait(live: LiveServer, name: str) -> int:
    """Return how many streams have their first chunk before any has its second."""
    with tempfile.TemporaryDirectory() as folder:
        gate = Path(folder, "gate")
        connections = []
        for _ in range(AT_ONCE):
            connection = http.client.HTTPConnection("127.0.0.1", live.port, SECONDS)
            connection.request("GET", f"/{name}?gate={gate}")
            connections.append(connection)
        pending = {connection.sock for connection in connections}
        # Wait until no chunk arrives for a second. The other streams start later.
        while ready := select.select(pending, [], [], 1)[0]:
            pending -= {*ready}
        first = AT_ONCE - len(pending)
        gate.touch()
        bodies = {connection.getresponse().read() for connection in connections}
        assert bodies == {b"first\nsecond\n"}
        for connection in connections:
            connection.close()
    return first


def events(app: RunningApp) -> str:
    """Return whether a feed resumes, sends heartbeats, and publishes on commit.

    A framework whose packages never mention ``Last-Event-ID`` has no such feed.
    """
    if "kind=tgstream" not in app.framework.options:
        names = [name for name in app.framework.packages if names_header(name)]
        return f"in {', '.join(names)}" if names else "not in the box"
    with Feed(app) as feed:
        feed.next("id")
        ask(app, "/publish?text=refused&fails=yes")
        ask(app, "/publish?text=one")
        on_commit = feed.next("data") == "one"
        last = feed.id
        heartbeats = feed.next("") is not None
    ask(app, "/publish?text=two")
    with Feed(app, {"Last-Event-ID": last}) as feed:
        resumes = feed.next("data") == "two"
    features = {"resumes": resumes, "heartbeats": heartbeats, "on commit": on_commit}
    return ", ".join(feature for feature, works in features.items() if works)


def names_header(package: str) -> bool:
    """Return whether the source of a distribution contains ``Last-Event-ID``."""
    return any(
        b"last-event-id" in path.read_bytes().lower()
        for path in map(Path, map(str, map(PackagePath.locate, files(package) or [])))
        if path.suffix == ".py"
    )


class Feed:
    """A client of Server-Sent Events, which reads a field at a time."""

    def __init__(self, app: RunningApp, headers: dict[str, str] | None = None) -> None:
        port = app.live.port
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
        """Return the next value of a field. The field of a comment is empty."""
        while line := self.response.readline().decode():
            name, _, value = line.rstrip("\n").partition(":")
            if name == "id":
                self.id = value.strip()
            if name == field and line != "\n":
                return value.strip()
        return None


QUESTIONS: dict[str, Callable[[RunningApp], str]] = {
    "Text": text,
    "The request": request,
    "A loaded object": loaded,
    "Rows that it adds": added,
    "Errors before the first chunk": early,
    "Headers and cookies": header,
    "A failure half-way": failure,
    "A client that leaves": disconnect,
    "Two streams in turn": turns,
    "Streams that wait": waiting,
    "Server-Sent Events": events,
}
