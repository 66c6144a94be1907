"""Conditional requests and ranges: the answer by RFC 9110 to any request for a file."""

from __future__ import annotations

from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgstream.core.ranges import (
    MAX_RANGES,
    Answer,
    Representation,
    evaluate,
    make_multipart,
    parse_date,
    parse_range,
)

TIME = 1_000_000_000
DATE = formatdate(TIME, usegmt=True)
EARLIER, LATER = (formatdate(TIME + by, usegmt=True) for by in (-1, 1))
CONTENT = Representation(100, '"a"', TIME)


def ask(
    content: Representation = CONTENT, method: str = "GET", **headers: Any
) -> Answer:
    """Evaluate a request with these headers."""
    environ: dict[str, Any] = {"REQUEST_METHOD": method}
    environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
    return evaluate(environ, content)


def select(header: str, size: int = 100) -> Any:
    """The pairs of first and last position that a range selects."""
    ranges = parse_range(header, size)
    return ranges and [(each.start, each.stop - 1) for each in ranges]


# The syntax of ranges.


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=10-", 10, 99),
        ("bytes=99-", 99, 99),
        ("bytes=10-1000", 10, 99),
        ("bytes=-1", 99, 99),
        ("bytes=-100", 0, 99),
        ("bytes=-200000", 0, 99),
        ("BYTES=0-1", 0, 1),
        ("bytes= 0-1 ", 0, 1),
        ("bytes=,0-1,,", 0, 1),
        ("bytes=0-1,100-", 0, 1),
        ("bytes=00000000000000000000000000000-01", 0, 1),
        (f"bytes=0-{10**30}", 0, 99),
        (f"bytes=-{10**30}", 0, 99),
        ("bytes=5-" + "9" * 10_000, 5, 99),
    ],
)
def test_range_is_cut_at_the_end_of_the_file(
    header: str, first: int, last: int
) -> None:
    """Positions after the end are valid, however long the number is."""
    assert select(header) == [(first, last)]


@pytest.mark.parametrize(
    "header",
    ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=100-,200-", f"bytes={10**30}-"],
)
def test_range_after_the_end_selects_nothing(header: str) -> None:
    """The response is a 416, with the size."""
    assert select(header) == []
    answer = ask(range=header)
    assert (answer.status, answer.ranges) == (416, [])
    assert answer.headers["Content-Range"] == "bytes */100"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=,",
        "bytes=-",
        "bytes=--1",
        "bytes=-1-2",
        "bytes=1",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=0-1,5-2",
        "bytes=1.0-2",
        "bytes=+1-2",
        "bytes=0 - 1",
        "bytes=0x1-2",
        "bytes=\u0661-\u0662",
        "bytes=0-1;2-3",
        "bytes 0-1",
        "items=0-1",
        "bytes=0-1,bytes=2-3",
        "bytes=\x00-\x01",
    ],
)
def test_invalid_range_is_ignored(header: str) -> None:
    """The response is the whole file."""
    assert select(header) is None
    answer = ask(range=header)
    assert (answer.status, answer.ranges) == (200, [range(100)])
    assert "Content-Range" not in answer.headers


def test_several_ranges_keep_their_order() -> None:
    """Adjacent ranges do not overlap."""
    assert select("bytes=50-59,0-9,10-19,-1") == [(50, 59), (0, 9), (10, 19), (99, 99)]


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-9,5-14",
        "bytes=0-,0-",
        "bytes=0-99,-1",
        "bytes=" + ",".join(f"{2 * n}-{2 * n}" for n in range(MAX_RANGES + 1)),
        "bytes=" + "0-," * 3_000,
        "bytes=" + "," * 10_000,
        "bytes=" + "-" * 10_000,
        "bytes=" + "0-0," * 2_500,
    ],
)
def test_overlapping_and_many_ranges_are_ignored(header: str) -> None:
    """No request gets more bytes than the file has."""
    assert select(header) is None


SPECS = st.lists(
    st.from_regex(r"\A ?([0-9]{0,3}-[0-9]{0,3}| |x)\Z"), min_size=1, max_size=5
).map(lambda specs: "bytes=" + ",".join(specs))


@settings(deadline=None)
@given(SPECS | st.text(), st.integers(0, 120))
def test_ranges_of_any_header_are_parts_of_the_file(header: str, size: int) -> None:
    """They do not overlap, none is empty, and none is longer than its specification."""
    ranges = parse_range(header, size)
    positions = [position for each in ranges or [] for position in each]
    assert len(positions) == len(set(positions))
    assert all(0 <= position < size for position in positions)
    assert all(ranges or [])
    for spec in header.removeprefix("bytes=").split(",") if ranges else []:
        first, _, last = spec.strip().partition("-")
        if first and int(first) < size:  # each position that it names is selected
            assert int(first) in positions
            assert min(int(last or size), size - 1) in positions


def test_empty_file_has_no_range() -> None:
    """A suffix selects the whole file, even if it is shorter (section 14.1.2)."""
    empty = Representation(0)
    for header in ("bytes=0-", "bytes=0-0", "bytes=-0"):
        answer = ask(empty, range=header)
        assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */0")
    assert ask(empty, range="bytes=-1").status == 200


def test_one_range_has_its_content_range() -> None:
    """The header names the positions and the size."""
    answer = ask(range="bytes=10-19")
    assert (answer.status, answer.ranges) == (206, [range(10, 20)])
    assert answer.headers == {
        "Accept-Ranges": "bytes",
        "ETag": '"a"',
        "Last-Modified": DATE,
        "Content-Range": "bytes 10-19/100",
    }


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE"])
def test_range_is_defined_for_get_alone(method: str) -> None:
    """Other methods get the whole file."""
    answer = ask(method=method, range="bytes=10-19")
    assert (answer.status, answer.ranges) == (200, [range(100)])


