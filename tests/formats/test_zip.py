"""The format ZIP: its contents, its names, its sizes, and archives that fail."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import itertools
import os
import random
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
import transaction
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session
from stream_unzip import UnzipError, stream_unzip
from tg import TGController, expose

from tests.conftest import LiveServer, MakeApp, assert_clean
from tests.formats.support import read_members
from tests.live_apps.archives import DATA, LINE
from tests.model import Model, User
from tests.test_servers import BROKEN, Client, curl
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, ZIP, Report, Stream, commit, copy, rows, stream
from tgstream.core.headers import make_content_disposition
from tgstream.formats.filenames import clean_path

quick = settings(deadline=None, database=None, max_examples=200)


class Root(TGController):
    """A controller that streams what ``make`` returns.

    :param format: the format.
    :param options: the options of the stream.
    """

    def __init__(
        self, make: Callable[[], Any], format: Any = ZIP, **options: Any
    ) -> None:
        self.make, self.format, self.options = make, format, options
        expose()(Root.index)

    def index(self) -> Any:
        return Stream(self.make(), self.format, **self.options)


class Closable:
    """An iterable of chunks that counts how often it is closed."""

    def __init__(self, chunks: Any) -> None:
        self.chunks, self.closed = chunks, 0

    def __iter__(self) -> Iterator[Any]:
        yield from self.chunks

    def close(self) -> None:
        self.closed += 1


def encode(*items: Any, compress: bool = True) -> bytes:
    """The bytes of an archive."""
    return b"".join(ZIP(compress).encode(items))


def opens(data: bytes) -> bool:
    """Whether :mod:`zipfile` or stream-unzip takes an archive as complete."""
    try:
        zipfile.ZipFile(io.BytesIO(data)).close()
        return True
    except zipfile.BadZipFile:
        pass
    try:
        for _, _, chunks in stream_unzip([data]):
            for _ in chunks:
                pass
    except UnzipError:
        return False
    return True


def read_until_error(call: Call) -> tuple[bytes, BaseException]:
    """Read a body that fails. Return its bytes up to the error, and the error."""
    received = b""
    with pytest.raises(Exception) as failure:
        for chunk in call:
            received += chunk
    call.close()
    return received, failure.value


def fail() -> None:
    raise LookupError("at the end")


# Contents.


@pytest.mark.parametrize("compress", [True, False])
def test_member_has_its_content(tmp_path: Path, compress: bool) -> None:
    """Each kind of content, whether it is compressed or not."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    file = io.BytesIO(b"skipped" + DATA)
    file.seek(7)
    items = [
        ("bytes", DATA),
        ("bytearray", bytearray(DATA)),
        ("view", memoryview(DATA)[::-2]),
        ("text", "ä☃"),
        ("empty", ""),
        ("path", path),
        ("file", path.open("rb")),
        ("unbuffered", path.open("rb", buffering=0)),
        ("memory", file),
        ("gzip", gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(DATA)))),
    ]
    expected = {name: DATA for name, _ in items}
    expected |= {"view": DATA[::-2], "text": "ä☃".encode(), "empty": b""}
    assert read_members(encode(*items, compress=compress)) == expected


def test_member_may_have_an_unknown_size(tmp_path: Path) -> None:
    """Of iterables, and of files without ``seek()``, also without compression."""
    read, write = os.pipe()
    os.write(write, b"from a pipe")
    os.close(write)
    items = [
        ("list", [b"a", bytearray(b"b"), b"", memoryview(b"c")]),
        ("generator", (chunk for chunk in [DATA, b"end"])),
        ("pipe", open(read, "rb")),  # noqa: SIM115
    ]
    data = encode(*items, compress=False)
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert {info.compress_type for info in opened.infolist()} == {0}
        assert [opened.read(name) for name in opened.namelist()] == [
            b"abc",
            DATA + b"end",
            b"from a pipe",
        ]


