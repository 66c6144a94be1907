"""The examples, with the options of the README, and used by an HTTP client."""

from __future__ import annotations

import csv
import http.client
import io
import json
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlencode

import pytest
import python_calamine

from tests.forks import ForkedProcess
from tests.upstream import Upstream, wait_until
from tests.valkey import Valkey

ROOT = Path(__file__).parents[2]
WRITERS = ["by_hand", "at_the_end", "each"]


class Example:
    """An example in a process of its own, with its database in ``folder``."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.folder = folder
        with (folder / "errors").open("w") as errors:
            self.process = ForkedProcess(
                *(f"{ROOT}/examples/{name}.py", "--port=0", *options),
                stderr=errors,
                TMPDIR=str(folder),
            )
        printed = re.match(r"Open http://([^/]*)/", self.process.stdout.readline())
        assert printed is not None, (folder / "errors").read_text()
        self.address = printed[1]

    def get(self, path: str, **headers: str) -> http.client.HTTPResponse:
        """The response for ``path``, with its body unread."""
        return self._request("GET", path, None, headers)

    def post(self, path: str, **fields: str) -> http.client.HTTPResponse:
        """The response to a form that is sent to ``path``."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._request("POST", path, urlencode(fields), form)

    def _request(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        connection.request(method, path, body, {"Connection": "close", **headers})
        return connection.getresponse()

    def read(self, path: str) -> bytes:
        """The whole body for ``path``."""
        with self.get(path) as response:
            assert response.status == 200
            return response.read()

    def stored(self) -> list[str]:
        """The names of the permissions that are committed."""
        [database] = self.folder.glob("*/cookbook.db")
        with closing(sqlite3.connect(database)) as connection:
            rows = connection.execute("SELECT permission_name FROM tg_permission")
            return [name for (name,) in rows]

    def stop(self) -> int:
        """Stop it by Ctrl-C, and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(20)
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """The running example."""
    folder = tmp_path_factory.mktemp("cookbook")
    example = Example(folder, "cookbook", "--pause=0.01")
    yield example
    example.stop()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """The running example."""
    example = Example(tmp_path_factory.mktemp("exports"), "exports")
    yield example
    example.stop()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """The running example."""
    example = Example(tmp_path_factory.mktemp("live"), "live", "--pause=0.01")
    yield example
    example.stop()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


def test_chat_sends_the_tokens_of_its_model(tmp_path: Path) -> None:
    """Its own small model repeats the question, word by word."""
    chat = Example(tmp_path, "chat", "--pause=0.01")
    assert b"EventSource" in chat.read("/")
    events = chat.read("/answer?text=hello%20there").decode()
    events = events.replace(":\n\n", "")
    words = ["You", "said:", "hello", "there"]
    tokens = "".join(f'data: {{"token":"{word}"}}\n\n' for word in words)
    assert events == tokens + "event: done\ndata: \n\n"
    assert chat.stop() == 0


def test_chat_stops_its_model_when_the_client_disconnects(
    tmp_path: Path, upstream: Upstream
) -> None:
    """The connection is closed although the model sends nothing."""
    chat = Example(tmp_path, "chat", f"--upstream={upstream.url}/silent/")
    with chat.get("/answer?text=x") as response:
        assert response.read1(100).startswith(b'data: {"token":"/silent/?text=x 0"}')
        assert upstream.open["silent"] == 1
    wait_until(lambda: upstream.open["silent"] == 0)
    assert chat.stop() == 0


def test_index_links_every_controller(cookbook: Example) -> None:
    """The first page leads to all the others."""
    linked = re.findall(r'href="(\w+)"', cookbook.read("/").decode())
    assert linked == ["numbers", "lines", "users", *WRITERS, "fails"]


def test_numbers_are_a_json_array(cookbook: Example) -> None:
    """The cookbook's first controller yields text that makes a JSON array."""
    with cookbook.get("/numbers") as response:
        assert response.headers["Content-Type"].startswith("application/json")
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert response.read() == b"[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"


def test_lines_read_the_request(cookbook: Example) -> None:
    """The second controller uses ``tg.request`` in every line."""
    expected = "".join(f"/lines/{num}\n" for num in range(1, 11))
    assert cookbook.read("/lines") == expected.encode()


def test_users_are_read_between_yields(cookbook: Example) -> None:
    """The third controller runs a query for each number, and two are users."""
    users = json.loads(cookbook.read("/users"))
    assert users == [None, 1, 2, *[None] * 7]


@pytest.mark.parametrize("path", WRITERS)
def test_permissions_are_stored_each_time(cookbook: Example, path: str) -> None:
    """The fourth controller, in three ways, stores nine rows for each request."""
    before = len(cookbook.stored())
    assert cookbook.read(f"/{path}") == b"Added Permission\n" * 9
    assert len(cookbook.stored()) == before + 9
    assert cookbook.read(f"/{path}") == b"Added Permission\n" * 9
    assert len(set(cookbook.stored())) == before + 18
    with cookbook.get("/") as response:
        assert response.read().endswith(b"in the database: %d" % (before + 18))


def test_permission_is_stored_before_its_line_is_sent(cookbook: Example) -> None:
    """With ``tgstream.commit()`` a client sees only rows that are committed."""
    before = len(cookbook.stored())
    with cookbook.get("/each") as response:
        for count in range(1, 10):
            assert response.readline() == b"Added Permission\n"
            assert len(cookbook.stored()) >= before + count


def test_failing_controller_aborts_the_transfer(cookbook: Example) -> None:
    """A client notices that the response is incomplete."""
    with (
        cookbook.get("/fails") as response,
        pytest.raises(http.client.IncompleteRead) as incomplete,
    ):
        response.read()
    assert response.status == 200
    assert incomplete.value.partial == b"the first half\n"


def test_example_ends_with_ctrl_c(tmp_path: Path) -> None:
    """It ends without a traceback, and removes its database."""
    example = Example(tmp_path, "cookbook", "--pause=0.01")
    assert b"Permissions in the database: 0" in example.read("/")
    assert example.stop() == 0
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert list(tmp_path.glob("*/cookbook.db")) == []


def test_table_is_exported_in_every_format(exports: Example) -> None:
    """Readers of others read the same 100,000 rows of each format."""
    linked = re.findall(r'href="(\w+)"', exports.read("/").decode())
    assert linked == ["csv", "excel", "lines", "array", "workbook", "resumable"]
    table = list(csv.reader(exports.read("/csv").decode().splitlines()))
    assert table[:2] == [["id", "customer", "amount"], ["1", "=Customer 0", "0.0"]]
    documents = list(map(json.loads, exports.read("/lines").splitlines()))
    assert documents.pop() == {"end": True, "items": 100_000}
    assert [list(map(str, document.values())) for document in documents] == table[1:]
    assert json.loads(exports.read("/array")) == documents[:40]
    file = io.BytesIO(exports.read("/workbook"))
    workbook = python_calamine.CalamineWorkbook.from_filelike(file)
    assert workbook.get_sheet_by_index(0).to_python()[1] == [1.0, "=Customer 0", 0.0]
    with exports.get("/resumable") as response:
        assert list(csv.reader(response.read().decode().splitlines())) == table
        assert response.headers["Accept-Ranges"] == "bytes"


def test_export_for_excel_has_no_formula(exports: Example) -> None:
    """Excel recognises it as UTF-8, and no cell begins with a formula's sign."""
    with exports.get("/excel") as response:
        disposition = response.headers["Content-Disposition"]
        assert disposition == 'attachment; filename="orders.csv"'
        text = response.read().decode()
    assert text.startswith("\ufeffid,customer,amount\r\n1,'=Customer 0,0.0\r\n")
    assert ",=" not in text


def test_export_continues_after_a_key(exports: Example) -> None:
    """``after`` gives a client the rows that an interrupted transfer lacks."""
    lines = exports.read("/lines?after=99998").splitlines()
    assert [json.loads(line).get("id") for line in lines] == [99999, 100000, None]


def next_event(feed: http.client.HTTPResponse) -> dict[str, str]:
    """The fields of the next event or comment."""
    lines = iter(lambda: feed.readline().decode().rstrip("\n"), "")
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}


