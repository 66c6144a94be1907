"""Formats of several sources, streams inside of streams, and lengths by formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from tg import TGController, expose

from tests.conftest import MakeApp, Root, assert_clean
from tests.model import Model, User
from tests.wsgi import Call, get
from tgstream import CSV, NDJSON, Report, Stream, StreamError, current_stream, stream


class Sections:
    """A format that encodes a section for each source, and an end."""

    content_type = "text/plain"
    suffix = "txt"

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        yield from (f"{item}\n" for item in items)

    def encode_sources(self, sources: Mapping[str, Any]) -> Iterator[str]:
        for name, source in sources.items():
            yield f"[{name}]\n"
            for batch in source.batches():
                yield "".join(f"{item}\n" for item in batch)
        yield "end\n"


class Members:
    """A format whose items are streams."""

    content_type = "text/plain"

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        for item in items:
            yield from item.encode_member()
        yield b"end"


class Measured:
    """A format that knows the length of a list of bytes."""

    content_type = "text/plain"

    def encode(self, items: Iterable[bytes]) -> Iterator[bytes]:
        return iter(items)

    def measure(self, source: Any) -> int | None:
        return sum(map(len, source)) if isinstance(source, list) else None


class Closing:
    """An iterator of numbers that remembers that it was closed."""

    def __init__(self, count: int) -> None:
        self.numbers = iter(range(count))
        self.closed = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self.numbers)

    def close(self) -> None:
        self.closed = True


def test_mapping_of_sources_is_streamed_in_order(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Generators, lists and statements are read one after the other, and counted."""

    class RootController(TGController):
        @expose()
        @stream(Sections)
        def index(self) -> Any:
            sqlite_model.DBSession.add_all([User(name="ada"), User(name="bob")])
            names = sa.select(User.name).order_by(User.id)
            return {"a": [1, 2], "b": iter("xy"), "users": names, "none": []}

    text = get(make_app(RootController(), sqlite_model)).text
    assert text == "[a]\n1\n2\n[b]\nx\ny\n[users]\n('ada',)\n('bob',)\n[none]\nend\n"
    assert [report.items for report in reports] == [6]
    assert_clean(sqlite_model)


def test_mapping_is_committed_after_its_last_source(
    make_app: MakeApp, sqlite_model: Model
) -> None:
    """The end of the format is sent after the commit, so it never follows a failure."""

    def add(name: str) -> Iterator[str]:
        sqlite_model.DBSession.add(User(name=name))
        yield name

    root = Root(lambda: {"a": add("ada"), "b": add("ada")}, format=Sections)
    call = get(make_app(root, sqlite_model))
    assert call.status.startswith("500")  # a name is unique: the commit failed
    assert "end" not in call.text
    assert_clean(sqlite_model)


@pytest.mark.parametrize("chunk_size", [None, 0])
def test_sources_are_closed_when_the_client_disconnects(
    make_app: MakeApp, chunk_size: int | None
) -> None:
    """Sources that were not reached are closed, too."""
    sources = [Closing(100_000), Closing(3)]
    root = Root(
        lambda: dict(zip("ab", sources, strict=True)),
        format=Sections,
        chunk_size=chunk_size,
    )
    call = Call(make_app(root))
    assert next(call).startswith(b"[a]\n")
    call.close()
    assert [source.closed for source in sources] == [True, True]


def test_source_that_is_not_iterable_is_rejected() -> None:
    """The error names the source."""
    with pytest.raises(TypeError, match=r"^Sections: the source 'b' must be iterable"):
        Stream({"a": [], "b": 5}, Sections)


def test_mapping_for_a_format_of_one_source_is_rejected() -> None:
    """A dict is a page for TurboGears, unless the format takes several sources."""
    with pytest.raises(TypeError, match=r"^Stream: items must be iterable, got dict"):
        Stream({"a": []}, CSV)


def test_stream_is_encoded_inside_of_another_one(
    make_app: MakeApp, sqlite_model: Model, reports: list[Report]
) -> None:
    """Its items are read in the session of the outer stream, with its own format."""

    def members() -> Iterator[Stream]:
        sqlite_model.DBSession.add(User(name="eve"))
        yield Stream(sa.select(User.name).order_by(User.id), CSV(header=()))
        yield Stream([{"a": 1}], NDJSON)
        yield Stream(["x\u00e9"], charset="latin-1", length=2)
        assert current_stream().items == 3

    call = Call(make_app(Root(members, format=Members), sqlite_model))
    assert call.read() == b'eve\r\n{"a":1}\nx\xe9end'
    assert reports[0].items == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stream([], commit="each", limit=3), "cannot have commit, limit"),
        (lambda: Stream([b"abc"], length=2), "sent more than 2 bytes, but length=2"),
    ],
)
def test_member_with_unusable_options_fails(
    make_app: MakeApp,
    reports: list[Report],
    make: Callable[[], Stream],
    message: str,
) -> None:
    """An option of a whole response cannot be an option of a part."""
    call = get(make_app(Root(lambda: iter([make()]), format=Members)))
    assert call.status.startswith("500")
    assert isinstance(reports[0].error, StreamError)
    assert message in str(reports[0].error)


def test_member_that_was_used_twice_fails(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """A stream is read once."""
    member = Stream([b"a"])
    call = get(make_app(Root(lambda: iter([member] * 2), format=Members)))
    assert call.status.startswith("500")
    assert "serves one request" in str(reports[0].error)


def test_member_ends_with_the_stream(make_app: MakeApp) -> None:
    """A client that disconnects inside of a member closes the items of the member."""
    source = Closing(1_000_000)
    root = Root(lambda: iter([Stream(source, NDJSON)]), format=Members)
    call = Call(make_app(root))
    assert next(call).startswith(b"0\n1\n")
    call.close()
    assert source.closed


def test_length_by_the_format_is_declared(make_app: MakeApp) -> None:
    """GET and HEAD have the Content-Length that the format knows."""
    app = make_app(Root(lambda: [b"ab", b"c"] * 2, format=Measured, chunk_size=0))
    assert get(app).headers["Content-Length"] == "6"
    head = Call(app, method="HEAD")
    assert (head.headers["Content-Length"], head.read()) == ("6", b"")
    app = make_app(Root(lambda: iter([b"ab", b"c"]), format=Measured, chunk_size=0))
    assert "Content-Length" not in get(app).headers


@pytest.mark.parametrize(
    ("filename", "sent"),
    [
        ("users", "users.txt"),
        ("users.txt", "users.txt"),
        ("users.tsv", "users.tsv"),
        ("report 2026.11", "report 2026.11.txt"),
        ("v1.2 of users", "v1.2 of users.txt"),
    ],
)
def test_file_name_without_suffix_gets_the_suffix_of_the_format(
    make_app: MakeApp, filename: str, sent: str
) -> None:
    """A suffix that the user has chosen stays."""
    app = make_app(Root(lambda: iter("ab"), format=Sections, filename=filename))
    disposition = f'attachment; filename="{sent}"'
    assert get(app).headers["Content-Disposition"] == disposition
