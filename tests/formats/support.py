"""Items, sources and readers for the tests of the formats."""

from __future__ import annotations

import codecs
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import attrs
import duckdb
import pydantic
import pydantic.v1 as pydantic_v1
import sqlalchemy as sa
from stream_unzip import stream_unzip

from tgstream import SSE


class Batches:
    """A batched source."""

    def __init__(
        self, items: Sequence[Any], fields: Sequence[str] = (), size: int = 3
    ) -> None:
        self.items, self.fields, self.size = items, fields, size

    def batches(self) -> Iterator[Sequence[Any]]:
        for start in range(0, len(self.items), self.size):
            yield self.items[start : start + self.size]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def join(output: Iterable[str | bytes]) -> str:
    """The output of a format as one text."""
    return "".join(p if isinstance(p, str) else bytes(p).decode() for p in output)


def outcome(encode: Callable[[], Iterable[str | bytes]]) -> str:
    """The output of a format, or its error."""
    try:
        return join(encode())
    except (TypeError, ValueError) as error:
        return repr(error)


def read_members(data: bytes) -> dict[str, bytes]:
    """The members as :mod:`zipfile` and as stream-unzip read them, which agree."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert opened.testzip() is None
        members = {info.filename: opened.read(info) for info in opened.infolist()}
    streamed = stream_unzip([data])
    assert members == {name.decode(): b"".join(part) for name, _, part in streamed}
    return members


def query_duckdb(query: str) -> tuple[list[str], list[Any]]:
    """The names and the rows that DuckDB reads."""
    with duckdb.connect() as connection:
        result = connection.sql(query)
        assert result is not None
        return result.columns, result.fetchall()


def sqlite_rows(statement: str, mappings: bool = False) -> list[Any]:
    """The rows of a statement, as ``Row`` or as ``RowMapping``."""
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)
    with engine.connect() as connection:
        result = connection.execute(sa.text(statement))
        return list(result.mappings() if mappings else result)


class Model(pydantic.BaseModel):
    id: int
    name: str = "x"

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return self.id * 2


class OldModel(pydantic_v1.BaseModel):
    id: int
    name: str = "x"


@attrs.define
class Plain:
    id: int
    name: str = "x"


class Message(NamedTuple):
    """An event as a listener receives it."""

    type: str
    data: str
    last_event_id: str


class EventParser:
    """Parses an event stream as a browser does: HTML standard, section 9.2.6."""

    def __init__(self) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.started = self.after_cr = False
        self.line = self.data = self.type = self.id = self.last_event_id = ""
        self.messages: list[Message] = []
        self.retry: int | None = None

    def feed(self, chunk: bytes) -> None:
        """Parse a chunk, which may end anywhere."""
        for character in self.decode(chunk):
            first, self.started = not self.started, True
            if first and character == "\ufeff":
                continue  # one leading byte order mark is ignored
            if character == "\n" and self.after_cr:
                self.after_cr = False
                continue  # the second half of a CRLF
            self.after_cr = character == "\r"
            if character in "\r\n":
                line, self.line = self.line, ""
                self.interpret(line)
            else:
                self.line += character

    def interpret(self, line: str) -> None:
        """Process one line."""
        if line == "":
            self.dispatch()
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            self.process(name, value[1:] if value.startswith(" ") else value)

    def process(self, name: str, value: str) -> None:
        """Process a field."""
        if name == "event":
            self.type = value
        elif name == "data":
            self.data += value + "\n"
        elif name == "id" and "\0" not in value:
            self.id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            self.retry = int(value)

    def dispatch(self) -> None:
        """Dispatch the event, if it is one."""
        self.last_event_id = self.id
        if self.data != "":
            message = Message(self.type or "message", self.data[:-1], self.id)
            self.messages.append(message)
        self.data = self.type = ""


def encode_events(*items: Any) -> bytes:
    """The body of an event stream with these items."""
    return b"".join(SSE().encode(items))


def parse_events(body: bytes) -> EventParser:
    """Parse a body, in which every event is complete."""
    parser = EventParser()
    parser.feed(body)
    assert (parser.line, parser.type, parser.data) == (
        "",
        "",
        "",
    )  # all events are dispatched
    return parser