@pytest.mark.parametrize("compress", [True, False])
def test_streams_are_members(
    make_app: MakeApp, model: Model, session: Session, compress: bool
) -> None:
    """Each is encoded by its own format, in the transaction of the running stream."""
    session.add_all(User(name=name) for name in "abc")
    session.commit()
    query = sa.select(User.id, User.name).order_by(User.id)

    def items() -> Iterator[Any]:
        model.DBSession.add(User(name="new"))
        yield "users.csv", Stream(rows(query), CSV)
        yield "users.ndjson", Stream(query, NDJSON)
        yield "copy.csv", copy(query)
        yield "raw.txt", Stream(["ä", b"\xff"], charset="latin-1")
        yield "inner.zip", Stream([("a", Stream(query, CSV(header=())))], ZIP)
        yield "empty.csv", Stream(query.where(sa.false()), CSV)

    call = Call(make_app(Root(items, ZIP(compress)), model))
    members = read_whole(call.read())
    ids = [user.id for user in session.scalars(sa.select(User).order_by(User.id))]
    session.rollback()
    lines = [f"{id},{name}\r\n" for id, name in zip(ids, [*"abc", "new"], strict=True)]
    assert members["users.csv"].decode() == "id,name\r\n" + "".join(lines)
    assert members["users.ndjson"].count(b"\n") == 4
    assert members["copy.csv"].splitlines() == members["users.csv"].splitlines()
    assert members["raw.txt"] == b"\xe4\xff"
    assert read_whole(members["inner.zip"]) == {"a": "".join(lines).encode()}
    assert members["empty.csv"] == b"id,name\r\n"
    assert_clean(model)


