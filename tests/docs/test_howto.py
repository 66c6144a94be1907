"""The how-to pages: their code runs, and does what the pages describe."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import sqlalchemy as sa
import tg
from sqlalchemy.orm import Session
from werkzeug.exceptions import NotFound

import tgstream
from tests.conftest import LiveServer, MakeApp
from tests.docs.test_docs import Users
from tests.live_apps import page_app
from tests.pages import DOCS
from tests.valkey import Valkey
from tests.wsgi import Call, get
from tgstream import Channel
from tgstream.testing import OpenStream, open_stream
from tgstream.testing.decoders import parse_events

ABORTED = (http.client.IncompleteRead, ConnectionResetError)


class Site:
    """The application of a page under a real server, and its database."""

    def __init__(self, page: str, server: str, url: str) -> None:
        self.live = LiveServer(server, "page_app", f"page={page}", f"url={url}")
        self.outside = sa.create_engine(url, poolclass=sa.NullPool)

    def stop(self) -> str:
        """End the server, and return its log."""
        self.outside.dispose()
        return self.live.stop()

    def fetch(self, statement: str) -> list[Any]:
        """The first column of a query."""
        with self.outside.connect() as connection:
            return list(connection.execute(sa.text(statement)).scalars())

    def execute(self, statement: str) -> None:
        """Execute a statement, and commit."""
        with self.outside.begin() as connection:
            connection.execute(sa.text(statement))

    def names(self) -> list[str]:
        """The names of the users that are stored, in order."""
        return self.fetch("SELECT user_name FROM tg_user ORDER BY user_id")

    def send(self, path: str, file: str, **headers: str) -> http.client.HTTPResponse:
        """Post a form with a file, as a browser does."""
        body = (
            '--limit\r\nContent-Disposition: form-data; name="file"; filename="a.csv"'
            f"\r\nContent-Type: text/csv\r\n\r\n{file}\r\n--limit--\r\n"
        ).encode()
        form = {"Content-Type": "multipart/form-data; boundary=limit"}
        return self._request("POST", path, body, {**form, **headers})

    def get(self, path: str, **headers: str) -> http.client.HTTPResponse:
        """The response for ``path``, with its body unread."""
        return self._request("GET", path, None, headers)

    def _request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.live.port, timeout=20)
        connection.request(method, path, body, {"Connection": "close", **headers})
        return connection.getresponse()


@pytest.fixture(scope="module", params=["waitress sqlite", "gunicorn-gthread postgres"])
def writing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The page on writing, under two servers, each with another database."""
    server, database = request.param.split()
    if database == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('writing')}/test.db"
    else:
        url = request.getfixturevalue("postgresql")
    site = Site("writing", server, url)
    site.get("/").read()  # gunicorn listens before its worker has created the tables
    yield site
    site.stop()


@pytest.fixture
def make_pipe(tmp_path: Path) -> Callable[[str], Path]:
    """Makes named pipes, so that client and server can wait for each other."""

    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


def disconnect(response: http.client.HTTPResponse) -> None:
    """Reset the connection, like a client that crashes."""
    raw: Any = response.fp
    linger = struct.pack("ii", 1, 0)
    raw.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    response.close()


