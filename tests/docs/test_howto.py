"""The pages of ``docs/`` on how to do what: their code runs, and does what they say."""

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

BROKEN = (http.client.IncompleteRead, ConnectionResetError)


class Site:
    """The application of a page under a real server, and its database from outside."""

    def __init__(self, page: str, server: str, url: str) -> None:
        self.live = LiveServer(server, "page_app", f"page={page}", f"url={url}")
        self.outside = sa.create_engine(url, poolclass=sa.NullPool)

    def stop(self) -> str:
        """End the server, and return its log."""
        self.outside.dispose()
        return self.live.stop()

    def look(self, statement: str) -> list[Any]:
        """The first column of what is stored."""
        with self.outside.connect() as connection:
            return list(connection.execute(sa.text(statement)).scalars())

    def execute(self, statement: str) -> None:
        """Change what is stored."""
        with self.outside.begin() as connection:
            connection.execute(sa.text(statement))

    def names(self) -> list[str]:
        """The names of the users that are stored, in order."""
        return self.look("SELECT user_name FROM tg_user ORDER BY user_id")

    def send(self, path: str, file: str, **headers: str) -> http.client.HTTPResponse:
        """Post a form with a file, as a browser does."""
        body = (
            '--limit\r\nContent-Disposition: form-data; name="file"; filename="a.csv"'
            f"\r\nContent-Type: text/csv\r\n\r\n{file}\r\n--limit--\r\n"
        ).encode()
        kind = {"Content-Type": "multipart/form-data; boundary=limit"}
        return self._ask("POST", path, body, {**kind, **headers})

    def get(self, path: str, **headers: str) -> http.client.HTTPResponse:
        """The response for ``path``, whose body is still to be read."""
        return self._ask("GET", path, None, headers)

    def _ask(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.live.port, timeout=20)
        connection.request(method, path, body, {"Connection": "close", **headers})
        return connection.getresponse()


@pytest.fixture(scope="module", params=["waitress sqlite", "gunicorn-gthread postgres"])
def writing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The page on writing: each of two servers with one of two databases."""
    server, database = request.param.split()
    if database == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('writing')}/test.db"
    else:
        url = request.getfixturevalue("postgresql")
    site = Site("writing", server, url)
    yield site
    site.stop()


@pytest.fixture
def make_pipe(tmp_path: Path) -> Callable[[str], Path]:
    """Makes named pipes, by which client and server wait for each other."""

    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


def leave(response: http.client.HTTPResponse) -> None:
    """Go away without a farewell, as a client that crashes does."""
    raw: Any = response.fp
    linger = struct.pack("ii", 1, 0)
    raw.raw._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    response.close()


def documents(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The lines of NDJSON, as they come."""
    return map(json.loads, response)


def csv_of(*names: str) -> str:
    """A file of users."""
    lines = [f"{name},{name.title()}\r\n" for name in names]
    return "user_name,display_name\r\n" + "".join(lines)


def people(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(1, count + 1)]


def test_upload_is_stored_and_told(writing: Site) -> None:
    """Every row is a user and a line, and the last line says that it is complete."""
    with writing.send("/imports/upload", csv_of(*people("whole", 250))) as response:
        told = list(documents(response))
    assert told == [{"row": n} for n in range(1, 251)] + [{"end": True, "items": 250}]
    assert [n for n in writing.names() if n.startswith("whole")] == people("whole", 250)


def test_upload_of_a_wrong_file_is_an_error_page(writing: Site) -> None:
    """What is found before the first ``yield`` has a status."""
    for path in "/imports/upload", "/jobs/start":
        with writing.send(path, "name\r\nada\r\n") as response:
            assert response.status == 400


