"""The last data of a stream, which shows how it ended: ``done`` and ``failed``."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import transaction
from webob.request import DisconnectionError

from tests.compressed import decompress
from tests.conftest import MakeApp, Root, assert_clean
from tests.core.support import pull
from tests.formats.support import Message, parse_events, read_members
from tests.model import Model, User
from tests.turbogears.support import WIRINGS, without_guard
from tests.wsgi import Call, get
from tgstream import (
    CSV,
    NDJSON,
    SSE,
    ZIP,
    Channel,
    Event,
    Report,
    Stream,
    StreamError,
    current_stream,
    drain,
    listen,
)

EVENTS = SSE(done="done", failed="failed")
LINES = NDJSON(end=True)
ID = "[0-9a-f]{16}"
FAILED_LINE = rf'{{"end":false,"incident":"({ID})"}}\n'
FAILED_EVENT = rf"event: failed\ndata: ({ID})\n\n"


def fail(count: int = 2) -> Iterator[str]:
    """Yield some items, and then fail."""
    for number in range(count):
        yield f"item {number}"
    raise LookupError("a secret")


def read_failed(call: Call, error: type[BaseException] = LookupError) -> bytes:
    """Return the data that a server gets before the error, and close the body."""
    chunks: list[bytes] = []
    with pytest.raises(error):
        for chunk in call:
            chunks.append(chunk)
    call.close()
    return b"".join(chunks)


def messages(data: bytes) -> list[Message]:
    """The events that a browser dispatches."""
    return parse_events(data).messages


# Complete streams.


@pytest.mark.parametrize("count", [0, 1, 3])
def test_complete_stream_ends_with_its_done_event(
    make_app: MakeApp, count: int
) -> None:
    """Its data is the number of items."""
    call = get(make_app(Root(lambda: ["a"] * count, format=EVENTS)))
    assert messages(call.text.encode()) == [
        *[("message", "a", "")] * count,
        ("done", str(count), ""),
    ]


@pytest.mark.parametrize("commit", ["each", 2, "end"])
def test_done_event_is_sent_after_the_final_commit(
    make_app: MakeApp, model: Model, commit: Any
) -> None:
    """When the client has the event, all changes are stored."""

    def items() -> Iterator[str]:
        for name in "ada", "bob", "eve":
            model.DBSession.add(User(name=name))
            yield name
        model.DBSession.add(User(name="joe"))

    call = Call(make_app(Root(items, format=EVENTS, commit=commit), model))
    for chunk in call:
        if b"event: done" in chunk:
            assert model.names() == ["ada", "bob", "eve", "joe"]
            break
    else:
        raise AssertionError
    assert chunk.endswith(b"event: done\ndata: 3\n\n")
    call.close()
    assert_clean(model)


def test_done_event_in_the_form_of_openai_has_no_type(make_app: MakeApp) -> None:
    """It is the line that ends the streams of OpenAI, without a number."""
    call = get(make_app(Root(lambda: [{"a": 1}], format=SSE(done="[DONE]"))))
    assert call.text == 'data: {"a":1}\n\ndata: [DONE]\n\n'


# Failed streams.


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (EVENTS, rf"data: item 0\n\ndata: item 1\n\n{FAILED_EVENT}"),
        (LINES, rf'"item 0"\n"item 1"\n{FAILED_LINE}'),
    ],
    ids=["events", "lines"],
)
def test_failed_stream_reports_an_incident_that_the_log_has(
    make_app: MakeApp,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    wiring: dict[str, Any],
    format: Any,
    expected: str,
) -> None:
    """The transfer is aborted after it. The data does not have the error's text."""
    call = Call(make_app(Root(fail, format=format, chunk_size=0), **wiring))
    data = read_failed(call)
    found = re.fullmatch(expected, data.decode())
    assert found
    [report] = reports
    assert (report.reason, report.incident) == ("failed", found[1])
    assert (report.chunks, report.bytes) == (3, len(data))
    [line] = [record for record in caplog.records if record.name == "tgstream"]
    assert line.levelname == "ERROR"
    assert f" failed (incident {found[1]}): 2 items" in line.getMessage()
    assert line.exc_info and line.exc_info[1] is report.error


@pytest.mark.parametrize("wiring", WIRINGS)
def test_failure_is_reported_without_the_guard(
    make_app: MakeApp, wiring: dict[str, Any]
) -> None:
    """An application that was made before the import of tgstream has no guard."""
    app = without_guard(make_app(Root(fail, format=EVENTS), **wiring))
    data = read_failed(Call(app, checked=False))
    assert re.search(FAILED_EVENT + r"\Z", data.decode())