def read_whole(data: bytes) -> dict[str, bytes]:
    """The members as :mod:`zipfile` reads them."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert opened.testzip() is None
        return {name: opened.read(name) for name in opened.namelist()}


def test_rows_of_two_columns_are_members(make_app: MakeApp, model: Model) -> None:
    """A statement of names and contents is an archive."""
    query = sa.text("SELECT 'a.txt' AS name, 'text' AS content")
    call = Call(make_app(Root(lambda: rows(query)), model))
    assert read_members(call.read()) == {"a.txt": b"text"}


def test_response_has_the_headers_of_a_zip(make_app: MakeApp) -> None:
    """The name of the file gets its suffix."""
    call = Call(make_app(Root(lambda: [("a", b"a")], filename="users")))
    assert call.headers["Content-Type"] == "application/zip"
    assert call.headers["Content-Disposition"] == make_content_disposition("users.zip")
    assert read_members(call.read()) == {"a": b"a"}


def test_archive_without_members_opens(make_app: MakeApp) -> None:
    """It is the 22 bytes of the end of the central directory."""
    for compress in (True, False):
        call = Call(make_app(Root(lambda: [], ZIP(compress))))
        assert read_members(call.read()) == {}


def test_equal_items_give_equal_bytes(tmp_path: Path) -> None:
    """A path has the time of its file, and all other members have a fixed time."""
    (tmp_path / "file").write_bytes(DATA)
    os.utime(tmp_path / "file", (0, 1_234_567_890))

    def make() -> bytes:
        return encode(("a", DATA), ("b", iter([DATA])), ("c", tmp_path / "file"))

    data = make()
    assert make() == data
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        times = [info.date_time for info in opened.infolist()]
    fixed = (1980, 1, 1, 0, 0, 0)
    assert times == [fixed, fixed, (2009, 2, 13, 23, 31, 30)]
    os.utime(tmp_path / "file", (0, 1_334_567_890))
    assert make() != data


# Invalid items.


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (b"a", "item 2 must be a pair of a name and a content"),
        ("ab", "item 2 must be a pair .* got str: 'ab'"),
        (("a", b"", 1), "item 2 must be a pair"),
        ((b"a", b""), "item 2: the name must be a str, got bytes: b'a'"),
        ((b"a", b"", 1), "item 2 must be a pair"),
        ({"a": b""}, "item 2 must be a pair .* got dict"),
        (("a.txt", 5), "item 2, 'a.txt' must have bytes, text, .* got int: 5"),
        (("a.txt", None), "item 2, 'a.txt' must have .* got NoneType"),
        (("a.txt", {"b": 1}), "item 2, 'a.txt' must have .* got dict"),
        (
            ("a.csv", rows(sa.select(1))),
            r"got Rows: .* pass Stream\(rows\(...\), CSV\)",
        ),
        (("a.csv", sa.select(1)), r"got Select: .* pass Stream\(rows\(...\), CSV\)"),
        (("a.csv", [(1, 2)]), r"item 2, 'a.csv' yielded tuple: \(1, 2\), but a member"),
        (("a.txt", ["text"]), "item 2, 'a.txt' yielded str: 'text', but a member must"),
        (("a.txt", io.StringIO("a")), "item 2, 'a.txt' is a text file. Open it with"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_invalid_item_is_named(item: Any, message: str) -> None:
    """The error has its number, the name of the member, and the type and value."""
    with pytest.raises(TypeError, match=message):
        encode(("first", b"x"), item)
    assert ZIP(compress=False).measure([("first", b"x"), item]) is None or item[0] == 0


def test_text_that_cannot_be_encoded_is_named() -> None:
    """A single surrogate."""
    with pytest.raises(UnicodeEncodeError, match=r"in item 1, 'a.txt'. Replace the"):
        encode(("a.txt", "x\ud800"))


@pytest.mark.parametrize("compress", [True, False])
def test_path_that_cannot_be_opened_is_named(tmp_path: Path, compress: bool) -> None:
    """The type of the error is that of ``open()``."""
    with pytest.raises(FileNotFoundError, match="item 1, 'a': No such file") as error:
        encode(("a", tmp_path / "missing"), compress=compress)
    assert error.value.filename == str(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="item 1, 'folder': Is a directory"):
        encode(("folder/", tmp_path), compress=compress)
    assert ZIP(compress=False).measure([("a", tmp_path / "missing")]) is None


@pytest.mark.parametrize(
    "names",
    [
        ("a.txt", "a.txt"),
        ("a.txt", "A.TXT"),
        ("ä/a.txt", "a\u0308/a.txt"),
        ("a.txt", "/a.txt"),
        ("a.txt", "../a.txt\0"),
        ("a?", "a*"),
        ("", ".."),
    ],
)
def test_duplicate_name_is_rejected(names: tuple[str, str]) -> None:
    """Names are compared as they are written, and without case."""
    for streamed in False, True:
        file = io.BytesIO(b"x")
        content = Stream(file) if streamed else file
        with pytest.raises(ValueError, match=r"item 3, '.*': item 2 has the same name"):
            encode(("other", b""), (names[0], b""), (names[1], content))
        assert file.closed


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a/b"),
        ("a/b", "a"),
        ("a/b/c/d", "A/B"),
        ("ä", "a\u0308/b/c"),
        ("a/b", "a/c", "a/b/d/e"),
        ("a/b/c", "a/b/d", "a/b"),
    ],
)
def test_name_of_a_folder_is_rejected_for_a_file(names: tuple[str, ...]) -> None:
    """unzip and 7z cannot extract such an archive."""
    last = len(names)
    message = rf"item {last}, '.*': one name is a file and a folder, here and in item 1"
    with pytest.raises(ValueError, match=message):
        encode(*((name, b"") for name in names))
    encode(("a/b", b""), ("a/b.c", b""), ("b/a", b""), ("a/c/b", b""), ("a/c/d", b""))


def test_compress_must_be_a_bool() -> None:
    """A level of compression is not one."""
    with pytest.raises(TypeError, match="compress must be True or False, got int: 9"):
        ZIP(9)  # type: ignore[arg-type]


def test_missing_package_is_reported_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error comes when the format is made, which is before any request."""
    monkeypatch.setitem(sys.modules, "zipstream", None)
    with pytest.raises(ImportError, match=r"pip install 'tgstream\[zip\]'"):
        stream(ZIP)