def test_upload_that_fails_keeps_full_hundreds(writing: Site) -> None:
    """The rows since the last hundred are gone, and the client can tell."""
    short = csv_of(*people("twice", 250), "twice1")
    long = csv_of(*people("again", 3050), "again1")
    with writing.send("/imports/upload", short) as response:
        if response.status == 200:  # on a machine so slow that lines had left
            with pytest.raises(BROKEN):
                response.read()
        else:
            assert response.status == 500
    with writing.send("/imports/upload", long) as response, pytest.raises(BROKEN):
        assert response.status == 200
        response.read()
    stored = [n for n in writing.names() if n.startswith(("twice", "again"))]
    assert stored == [*people("twice", 200), *people("again", 3000)]


def test_upload_whose_client_leaves_goes_on_when_it_is_sent_again(
    writing: Site, make_pipe: Callable[[str], Path]
) -> None:
    """Full hundreds stay, nothing else does; in the end each row is there once."""
    names = [*people("left", 250), "wait", *people("late", 6000)]
    wait, tell = make_pipe("wait"), make_pipe("tell")
    told = os.open(tell, os.O_RDONLY | os.O_NONBLOCK)
    ways = {"X-Wait": str(wait), "X-Tell": str(tell)}
    before = len(writing.names())
    response = writing.send("/resumed/upload", csv_of(*names), **ways)
    seen = next(line["row"] for line in documents(response) if line["row"] == 200)
    with wait.open("w") as go:  # which waits for the other side
        leave(response)
        go.write("go on\n")
    assert select.select([told], [], [], 20)[0]
    assert os.read(told, 100) == b"disconnected"
    os.close(told)
    stored = len(writing.names()) - before
    assert stored % 100 == 0
    assert seen <= stored < len(names)
    assert writing.look('SELECT rows FROM "import"') == [stored]
    with writing.send("/resumed/upload", csv_of(*names)) as response:
        rest = list(documents(response))
    assert rest[0] == {"row": stored + 100}
    assert rest[-2] == {"row": len(names)}
    assert writing.names()[before:] == names


def test_upload_that_is_sent_twice_at_once_is_stored_once(
    writing: Site, make_pipe: Callable[[str], Path]
) -> None:
    """The one that comes second to a commit breaks."""
    names = [*people("once", 250), "wait", *people("then", 49)]
    file = csv_of(*names)
    writing.execute("DELETE FROM tg_user WHERE user_name = 'wait'")
    wait = make_pipe("wait")
    first = writing.send("/resumed/upload", file, **{"X-Wait": str(wait)})
    with wait.open("w") as go:
        with writing.send("/resumed/upload", file) as second:
            told = list(documents(second))
        go.write("go on\n")
    assert told == [{"row": 300}, {"end": True, "items": 1}]
    with first, pytest.raises(BROKEN):
        first.read()
    assert [n for n in writing.names() if n in {*names}] == names


def test_upload_goes_on_behind_rows_that_are_wrong(writing: Site) -> None:
    """Each is told by its number, and the others are stored."""
    file = csv_of("right1", "", "right2", "right1", "right3")
    with writing.send("/lenient/upload", file) as response:
        told = list(documents(response))
    assert [(each.get("row"), each.get("error")) for each in told] == [
        (1, None),
        (2, "it has no name"),
        (3, None),
        (4, "there is one of that name"),
        (5, None),
        (None, None),
    ]
    stored = [n for n in writing.names() if n.startswith("right")]
    assert stored == ["right1", "right2", "right3"]


def test_job_goes_on_without_its_page(writing: Site) -> None:
    """It is heard from its beginning, also when it is over, and has stored all rows."""
    with writing.send("/jobs/start", csv_of(*people("job", 250))) as response:
        job: dict[str, str] = json.load(response)
    for _ in range(2):
        told = []
        with writing.get("/jobs/progress?" + urlencode(job)) as response:
            for line in response:
                if line.startswith(b"data:") and line.strip() != b"data:":
                    told.append(json.loads(line[5:])["row"])
                if told == [100, 200, 250]:
                    break
        assert told == [100, 200, 250]
    assert [n for n in writing.names() if n.startswith("job")] == people("job", 250)
    with writing.get("/jobs/progress?job=other") as response:
        assert response.status == 404