def follow(live: Example, **job: str) -> Iterator[dict[str, str]]:
    """The steps of a job, up to the last one."""
    with live.get("/steps?" + urlencode(job)) as steps:
        while True:
            event = next_event(steps)
            if "data" in event:
                yield event
                if json.loads(event["data"]) == {"step": 20, "of": 20}:
                    return


def test_feed_resumes_with_the_missed_messages(live: Example) -> None:
    """A client that reconnects receives the messages since its last event."""
    with live.get("/feed") as feed:
        assert feed.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert next_event(feed) == {"retry": "1000"}
        assert "data" not in next_event(feed)
        assert live.post("/say", text="<b>Gr\u00fc\u00dfe").status == 204
        first = next_event(feed)
        assert first["data"] == "<b>Gr\u00fc\u00dfe"
    live.post("/say", text="x" * 600)
    with live.get("/feed", **{"Last-Event-ID": first["id"]}) as feed:
        _, first_comment, missed = (next_event(feed) for _ in range(3))
    assert first_comment["id"] == first["id"]
    assert missed["data"] == "x" * 500  # the maximum


def test_steps_of_a_job_can_be_read_from_any_step(live: Example) -> None:
    """Also from its beginning, and after its end."""
    with live.post("/start") as response:
        job: dict[str, str] = json.load(response)
    steps = list(follow(live, **job))
    assert [json.loads(step["data"])["step"] for step in steps] == [*range(1, 21)]
    assert list(follow(live, **job)) == steps
    assert list(follow(live, **job | {"lastEventId": steps[11]["id"]})) == steps[12:]