def test_each_failure_has_its_own_incident(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Two requests that fail have different ids."""
    app = make_app(Root(fail, format=EVENTS))
    for _ in range(2):
        read_failed(Call(app))
    assert len({report.incident for report in reports}) == 2


def test_changes_are_rolled_back_before_the_failure_is_sent(
    make_app: MakeApp, model: Model
) -> None:
    """A client that reads slowly holds no connection of a failed stream."""

    def items() -> Iterator[str]:
        for name in "ada", "bob":
            model.DBSession.add(User(name=name))
            model.DBSession.flush()
            yield name
        model.DBSession.add(User(name="eve"))
        raise LookupError

    call = Call(make_app(Root(items, format=EVENTS), model))
    assert [next(call), next(call)] == [b"data: ada\n\n", b"data: bob\n\n"]
    assert pull(call).startswith(b"event: failed\n")
    assert_clean(model)
    assert model.names() == ["ada", "bob"]
    with pytest.raises(LookupError):
        next(call)
    call.close()


def test_server_that_closes_after_the_failure_gets_no_error(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The stream has ended, so there is one report."""
    call = Call(make_app(Root(fail, format=EVENTS)))
    assert b"failed" in [next(call) for _ in range(3)][-1]
    call.close()
    assert [report.reason for report in reports] == ["failed"]


def test_failure_before_the_first_chunk_is_an_error_page(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """Such a response has another status, and no event."""
    for format in EVENTS, LINES:
        call = get(make_app(Root(lambda: fail(0), format=format)))
        assert call.status.startswith("500 ")
        assert "incident" not in call.text
        assert "failed" not in call.text
    assert [report.incident for report in reports] == [None, None]


class FailingCommit:
    """A data manager whose commit fails."""

    transaction_manager = transaction.manager

    def abort(self, transaction: Any) -> None:
        pass

    tpc_begin = commit = tpc_finish = tpc_abort = abort

    def tpc_vote(self, transaction: Any) -> None:
        raise LookupError("no commit")

    def sortKey(self) -> str:
        return "failing"


@pytest.mark.parametrize("format", [EVENTS, LINES], ids=["events", "lines"])
def test_failure_of_the_final_commit_is_reported(
    make_app: MakeApp, model: Model, format: Any
) -> None:
    """The stream is not done, although its generator has ended."""

    def items() -> Iterator[str]:
        yield "a"
        model.DBSession.add(User(name="ada"))
        transaction.get().join(FailingCommit())

    call = Call(make_app(Root(items, format=format, chunk_size=0), model))
    data = read_failed(call).decode()
    assert re.search(f"({FAILED_EVENT}|{FAILED_LINE})" + r"\Z", data)
    assert "done" not in data
    assert '"end":true' not in data
    assert model.names() == []
    assert_clean(model)


@pytest.mark.parametrize("format", [EVENTS, LINES], ids=["events", "lines"])
def test_item_that_cannot_be_encoded_is_reported(
    make_app: MakeApp, format: Any
) -> None:
    """A failure of the format is a failure of the stream."""
    call = Call(make_app(Root(lambda: ["a", object()], format=format, chunk_size=0)))
    data = read_failed(call, TypeError).decode()
    assert re.search(f"({FAILED_EVENT}|{FAILED_LINE})" + r"\Z", data)


def test_buffered_lines_are_not_sent_before_the_failure(make_app: MakeApp) -> None:
    """As without ``end``, a client gets the chunks that were made before."""

    def items() -> Iterator[str]:
        yield "x" * 40_000
        yield "buffered"
        raise LookupError

    data = read_failed(Call(make_app(Root(items, format=LINES)))).decode()
    assert re.fullmatch(rf'"x{{40000}}"\n{FAILED_LINE}', data)


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit])
def test_error_that_would_stop_the_thread_is_reported(
    make_app: MakeApp, error: type[BaseException]
) -> None:
    """The server gets a ``StreamError`` in its place."""

    def items() -> Iterator[str]:
        yield "a"
        raise error

    with ThreadPoolExecutor(1) as thread:
        call = Call(make_app(Root(items, format=EVENTS)))
        data = thread.submit(read_failed, call, StreamError).result()
    assert re.search(FAILED_EVENT, data.decode())