class Shown:
    """A page whose code was run in this process, and its application.

    :param app: with each controller class of the page under its name.
    :param names: what the page defines, and ``engine``, which is of its database.
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
def show(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Shown]]:
    """Runs a page, and makes an application of it, with an SQLite file."""
    url = f"sqlite:///{tmp_path}/test.db"
    for name in "myapp", "myapp.lib", "myapp.lib.base", "myapp.model":
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def plug(base_config: Any) -> None:
        base_config.update_blueprint(page_app.database(url))
        tgstream.plugme(base_config)

    def show(page: str, **options: Any) -> Shown:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        names = page_app.shown(page, engine=engine)
        app = make_app(page_app.root_of(names), plug=plug, **options)
        return Shown(app, names)

    yield show
    page_app.DBSession.remove()
    tg.config["tg.app_globals"].sa_engine.dispose()


def test_moved_controller_answers_as_before(show: Callable[..., Shown]) -> None:
    """While all goes well; and what each has written is stored."""
    page = show("moving")
    for path in "before", "after":
        response = get(page.app, f"/{path}/register?names={path}1+{path}2")
        assert response.text == f"{path}1 at 127.0.0.1\n{path}2 at 127.0.0.1\n"
    assert page.users() == ["before1", "before2", "after1", "after2"]


def test_moved_controller_that_fails_is_seen_to_fail(tmp_path: Path) -> None:
    """Before, a failed response was a complete one, with nothing of it stored."""
    site = Site("moving", "waitress", f"sqlite:///{tmp_path}/test.db")
    try:
        with site.get("/before/register?names=ada+ada") as response:
            assert response.status == 200
            assert response.read().startswith(b"ada at 127.0.0.1")
        with site.get("/after/register?names=ada+ada") as response:
            assert response.status == 200
            with pytest.raises(BROKEN):
                response.read()
        assert site.names() == []
        with site.get("/after/register?names=eve") as response:
            assert response.read().startswith(b"eve at")
        with site.get("/after/register?names=eve") as response:
            assert response.status == 500
    finally:
        site.stop()


def test_moved_controller_without_tm_has_a_transaction_of_its_own(
    show: Callable[..., Shown],
) -> None:
    """What its body wrote and did not commit is gone."""
    page = show("moving", tm__enabled=False)
    for path in "before", "lost", "after":
        get(page.app, f"/unmanaged/{path}?name={path}")
    assert page.users() == ["before", "after"]


def test_flask_and_tgstream_stream_the_same(show: Callable[..., Shown]) -> None:
    """Beside what cannot be done from a generator of Flask."""
    page = show("moving", session__enabled=True)
    get(page.app, "/after/register?names=ada+bob")
    flask = page.names["app"]
    ours = get(page.app, "/reports/report?title=user")
    theirs = get(flask, "/report?title=user")
    assert ours.text == theirs.text == "user: ada\nuser: bob\n"
    assert ("Set-Cookie" in ours.headers, "Set-Cookie" in theirs.headers) == (
        True,
        False,
    )
    assert get(page.app, "/reports/report").status_int == 404
    call = Call(flask, "/report")
    assert call.status_int == 200
    with pytest.raises(NotFound):
        next(call)
    call.close()


def test_steps_go_through_a_proxy_at_once(show: Callable[..., Shown]) -> None:
    """The page on proxies says it by a header."""
    with open_stream(show("proxies").app, "/steps/steps") as response:
        assert response.headers["X-Accel-Buffering"] == "no"
        assert list(response.json()) == [{"step": 0}, {"step": 1}, {"step": 2}]


class Secured(Shown):
    """The page on security, with two users."""

    def ask(self, path: str, user: str = "", **options: Any) -> OpenStream:
        """The response that a user gets, or somebody who is not logged in."""
        if user:
            options["repoze.who.identity"] = {"repoze.who.userid": user}
        return open_stream(self.app, path, **options)


@pytest.fixture
def secured(show: Callable[..., Shown]) -> Secured:
    """The page on security, where two users are stored."""
    page = show("security", sa_auth__authmetadata=Users())
    with Session(page.names["engine"]) as session:
        session.add(page_app.User(user_name="ada", display_name="=1+1"))
        session.add(page_app.User(user_name="bob", display_name="Bob"))
        session.commit()
    return Secured(page.app, page.names)


def test_nobody_hears_of_orders_of_another(secured: Secured) -> None:
    """Whose channel it is, the controller finds out."""
    with secured.ask("/orders/feed?user_id=1", "ada") as response:
        assert next(response.events()).comment == "open"
    refused = {"ada": ["2", "9", "x"], "": ["1"]}
    for user, ids in refused.items():
        for each in ids:
            with secured.ask(f"/orders/feed?user_id={each}", user) as response:
                assert response.status_int == (404 if user else 401)


HERE, ELSEWHERE = "http://localhost", "http://other.example.com"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": HERE}, 200),  # over http://, where browsers send it alone
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
def test_stream_that_writes_is_not_for_other_sites(
    secured: Secured, headers: dict[str, str], status: int
) -> None:
    """Nothing is stored for a POST that another site's page sends, also over http."""
    path = "/imports/users?names=eve"
    with secured.ask(path, "ada", method="POST", headers=headers) as response:
        assert response.status_int == status
        response.read()
    assert ("eve" in secured.users()) == (status == 200)