def documents(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The documents of an NDJSON response, one at a time."""
    return map(json.loads, response)


def csv_of(*names: str) -> str:
    """A CSV file of users."""
    lines = [f"{name},{name.title()}\r\n" for name in names]
    return "user_name,display_name\r\n" + "".join(lines)


def people(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(1, count + 1)]


def test_upload_is_stored_and_reported(writing: Site) -> None:
    """Each row is stored and has a line, and the last line marks the end."""
    with writing.send("/imports/upload", csv_of(*people("whole", 250))) as response:
        lines = list(documents(response))
    assert lines == [{"row": n} for n in range(1, 251)] + [{"end": True, "items": 250}]
    assert [n for n in writing.names() if n.startswith("whole")] == people("whole", 250)


def test_upload_of_a_wrong_file_is_an_error_page(writing: Site) -> None:
    """An error before the first ``yield`` sets the status of the response."""
    for path in "/imports/upload", "/jobs/start":
        with writing.send(path, "name\r\nada\r\n") as response:
            assert response.status == 400


def test_failed_upload_keeps_committed_rows(writing: Site) -> None:
    """The rows since the last commit are lost, and the response is aborted."""
    short = csv_of(*people("twice", 250), "twice1")
    long = csv_of(*people("again", 3050), "again1")
    with writing.send("/imports/upload", short) as response:
        if response.status == 200:  # on a slow machine, some lines were sent
            with pytest.raises(ABORTED):
                response.read()
        else:
            assert response.status == 500
    with writing.send("/imports/upload", long) as response, pytest.raises(ABORTED):
        assert response.status == 200
        response.read()
    stored = [n for n in writing.names() if n.startswith(("twice", "again"))]
    assert stored == [*people("twice", 200), *people("again", 3000)]


def test_upload_of_a_disconnected_client_is_resumed_when_it_is_sent_again(
    writing: Site, make_pipe: Callable[[str], Path]
) -> None:
    """The committed rows stay. After the second upload each row is stored once."""
    names = [*people("left", 250), "wait", *people("late", 6000)]
    wait, ended = make_pipe("wait"), make_pipe("ended")
    end = os.open(ended, os.O_RDONLY | os.O_NONBLOCK)
    pipes = {"X-Wait": str(wait), "X-Tell": str(ended)}
    before = len(writing.names())
    response = writing.send("/resumed/upload", csv_of(*names), **pipes)
    seen = next(line["row"] for line in documents(response) if line["row"] == 200)
    with wait.open("w") as go:  # it waits until the server opens the pipe
        disconnect(response)
        go.write("go on\n")
    assert select.select([end], [], [], 20)[0]
    assert os.read(end, 100) == b"disconnected"
    os.close(end)
    stored = len(writing.names()) - before
    assert stored % 100 == 0
    assert seen <= stored < len(names)
    assert writing.fetch('SELECT rows FROM "import"') == [stored]
    with writing.send("/resumed/upload", csv_of(*names)) as response:
        rest = list(documents(response))
    assert rest[0] == {"row": stored + 100}
    assert rest[-2] == {"row": len(names)}
    assert writing.names()[before:] == names


def test_upload_that_is_sent_twice_at_once_is_stored_once(
    writing: Site, make_pipe: Callable[[str], Path]
) -> None:
    """The second upload that commits is aborted."""
    names = [*people("once", 250), "wait", *people("then", 49)]
    file = csv_of(*names)
    writing.execute("DELETE FROM tg_user WHERE user_name = 'wait'")
    wait = make_pipe("wait")
    first = writing.send("/resumed/upload", file, **{"X-Wait": str(wait)})
    with wait.open("w") as go:
        with writing.send("/resumed/upload", file) as second:
            lines = list(documents(second))
        go.write("go on\n")
    assert lines == [{"row": 300}, {"end": True, "items": 1}]
    with first, pytest.raises(ABORTED):
        first.read()
    assert [n for n in writing.names() if n in {*names}] == names


def test_upload_continues_after_invalid_rows(writing: Site) -> None:
    """Each invalid row is reported by its number, and the others are stored."""
    file = csv_of("right1", "", "right2", "right1", "right3")
    with writing.send("/lenient/upload", file) as response:
        lines = list(documents(response))
    assert [(line.get("row"), line.get("error")) for line in lines] == [
        (1, None),
        (2, "it has no name"),
        (3, None),
        (4, "there is one of that name"),
        (5, None),
        (None, None),
    ]
    stored = [n for n in writing.names() if n.startswith("right")]
    assert stored == ["right1", "right2", "right3"]


def test_job_continues_without_its_page(writing: Site) -> None:
    """It stores all rows, and its progress can be read during and after it."""
    with writing.send("/jobs/start", csv_of(*people("job", 250))) as response:
        job: dict[str, str] = json.load(response)
    for _ in range(2):
        progress = []
        with writing.get("/jobs/progress?" + urlencode(job)) as response:
            for line in response:
                if line.startswith(b"data:") and line.strip() != b"data:":
                    progress.append(json.loads(line[5:])["row"])
                if progress == [100, 200, 250]:
                    break
        assert progress == [100, 200, 250]
    assert [n for n in writing.names() if n.startswith("job")] == people("job", 250)
    with writing.get("/jobs/progress?job=other") as response:
        assert response.status == 404


class PageApplication:
    """The application of a page whose code was run in this process.

    :param app: it has each controller class of the page under its name.
    :param names: the names that the page defines, and ``engine``, of its database.
    """

    def __init__(self, app: Any, names: dict[str, Any]) -> None:
        self.app, self.names = app, names

    def users(self) -> list[str]:
        """The names of the users that are stored."""
        statement: Any = sa.select(page_app.User.user_name).order_by(
            page_app.User.user_id
        )
        with self.names["engine"].connect() as outside:
            return list(outside.execute(statement).scalars())


@pytest.fixture
def run_page(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., PageApplication]]:
    """Runs the code of a page, and makes its application with an SQLite file."""
    url = f"sqlite:///{tmp_path}/test.db"
    for name in "myapp", "myapp.lib", "myapp.lib.base", "myapp.model":
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def plug(base_config: Any) -> None:
        base_config.update_blueprint(page_app.database(url))
        tgstream.plugme(base_config)

    def run(page: str, **options: Any) -> PageApplication:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        names = page_app.shown(page, engine=engine)
        app = make_app(page_app.root_of(names), plug=plug, **options)
        return PageApplication(app, names)

    yield run
    page_app.DBSession.remove()
    tg.config["tg.app_globals"].sa_engine.dispose()


def test_moved_controller_responds_as_before(
    run_page: Callable[..., PageApplication],
) -> None:
    """If nothing fails, the responses are the same, and all changes are stored."""
    page = run_page("moving")
    for path in "before", "after":
        response = get(page.app, f"/{path}/register?names={path}1+{path}2")
        assert response.text == f"{path}1 at 127.0.0.1\n{path}2 at 127.0.0.1\n"
    assert page.users() == ["before1", "before2", "after1", "after2"]


def test_moved_controller_that_fails_aborts_the_response(tmp_path: Path) -> None:
    """Before the move, the response looked complete, and nothing was stored."""
    site = Site("moving", "waitress", f"sqlite:///{tmp_path}/test.db")
    try:
        with site.get("/before/register?names=ada+ada") as response:
            assert response.status == 200
            assert response.read().startswith(b"ada at 127.0.0.1")
        with site.get("/after/register?names=ada+ada") as response:
            assert response.status == 200
            with pytest.raises(ABORTED):
                response.read()
        assert site.names() == []
        with site.get("/after/register?names=eve") as response:
            assert response.read().startswith(b"eve at")
        with site.get("/after/register?names=eve") as response:
            assert response.status == 500
    finally:
        site.stop()


def test_moved_controller_without_tm_has_a_transaction_of_its_own(
    run_page: Callable[..., PageApplication],
) -> None:
    """Changes that the generator did not commit are rolled back."""
    page = run_page("moving", tm__enabled=False)
    for path in "before", "lost", "after":
        get(page.app, f"/unmanaged/{path}?name={path}")
    assert page.users() == ["before", "after"]


def test_flask_and_tgstream_stream_the_same(
    run_page: Callable[..., PageApplication],
) -> None:
    """They differ in headers and errors, which a generator of Flask cannot set."""
    page = run_page("moving", session__enabled=True)
    get(page.app, "/after/register?names=ada+bob")
    flask = page.names["app"]
    of_tgstream = get(page.app, "/reports/report?title=user")
    of_flask = get(flask, "/report?title=user")
    assert of_tgstream.text == of_flask.text == "user: ada\nuser: bob\n"
    assert "Set-Cookie" in of_tgstream.headers
    assert "Set-Cookie" not in of_flask.headers
    assert get(page.app, "/reports/report").status_int == 404
    call = Call(flask, "/report")
    assert call.status_int == 200
    with pytest.raises(NotFound):
        next(call)
    call.close()


def test_proxies_do_not_buffer_the_steps(
    run_page: Callable[..., PageApplication],
) -> None:
    """The code of the page on proxies sets a header for nginx."""
    with open_stream(run_page("proxies").app, "/steps/steps") as response:
        assert response.headers["X-Accel-Buffering"] == "no"
        assert list(response.json()) == [{"step": 0}, {"step": 1}, {"step": 2}]


class SecuredPage(PageApplication):
    """The page on security, with two users."""

    def open(self, path: str, user: str = "", **options: Any) -> OpenStream:
        """The response for a user, or for a client without a login."""
        if user:
            options["repoze.who.identity"] = {"repoze.who.userid": user}
        return open_stream(self.app, path, **options)


@pytest.fixture
def secured(run_page: Callable[..., PageApplication]) -> SecuredPage:
    """The page on security, with two users in its database."""
    page = run_page("security", sa_auth__authmetadata=Users())
    with Session(page.names["engine"]) as session:
        session.add(page_app.User(user_name="ada", display_name="=1+1"))
        session.add(page_app.User(user_name="bob", display_name="Bob"))
        session.commit()
    return SecuredPage(page.app, page.names)


def test_user_cannot_listen_to_the_orders_of_another(secured: SecuredPage) -> None:
    """The controller checks the owner of the channel."""
    with secured.open("/orders/feed?user_id=1", "ada") as response:
        assert next(response.events()).comment == "open"
    rejected = {"ada": ["2", "9", "x"], "": ["1"]}
    for user, ids in rejected.items():
        for id in ids:
            with secured.open(f"/orders/feed?user_id={id}", user) as response:
                assert response.status_int == (404 if user else 401)


HERE, ELSEWHERE = "http://localhost", "http://other.example.com"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": HERE}, 200),  # browsers send only this over http://
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": ELSEWHERE}, 403),
        ({"Origin": f"{HERE}.example.com"}, 403),
        ({"Origin": "https://localhost"}, 403),
        ({"Origin": f"{HERE}:8080"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": ELSEWHERE, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": ELSEWHERE, "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Origin": HERE, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({}, 403),
    ],
    ids=repr,
)
def test_stream_that_writes_rejects_other_sites(
    secured: SecuredPage, headers: dict[str, str], status: int
) -> None:
    """A POST from a page of another site stores nothing, also over http."""
    path = "/imports/users?names=eve"
    with secured.open(path, "ada", method="POST", headers=headers) as response:
        assert response.status_int == status
        response.read()
    assert ("eve" in secured.users()) == (status == 200)


def test_stream_that_writes_rejects_get(secured: SecuredPage) -> None:
    """A page of any site can send a GET, for example by an image."""
    headers = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    with secured.open("/imports/users?names=eve", "ada", headers=headers) as response:
        assert response.status_int == 405
    assert "eve" not in secured.users()


@pytest.mark.parametrize(("scheme", "status"), [("https", 200), ("http", 403)])
def test_stream_that_writes_accepts_its_own_site_behind_a_proxy(
    secured: SecuredPage, scheme: str, status: int
) -> None:
    """The proxy must forward the scheme that the browser uses."""
    options = {"HTTP_HOST": "shop.example.com", "wsgi.url_scheme": scheme}
    headers = {"Origin": "https://shop.example.com", "Sec-Fetch-Site": "same-origin"}
    path = "/imports/users?names=eve"
    with secured.open(
        path, "ada", method="POST", headers=headers, **options
    ) as response:
        assert response.status_int == status
        response.read()


def test_feed_allows_only_listed_origins(secured: SecuredPage) -> None:
    """Other origins get no header that would let their pages read it."""
    for origin in "https://shop.example.com", "https://other.example.com":
        with secured.open("/shared/feed", headers={"Origin": origin}) as response:
            assert response.headers["Vary"] == "Origin"
            allowed = origin if "shop" in origin else None
            assert response.headers.get("Access-Control-Allow-Origin") == allowed


def test_export_runs_nothing_in_a_spreadsheet(secured: SecuredPage) -> None:
    """Its cells are escaped, and its file name contains only safe characters."""
    with secured.open("/exports/users?title=../a%0D%0Ab", "ada") as response:
        disposition = response.headers["Content-Disposition"]
        assert disposition == 'attachment; filename="ab.csv"'
        rows = list(response.rows())
    assert rows == [["user_id", "display_name"], ["1", "'=1+1"], ["2", "Bob"]]


def test_redis_user_needs_only_the_keys_of_channels(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """The ACL line of the page on security is enough, with a password in the URL."""
    [rule] = re.findall("ACL SETUSER .+", (DOCS / "security.rst").read_text())
    with Valkey(tmp_path) as valkey:
        address = valkey.url.removeprefix("redis://")
        valkey.execute(*rule.split())
        make_app(
            tg.TGController(), tgstream__channels=f"redis://myapp:password@{address}"
        )
        events = Channel("safe").listen()
        first = next(events)
        Channel("safe").publish("one")
        assert next(events).data == "one"
        again = Channel("safe").listen(after=str(first.id))
        assert [event.data for event in islice(again, 2)] == [None, "one"]
        events.close()  # type: ignore[attr-defined]


# The page on htmx, Turbo and Datastar. tests/browser runs it with these libraries.

ROW = '<li id="user-{}">{}</li>'
ADDED: dict[str, list[tuple[str | None, str]]] = {
    "htmx": [(None, ROW)],
    "turbo": [
        (
            None,
            '<turbo-stream action="prepend" target="users"><template>'
            f"{ROW}</template></turbo-stream>",
        )
    ],
    "datastar": [
        ("datastar-remove-fragments", "selector #user-{}"),
        (
            "datastar-merge-fragments",
            f"mergeMode prepend\nselector #users\nfragments {ROW}",
        ),
    ],
}
"""The events of each library for a user: their types and data."""

RESET = {
    "htmx": ("reset", None),
    "turbo": (None, '<turbo-stream action="refresh"></turbo-stream>'),
    "datastar": ("datastar-execute-script", "script location.reload()"),
}
"""The event of each library if events are missing. The data of ``reset`` may be any."""


def test_htmx_page_publishes_fragments(tmp_path: Path) -> None:
    """The feed begins where the page was rendered, and reports missing events."""
    live = LiveServer(
        "waitress",
        "htmx_app",
        f"url=sqlite:///{tmp_path}/test.db",
        f"folder={tmp_path}/a",
    )
    try:
        for number, library in enumerate(ADDED, 1):
            address = f"http://127.0.0.1:{live.port}/{library}"
            page = httpx.get(f"{address}/").text
            name = f"<{library}>"
            assert httpx.post(f"{address}/register", data={"name": name}).is_success
            shown = ROW.format(number, f"&lt;{library}&gt;")
            assert shown in httpx.get(f"{address}/").text
            query = re.search(r"(?<=/feed\?)lastEventId=[^\"']+", page)
            assert query and shown not in page
            with httpx.stream("GET", f"{address}/feed?{query[0]}") as response:
                events = parse_events(response.iter_text())
                assert next(events).comment == "open"
                for type, data in ADDED[library]:
                    event = next(events)
                    expected = data.format(number, f"&lt;{library}&gt;")
                    assert (event.event, event.data) == (type, expected)
            with httpx.stream("GET", f"{address}/feed?lastEventId=x") as response:
                event = next(e for e in parse_events(response.iter_text()) if e.data)
                reset, script = RESET[library]
                assert (event.event, script or event.data) == (reset, event.data)
    finally:
        live.kill()