def test_interrupt_reaches_the_server_without_a_last_chunk(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """A write to a slow client must not delay Ctrl-C."""

    def items() -> Iterator[str]:
        yield "a"
        raise KeyboardInterrupt

    call = Call(make_app(Root(items, format=EVENTS)))
    assert read_failed(call, KeyboardInterrupt) == b"data: a\n\n"
    assert reports[0].incident is None


def test_client_that_disconnected_gets_no_failure(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """An upload that was cut ends the stream, and is not a failure."""

    def items() -> Iterator[str]:
        yield "a"
        raise DisconnectionError("cut")

    call = Call(make_app(Root(items, format=EVENTS)))
    assert read_failed(call, ConnectionResetError) == b"data: a\n\n"
    assert (reports[0].reason, reports[0].incident) == ("disconnected", None)


# Streams that tgstream ends early.


@pytest.mark.parametrize("heartbeat", [None, 10], ids=["plain", "heartbeat"])
@pytest.mark.parametrize("reason", ["expired", "drained"])
@pytest.mark.parametrize("returns", [True, False], ids=["returns", "goes on"])
@pytest.mark.parametrize("count", [1, 100])
def test_stream_that_ends_early_has_neither_event(
    make_app: MakeApp,
    next_report: Callable[[], Report],
    heartbeat: float | None,
    reason: str,
    returns: bool,
    count: int,
) -> None:
    """Browsers must reconnect, also if the generator has seen that its stream ends."""
    waits = threading.Event()

    def items() -> Iterator[str]:
        yield from ["a"] * count
        while not current_stream().ending:
            waits.set()
        if not returns:
            yield "b"
            raise AssertionError

    format = SSE(heartbeat, done="done", failed="failed")
    seconds = 0.1 if reason == "expired" else None
    call = Call(make_app(Root(items, format=format, max_seconds=seconds)))
    with ThreadPoolExecutor(1) as thread:
        body = thread.submit(call.read)
        if reason == "drained":
            assert waits.wait(10)
            drain()
        received = [message.data for message in messages(body.result(10))]
    assert received == ["a"] * count + ([] if returns else ["b"])
    assert next_report().reason == reason


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("others", [(), ("other",)], ids=["alone", "merged"])
def test_listener_that_is_too_far_behind_is_not_done(
    make_app: MakeApp, reports: list[Report], filters: bool, others: tuple[str, ...]
) -> None:
    """The browser must reconnect, also if a generator has chosen the events."""
    channel = Channel(f"lagging {filters} {others}")

    def items() -> Iterator[Event]:
        events = listen(channel, *others)
        return (e for e in events if e.id) if filters else events

    app = make_app(Root(items, format=EVENTS), tgstream__channel_history="2")
    call = Call(app)
    next(call)
    for number in range(9):
        channel.publish(number)
    assert messages(call.read()) == []
    assert [report.reason for report in reports] == ["lagged"]


def test_lines_of_a_listener_that_is_too_far_behind_are_incomplete(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The last record of a complete stream would be wrong."""
    channel = Channel("lagging lines")
    app = make_app(
        Root(channel.listen, format=LINES, chunk_size=0),
        tgstream__channel_history="2",
    )
    call = Call(app)
    next(call)
    for number in range(9):
        channel.publish(number)
    data = read_failed(call, StreamError)
    assert b'"end"' not in data
    assert [report.reason for report in reports] == ["lagged"]


def test_expired_lines_have_no_last_record(
    make_app: MakeApp, next_report: Callable[[], Report]
) -> None:
    """The transfer is aborted, and no incident is logged."""

    def items() -> Iterator[str]:
        yield "a"
        while not current_stream().ending:
            pass
        yield "b"
        raise AssertionError

    root = Root(items, format=LINES, max_seconds=0.05, chunk_size=0)
    data = read_failed(Call(make_app(root)), StreamError)
    assert b'"end"' not in data
    report = next_report()
    assert (report.reason, report.incident) == ("expired", None)


# Other options.


@pytest.mark.parametrize("format", [EVENTS, LINES], ids=["events", "lines"])
@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_compressed_failure_can_be_read(
    make_app: MakeApp, format: Any, coding: str
) -> None:
    """It is flushed before the abort, and the coding is not ended."""
    root = Root(fail, format=format, compress=True, chunk_size=0)
    call = Call(make_app(root), HTTP_ACCEPT_ENCODING=coding)
    data, finished = decompress(coding, [read_failed(call)])
    assert re.search(f"({FAILED_EVENT}|{FAILED_LINE})" + r"\Z", data.decode())
    assert not finished


def test_failure_of_a_waiting_generator_is_reported(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """With ``heartbeat``, the generator runs on its own thread."""
    go = threading.Event()

    def items() -> Iterator[str]:
        yield "a"
        assert go.wait(10)
        raise LookupError

    call = Call(make_app(Root(items, format=SSE(0.02, failed="failed"))))
    assert [next(call), next(call)] == [b"data: a\n\n", b":\n\n"]
    go.set()
    data = read_failed(call).decode()
    assert re.search(FAILED_EVENT + r"\Z", data)


def test_waiting_generator_that_ends_is_done(make_app: MakeApp) -> None:
    """With ``heartbeat``, the event is the last data too."""
    format = SSE(10, done="done", failed="failed")
    call = get(make_app(Root(lambda: ["a", "b"], format=format)))
    assert call.text.endswith("data: b\n\nevent: done\ndata: 2\n\n")


def test_body_with_a_declared_length_has_no_failure(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """With it, the body could have this length, and look complete."""
    length = len('"item 0"\n"item 1"\n{"end":false,"incident":"0123456789abcdef"}\n')
    root = Root(fail, format=LINES, length=length, chunk_size=0)
    assert read_failed(Call(make_app(root))) == b'"item 0"\n"item 1"\n'
    assert reports[0].incident is None


def test_spooled_stream_that_fails_is_an_error_page(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The client has received nothing, so it gets the status."""
    call = get(make_app(Root(fail, format=LINES, spool=True)))
    assert call.status.startswith("500 ")
    assert [report.incident for report in reports] == [None]


def test_stream_in_an_archive_ends_with_its_own_format(make_app: MakeApp) -> None:
    """The member is complete, and the archive has no such data."""

    def members() -> Iterator[Any]:
        yield "a.ndjson", Stream(["a"], LINES)
        yield "b.txt", Stream(["b"], EVENTS)

    call = Call(make_app(Root(members, format=ZIP)))
    assert read_members(call.read()) == {
        "a.ndjson": b'"a"\n{"end":true,"items":1}\n',
        "b.txt": b"data: b\n\nevent: done\ndata: 1\n\n",
    }


def test_failed_stream_in_an_archive_does_not_report_its_failure(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The archive is incomplete, so no program opens it."""

    def members() -> Iterator[Any]:
        yield "a.txt", b"x" * 100_000
        yield "b.ndjson", Stream(fail(), LINES)

    data = read_failed(Call(make_app(Root(members, format=ZIP(compress=False)))))
    assert b"incident" not in data
    assert reports[0].incident is None


# Custom formats.


class Words:
    """A format of text that reports its failures."""

    content_type = "text/plain"
    chunk_size = 0

    def encode(self, items: Iterable[Any]) -> Iterator[str]:
        for item in items:
            yield f"{item}\n"

    def encode_failure(self, incident: str) -> Any:
        return f"failed: {incident}\n"


@pytest.mark.parametrize("charset", ["utf-8", "utf-16", "latin-1"])
def test_failure_of_a_custom_format_has_the_charset_of_the_body(
    make_app: MakeApp, charset: str
) -> None:
    """Text is encoded by the encoder of the body, so it has one byte order mark."""
    root = Root(fail, format=Words, charset=charset)
    text = read_failed(Call(make_app(root))).decode(charset)
    assert re.fullmatch(f"item 0\nitem 1\nfailed: {ID}\n", text)


@pytest.mark.parametrize("nothing", [None, "", b""], ids=repr)
def test_custom_format_may_have_nothing_to_send(
    make_app: MakeApp, reports: list[Report], nothing: Any
) -> None:
    """The report then has no incident."""

    class Silent(Words):
        def encode_failure(self, incident: str) -> Any:
            return nothing

    assert read_failed(Call(make_app(Root(fail, format=Silent)))) == b"item 0\nitem 1\n"
    assert reports[0].incident is None


@pytest.mark.parametrize("output", [ArithmeticError("a"), SystemExit(), 5], ids=repr)
def test_format_that_fails_to_report_does_not_hide_the_error(
    make_app: MakeApp,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    output: Any,
) -> None:
    """Both errors are logged, and the server gets the first one."""

    class Failing(Words):
        def encode_failure(self, incident: str) -> Any:
            if isinstance(output, BaseException):
                raise output
            return output

    root = Root(fail, format=Failing)
    assert read_failed(Call(make_app(root))) == b"item 0\nitem 1\n"
    own, end = [record for record in caplog.records if record.name == "tgstream"]
    assert "Failing.encode_failure() failed" in own.getMessage()
    assert " failed: 2 items" in end.getMessage()
    assert (reports[0].incident, type(reports[0].error)) == (None, LookupError)


@pytest.mark.parametrize("format", [SSE, NDJSON, CSV])
def test_failure_is_not_reported_by_default(
    make_app: MakeApp,
    reports: list[Report],
    caplog: pytest.LogCaptureFixture,
    format: Any,
) -> None:
    """The data, the log and the report are those without the options."""

    def items() -> Iterator[Any]:
        yield ["a"]
        raise LookupError

    call = Call(make_app(Root(items, format=format, chunk_size=0)))
    assert b"incident" not in read_failed(call)
    assert reports[0].incident is None
    assert "incident" not in caplog.text