def test_stream_that_writes_is_not_for_get(secured: Secured) -> None:
    """A page of any site can send it, by an image."""
    headers = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}
    with secured.ask("/imports/users?names=eve", "ada", headers=headers) as response:
        assert response.status_int == 405
    assert "eve" not in secured.users()


@pytest.mark.parametrize(("scheme", "status"), [("https", 200), ("http", 403)])
def test_stream_that_writes_is_for_the_site_behind_a_proxy(
    secured: Secured, scheme: str, status: int
) -> None:
    """Where the server knows from the proxy which scheme the browser uses."""
    options = {"HTTP_HOST": "shop.example.com", "wsgi.url_scheme": scheme}
    headers = {"Origin": "https://shop.example.com", "Sec-Fetch-Site": "same-origin"}
    path = "/imports/users?names=eve"
    with secured.ask(
        path, "ada", method="POST", headers=headers, **options
    ) as response:
        assert response.status_int == status
        response.read()


def test_feed_is_for_the_origins_that_are_named(secured: Secured) -> None:
    """Another one gets no header that would let its page read."""
    for origin in "https://shop.example.com", "https://other.example.com":
        with secured.ask("/shared/feed", headers={"Origin": origin}) as response:
            assert response.headers["Vary"] == "Origin"
            friend = origin if "shop" in origin else None
            assert response.headers.get("Access-Control-Allow-Origin") == friend


def test_export_runs_nothing_in_a_spreadsheet(secured: Secured) -> None:
    """Its cells are guarded, and its name is one, whatever was asked."""
    with secured.ask("/exports/users?title=../a%0D%0Ab", "ada") as response:
        disposition = response.headers["Content-Disposition"]
        assert disposition == 'attachment; filename="ab.csv"'
        rows = list(response.rows())
    assert rows == [["user_id", "display_name"], ["1", "'=1+1"], ["2", "Bob"]]


def test_user_of_redis_needs_the_keys_of_channels_alone(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """With the line of the page on security, and a password in the option."""
    [rule] = re.findall(
        r"``(ACL\s+SETUSER [^`]+)``", (DOCS / "security.rst").read_text()
    )
    with Valkey(tmp_path) as valkey:
        address = valkey.url.removeprefix("redis://")
        valkey.execute(*rule.split())
        make_app(
            tg.TGController(), tgstream__channels=f"redis://myapp:password@{address}"
        )
        heard = Channel("safe").listen()
        opened = next(heard)
        Channel("safe").publish("one")
        assert next(heard).data == "one"
        again = Channel("safe").listen(after=str(opened.id))
        assert [event.data for event in islice(again, 2)] == [None, "one"]
        heard.close()  # type: ignore[attr-defined]