# Names.


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("a/b/c.txt", "a/b/c.txt"),
        ("a\\b\\c.txt", "a/b/c.txt"),
        ("/etc/passwd", "etc/passwd"),
        ("//server/share/a", "server/share/a"),
        ("../../etc/passwd", "etc/passwd"),
        ("a/../../b", "a/b"),
        ("a/.. /b", "a/b"),
        ("a/.\u200b./b", "a/b"),
        ("a//./b/", "a/b"),
        ("C:\\Windows\\a.txt", "C_/Windows/a.txt"),
        ("C:a.txt", "C_a.txt"),
        ("a.txt:stream", "a.txt_stream"),
        ("a\0.exe", "a.exe"),
        ("a\r\n\x1b[2J.txt", "a[2J.txt"),
        ("a\u202etxt.exe", "atxt.exe"),
        ("\u2066nul\u2069/con.txt/aux", "_nul/_con.txt/_aux"),
        ('a<b>"c"|?*', "a_b__c____"),
        ("x" * 300 + ".csv/" + "ä" * 300, "x" * 196 + ".csv/" + "ä" * 100),
        ("x\ud800.txt", "x.txt"),
        ("", "download"),
        ("../..", "download"),
        ("数据/☃.txt", "数据/☃.txt"),
    ],
)
def test_name_is_cleaned(name: str, cleaned: str) -> None:
    """Folders are kept, and everything that a system could misread is removed."""
    assert clean_path(name) == cleaned
    assert [*read_members(encode((name, b"x")))] == [cleaned]


TRICKY = '../\\:*?"<>| \0\r\n\x7f\xa0\u200b\u202e\u2028\ufeff\ud800ä数conCNUL1'


@quick
@given(st.text(st.sampled_from(TRICKY) | st.characters(), max_size=40))
def test_any_text_makes_a_harmless_name(name: str) -> None:
    """It stays below the folder that the archive is extracted into, on any system."""
    cleaned = clean_path(name)
    assert clean_path(cleaned) == cleaned
    assert not re.search(r'[\\:*?"<>|\x00-\x1f\x7f]', cleaned)
    for part in cleaned.split("/"):
        assert part.strip(" .") == part != ""
        assert len(part.encode()) <= 201
    assert read_members(encode((name, b"x"))) == {cleaned: b"x"}


def test_name_that_is_too_long_for_a_zip_is_rejected() -> None:
    """A name has two bytes for its length."""
    name = "/".join(["x" * 200] * 330)
    with pytest.raises(ValueError, match=r"item 1, 'x+: a name may have 65535 bytes"):
        encode((name, b""))
    assert ZIP(compress=False).measure([(name, b"")]) is None


# Sizes.