def test_multipart_body_has_a_head_for_each_range() -> None:
    """Each part has the content type and its positions."""
    content_type, parts = make_multipart([range(5), range(9, 10)], 10, "text/plain")
    boundary = content_type.removeprefix("multipart/byteranges; boundary=")
    data, body = b"0123456789", b""
    for part in parts:
        body += part if isinstance(part, bytes) else data[part.start : part.stop]
    assert body.decode().split("\r\n") == [
        f"--{boundary}",
        "Content-Type: text/plain",
        "Content-Range: bytes 0-4/10",
        "",
        "01234",
        f"--{boundary}",
        "Content-Type: text/plain",
        "Content-Range: bytes 9-9/10",
        "",
        "9",
        f"--{boundary}--",
        "",
    ]


# If-Range.


@pytest.mark.parametrize("validator", ['"a"', ' "a" ', DATE])
def test_if_range_with_the_current_validator_gets_the_range(validator: str) -> None:
    """The client has a part of the same file."""
    assert ask(range="bytes=10-", if_range=validator).status == 206


@pytest.mark.parametrize(
    "validator",
    ['"b"', 'W/"a"', "a", '"a", "b"', "*", "", EARLIER, LATER, "yesterday", "0" * 9999],
)
def test_if_range_with_another_validator_gets_the_whole_file(validator: str) -> None:
    """The client may have a part of another file. A later date is not equal either."""
    answer = ask(range="bytes=10-", if_range=validator)
    assert (answer.status, answer.ranges) == (200, [range(100)])


@pytest.mark.parametrize(
    "content", [Representation(100), CONTENT._replace(etag='W/"a"')]
)
@pytest.mark.parametrize("validator", ['"a"', 'W/"a"'])
def test_if_range_needs_a_strong_etag(content: Representation, validator: str) -> None:
    """A weak ``ETag`` does not mean equal bytes."""
    assert ask(content, range="bytes=10-", if_range=validator).status == 200


def test_if_range_of_a_changed_file_is_not_a_416() -> None:
    """The new file may be shorter than the part that the client has."""
    assert ask(range="bytes=5000-", if_range='"old"').status == 200


# The other conditions.


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "headers",
    [
        {"if_none_match": '"a"'},
        {"if_none_match": 'W/"a"'},
        {"if_none_match": '"x", "a"'},
        {"if_none_match": '"x,\\",W/"a"'},
        {"if_none_match": "*"},
        {"if_none_match": '"a"', "if_modified_since": EARLIER},
        {"if_none_match": '"a"', "range": "bytes=0-1"},
        {"if_modified_since": DATE},
        {"if_modified_since": LATER},
        {"if_modified_since": "Sunday, 09-Sep-01 01:46:40 GMT"},
        {"if_modified_since": "Sun Sep  9 01:46:40 2001"},
    ],
)
def test_unmodified_file_is_a_304(method: str, headers: dict[str, Any]) -> None:
    """No bytes are sent. The headers of the file are."""
    answer = ask(method=method, **headers)
    assert (answer.status, answer.ranges) == (304, [])
    assert answer.headers["ETag"] == '"a"'


@pytest.mark.parametrize(
    "headers",
    [
        {"if_none_match": '"b"'},
        {"if_none_match": "a"},
        {"if_none_match": ""},
        {"if_none_match": '"b"', "if_modified_since": LATER},
        {"if_modified_since": EARLIER},
        {"if_modified_since": "yesterday"},
        {"if_modified_since": "Mon, 99 Foo 99999999999999 99:99:99"},
        {"if_match": '"a"'},
        {"if_match": '"b", "a"'},
        {"if_match": "*"},
        {"if_match": '"a"', "if_unmodified_since": EARLIER},
        {"if_unmodified_since": DATE},
        {"if_unmodified_since": LATER},
        {"if_unmodified_since": "never"},
    ],
)
def test_modified_file_is_sent(headers: dict[str, Any]) -> None:
    """An invalid condition counts as none."""
    assert ask(**headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"if_match": '"b"'},
        {"if_match": 'W/"a"'},
        {"if_match": ""},
        {"if_match": '"b"', "if_unmodified_since": LATER},
        {"if_match": '"b"', "if_none_match": '"a"'},
        {"if_unmodified_since": EARLIER},
        {"if_unmodified_since": EARLIER, "range": "bytes=0-1"},
    ],
)
def test_failed_precondition_is_a_412(headers: dict[str, Any]) -> None:
    """It is evaluated before all others."""
    answer = ask(**headers)
    assert (answer.status, answer.ranges) == (412, [])


def test_conditions_are_for_get_and_head_alone() -> None:
    """A POST that returns a file has changed something already."""
    headers: dict[str, Any] = {
        "if_none_match": "*",
        "if_modified_since": LATER,
        "if_match": '"b"',
    }
    assert ask(method="POST", **headers).status == 200


def test_content_without_validators_meets_no_condition() -> None:
    """Only ``*`` matches it."""
    content = Representation(100)
    assert ask(content, if_none_match='"a"').status == 200
    assert ask(content, if_modified_since=LATER).status == 200
    assert ask(content, if_match='"a"').status == 412
    assert ask(content, if_unmodified_since=EARLIER).status == 200
    assert ask(content).headers == {"Accept-Ranges": "bytes"}


@pytest.mark.parametrize("text", ["", "x", "1", "Sun, 09 Sep 2001", "\0", "é" * 60])
def test_invalid_date_is_ignored(text: str) -> None:
    """It never raises."""
    assert parse_date(text) is None