def test_unknown_job_is_not_found(live: Example) -> None:
    """A client can listen only to jobs, not to other channels."""
    assert live.get("/steps?job=x").status == 404


def test_live_processes_share_their_channels_over_valkey(tmp_path: Path) -> None:
    """Clients of one process receive the events of the other process."""
    for name in "here", "there":
        (tmp_path / name).mkdir()
    with Valkey(tmp_path / "valkey") as valkey:
        url = f"--channels={valkey.url}"
        here = Example(tmp_path / "here", "live", url, "--pause=0.01")
        there = Example(tmp_path / "there", "live", url)
        with there.get("/feed") as feed:
            assert next_event(feed) == {"retry": "1000"}
            next_event(feed)
            here.post("/say", text="hello")
            assert next_event(feed)["data"] == "hello"
        with here.post("/start") as response:
            job = json.load(response)
        assert list(follow(there, **job)) == list(follow(here, **job))
        assert [here.stop(), there.stop()] == [0, 0]


def test_live_page_ends_with_ctrl_c(tmp_path: Path) -> None:
    """It does not wait until its listeners disconnect."""
    example = Example(tmp_path, "live")
    with example.get("/feed") as feed:
        assert next_event(feed) == {"retry": "1000"}
        assert example.stop() == 0
    errors = (tmp_path / "errors").read_text()
    assert "Traceback" not in errors
    assert "still running" not in errors  # waitress logs it after it has waited


class Operator:
    """A user of ``examples/operator_page.py`` who has logged in."""

    def __init__(self, example: Example) -> None:
        self.example = example
        form = {"login": "operator", "password": "secret"}
        with example.post("/login_handler", **form) as response:
            assert response.headers["Location"].endswith("/operator")
            cookie = response.headers["Set-Cookie"]
        assert "SameSite=Lax" in cookie
        self.cookie = cookie.partition(";")[0]

    def get(self, path: str) -> http.client.HTTPResponse:
        return self.example.get(path, Cookie=self.cookie)

    def ask(self, **order: str) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        headers = {"Cookie": self.cookie, **form}
        response = self.example._request(
            "POST", "/operator/ask", urlencode(order), headers
        )
        assert response.status == 204


@pytest.fixture(scope="module")
def operator_pages(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Example, Example]]:
    """Two processes of the example, which share their channels."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as valkey:
        options = f"--channels={valkey.url}", "--password=secret"
        folders = [tmp_path_factory.mktemp("operator") for _ in range(2)]
        here, there = (Example(each, "operator_page", *options) for each in folders)
        yield here, there
        assert [here.stop(), there.stop()] == [0, 0]


def test_operator_page_is_for_operators(
    operator_pages: tuple[Example, Example],
) -> None:
    """Without a login each of its addresses leads to the login form."""
    page, _ = operator_pages
    for path in "/operator", "/operator/answers", "/operator/ask":
        with page.get(path) as response:
            assert response.status == 302
            assert "/login?" in response.headers["Location"]
    for password in "x", "é":
        with page.post("/login_handler", login="operator", password=password) as login:
            assert login.status == 302
            assert "authtkt" not in login.headers.get("Set-Cookie", "")
    operator = Operator(page)
    assert b"<h1>Open streams</h1>" in operator.get("/operator").read()
    assert operator.get("/operator/ask").status == 405  # an order needs a POST


def test_operator_ends_a_stream_of_another_process(
    operator_pages: tuple[Example, Example],
) -> None:
    """The page of one process lists the streams of both, and ends one."""
    here, there = operator_pages
    operator = Operator(here)
    with there.get("/clock") as clock, operator.get("/operator/answers") as answers:
        assert next_event(clock) == {"retry": "1000"}
        assert next_event(answers) == {"retry": "1000"}
        assert "data" not in next_event(answers)
        operator.ask()
        lists = [json.loads(next_event(answers)["data"]) for _ in range(2)]
        assert len({each["process"] for each in lists}) == 2
        streams = {one["path"]: one for each in lists for one in each["streams"]}
        assert streams.keys() == {"/clock", "/operator/answers"}
        assert streams["/clock"]["controller"] == "RootController.clock"
        assert streams["/operator/answers"]["user"] == "operator"
        operator.ask(end=streams["/clock"]["id"])
        assert clock.read().endswith(b"\n\n")  # the end of a complete response