def test_measured_size_is_that_of_the_archive(tmp_path: Path) -> None:
    """For contents whose sizes are known."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    items = [
        ("a", b"text"),
        ("b/ä", "ä☃"),
        ("c", path),
        ("d", path.open("rb")),
        ("e", io.BytesIO(DATA)),
        ("f", memoryview(DATA)[::2]),
        ("g", b""),
    ]
    size = ZIP(compress=False).measure(items)
    assert size == len(encode(*items, compress=False))


@pytest.mark.parametrize(
    "source",
    [
        iter([("a", b"a")]),
        [("a", iter([b"a"]))],
        [("a", b"a"), ("b", Stream([b"b"]))],
        [("a", b"a"), "b"],
        [("a", Path("/missing"))],
        [("a", Path("/dev/null"))],
        [("a", 5)],
    ],
    ids=["generator", "iterable", "Stream", "item", "missing", "device", "content"],
)
def test_unknown_size_gives_no_length(source: Any) -> None:
    """A generator would have to run first, and an error is raised by ``encode()``."""
    assert ZIP(compress=False).measure(source) is None
    assert ZIP().measure([("a", b"a")]) is None


class WithReadme(ZIP):
    """A format that adds a member."""

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        return super().encode(itertools.chain(items, [("readme.txt", b"text")]))


def test_subclass_with_its_own_encode_has_no_length(make_app: MakeApp) -> None:
    """The size of the items alone would be wrong."""
    source = lambda: [("a", b"a")]  # noqa: E731
    call = Call(make_app(Root(source, format=WithReadme(compress=False))))
    names = zipfile.ZipFile(io.BytesIO(call.read())).namelist()
    assert names == ["a", "readme.txt"]


@pytest.fixture(scope="module", params=["waitress", "gunicorn-gthread"])
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """A server of archives."""
    live = LiveServer(request.param, "archives")
    yield live
    live.kill()


def test_response_has_its_length(server: LiveServer, tmp_path: Path) -> None:
    """The exact number of bytes, for GET and for HEAD."""
    path = f"/known?path={quote(str(tmp_path / 'made'))}"
    client = Client(server, path)
    length = int(client.response.headers["Content-Length"])
    body = client.response.read()
    client.close()
    assert len(body) == length
    members = read_members(body)
    assert members["stream.csv"] == LINE * 5000
    assert members["path"] == members["file"] == DATA * 3
    assert members["memory"] == members["bytes"] == DATA
    status, again = curl(server, path)
    assert (status, len(again)) == (0, length)  # the file has another time
    connection = http.client.HTTPConnection("127.0.0.1", server.port, 20)
    connection.request("HEAD", path)
    assert int(connection.getresponse().headers["Content-Length"]) == length
    connection.close()


@pytest.mark.parametrize("difference", [-1, 1])
def test_stream_of_another_length_aborts(server: LiveServer, difference: int) -> None:
    """The declared length of a member is part of the length of the response."""
    path = f"/wrong?length={5000 * len(LINE) + difference}"
    client = Client(server, path)
    with pytest.raises(BROKEN):
        client.response.read()
    client.close()
    status, body = curl(server, path)
    assert status in (18, 56)  # partial file, reset
    assert not opens(body)


@pytest.mark.parametrize("end", ["raise", "commit"])
def test_failed_archive_is_incomplete(server: LiveServer, end: str) -> None:
    """The transfer is aborted, and no reader opens the bytes that have arrived."""
    client = Client(server, f"/failing?end={end}")
    assert client.response.status == 200
    with pytest.raises(BROKEN):
        client.response.read()
    client.close()
    status, body = curl(server, f"/failing?end={end}")
    assert status == 18
    assert len(body) > len(DATA)
    assert not opens(body)
    body = curl(server, "/failing?end=")[1]
    assert [*read_members(body)] == ["first.bin", "second.bin"]


@pytest.mark.parametrize("size", [1000, len(DATA) * 8 + 1], ids=["shrinks", "grows"])
def test_file_that_changes_its_size_aborts(
    make_app: MakeApp, reports: list[Report], tmp_path: Path, size: int
) -> None:
    """While it is read, if the response has declared its length."""
    path = tmp_path / "file"
    path.write_bytes(DATA * 8)
    app = make_app(Root(lambda: [("a", b"a"), ("file", path)], ZIP(compress=False)))
    call = Call(app)
    assert call.headers["Content-Length"]
    first = next(iter(call))
    with path.open("ab") as file:
        file.truncate(size)
    received, error = read_until_error(call)
    assert re.search(r"'file' has (more|fewer) than 2048000 bytes", str(error))
    assert not opens(first + received)
    assert [report.reason for report in reports] == ["failed"]


def test_file_that_changes_its_size_is_compressed_as_it_is(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """A file that is written to, such as a log, can be a member of any archive."""
    path = tmp_path / "file"
    path.write_bytes(DATA * 8)
    call = Call(make_app(Root(lambda: [("a", b"a"), ("file", path)])))
    first = next(iter(call))
    with path.open("ab") as file:
        file.truncate(len(DATA) * 2)
    assert read_members(first + call.read()) == {"a": b"a", "file": DATA * 2}


# Archives that end early.


def test_cut_archive_is_not_opened() -> None:
    """Cut at the parts of each member, and at hundreds of other places.

    stream-unzip does not read the central directory. It reads all members of an archive
    that is cut there, which is after the commit.
    """
    generator = random.Random(1)
    data = encode(
        *((f"folder/{n}.bin", generator.randbytes(n * 500)) for n in range(20)),
        ("text.csv", LINE * 2000),
    )
    central = data.index(b"PK\1\2")
    signatures = re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x07\x08)", data)
    places = {match.start() + n for match in signatures for n in (-1, 0, 1, 4)}
    places |= {generator.randrange(len(data)) for _ in range(300)}
    places |= {*range(central, len(data))}
    for place in places - {-1, len(data)}:
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(io.BytesIO(data[:place]))
        if place < central + 4:
            assert not opens(data[:place]), place
    assert opens(data)


@pytest.mark.parametrize("database", ["no database", "database"])
def test_archive_of_a_failed_commit_is_not_opened(
    make_app: MakeApp, sqlite_model: Model, database: str
) -> None:
    """The central directory is made after the last commit."""

    def items() -> Iterator[Any]:
        transaction.get().addBeforeCommitHook(fail)
        for number in range(20):
            yield f"{number}.bin", DATA

    model = sqlite_model if database == "database" else None
    call = Call(make_app(Root(items), model, tm__enabled=True))
    received, error = read_until_error(call)
    assert isinstance(error, LookupError)
    assert len(received) > 19 * len(DATA)
    assert not opens(received)
    assert b"PK\1\2" not in received


def test_each_member_has_its_commit(make_app: MakeApp, sqlite_model: Model) -> None:
    """``commit='each'`` commits when a member is complete."""

    def items() -> Iterator[Any]:
        for number in range(3):
            sqlite_model.DBSession.add(User(name=f"user {number}"))
            yield f"{number}.bin", DATA
        fail()

    app = make_app(Root(items, commit="each", chunk_size=0), sqlite_model)
    read_until_error(Call(app))
    with Session(sqlite_model.outside) as session:
        assert session.scalar(sa.select(sa.func.count(User.id))) in (2, 3)


@pytest.mark.parametrize("end", ["end", "error", "client"])
def test_contents_are_closed_at_each_end(
    make_app: MakeApp, tmp_path: Path, end: str
) -> None:
    """At the end, after an error, and when the client disconnects."""
    (tmp_path / "file").write_bytes(DATA)
    closed: list[str] = []

    def make_chunks() -> Iterator[bytes]:
        try:
            for _ in range(20):
                yield DATA
            if end == "error":
                fail()
        finally:
            closed.append("generator")

    file = (tmp_path / "file").open("rb")
    closable, stream_file = Closable([DATA]), (tmp_path / "file").open("rb")
    last = Closable(make_chunks())

    def items() -> Iterator[Any]:
        yield "file", file
        yield "closable", closable
        yield "stream", Stream(stream_file)
        yield "generator", make_chunks()
        yield "last", last

    call = Call(make_app(Root(items)))
    if end == "end":
        call.read()
        assert (closed, last.closed) == (["generator"] * 2, 1)
    else:
        for number, _ in enumerate(call) if end == "client" else ():
            if number == 25:
                break
        call.close() if end == "client" else read_until_error(call)
        assert closed == ["generator"]
    assert file.closed and stream_file.closed
    assert closable.closed == 1


def test_content_is_opened_at_its_turn(make_app: MakeApp, tmp_path: Path) -> None:
    """An archive of many paths has one open file."""
    paths = [tmp_path / str(number) for number in range(5)]
    open_files: list[list[str]] = []

    def items() -> Iterator[Any]:
        for path in paths:
            open_files.append([n for n in find_open_files() if str(tmp_path) in n])
            path.write_bytes(DATA)
            yield path.name, path

    assert len(read_members(Call(make_app(Root(items))).read())) == 5
    assert open_files == [[]] * 5


def find_open_files() -> Iterator[str]:
    """The names of the files that this process has opened."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of listdir() itself
            yield os.readlink(f"/proc/self/fd/{number}")


def test_generator_may_commit_between_members(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The functions of a running stream work in the generator, and in a content."""

    def make_content() -> Iterator[bytes]:
        commit()
        yield b"committed"

    def items() -> Iterator[Any]:
        sqlite_model.DBSession.add(User(name="a"))
        yield "a", make_content()
        fail()

    app = make_app(Root(items), sqlite_model)
    assert get(app).status.startswith("500")
    with Session(sqlite_model.outside) as session:
        assert session.scalar(sa.select(User.name)) == "a"
