"""The archives of ZIP and XLSX: readable, equal for equal members, sent in time."""

from __future__ import annotations

import io
import random
import sys
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.support import read_members
from tgstream.formats.archive import Archive, Member

ROW = b'<row r="%d"><c><v>%d</v></c><c t="inlineStr"><is><t>x</t></is></c></row>'
quick = settings(deadline=None, database=None, max_examples=100)


def write(*members: Member) -> bytes:
    """The bytes of an archive."""
    return b"".join(Archive("ZIP").write(members))


def opens(data: bytes) -> bool:
    """Whether :mod:`zipfile` opens an archive."""
    try:
        zipfile.ZipFile(io.BytesIO(data)).close()
    except zipfile.BadZipFile:
        return False
    return True


def make_rows(count: int, taken: list[int] | None = None) -> Iterator[bytes]:
    """The XML of rows. Their numbers are added to ``taken``."""
    for number in range(1, count + 1):
        if taken is not None:
            taken.append(number)
        yield ROW % (number, number)


contents = st.lists(st.binary(max_size=200), max_size=5)


@quick
@given(st.dictionaries(st.sampled_from("abcäß☃"), contents), st.booleans())
def test_archive_has_the_given_members(
    members: dict[str, list[bytes]], compress: bool
) -> None:
    """With any names and contents, compressed and not."""
    expected = {name: b"".join(chunks) for name, chunks in members.items()}
    data = write(
        *(
            Member(name, chunks, compress, size=len(expected[name]))
            for name, chunks in members.items()
        )
    )
    assert read_members(data) == expected


@pytest.mark.parametrize("largest", [50, 5_000, 70_000, 300_000])
def test_archive_does_not_depend_on_the_sizes_of_the_chunks(largest: int) -> None:
    """Equal content gives equal bytes, because it is flushed at the same places."""
    generator = random.Random(largest)

    def split() -> Iterator[bytes]:
        start = 0
        while start < len(content):
            size = generator.randint(1, largest)
            yield content[start : start + size]
            start += size

    content = b"".join(make_rows(10_000))
    assert write(Member("a", split())) == write(Member("a", [content]))


def test_archive_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the system, nor its clock, nor its time zone is in it."""
    member = Member("a", [b"text"], modified=1_234_567_890)
    expected = write(member, Member("b", [b"text"]))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr("time.localtime", None)
    assert write(member, Member("b", [b"text"])) == expected
    with zipfile.ZipFile(io.BytesIO(expected)) as opened:
        dated, fixed = opened.infolist()
    assert fixed.date_time == (1980, 1, 1, 0, 0, 0)
    assert dated.date_time == (2009, 2, 13, 23, 31, 30)  # UTC
    assert {info.external_attr >> 16 for info in (dated, fixed)} == {0o100644}
    assert {info.create_system for info in (dated, fixed)} == {3}


@pytest.mark.parametrize(
    ("modified", "expected"),
    [
        (-1e9, (1980, 1, 1, 0, 0, 0)),
        (0.5, (1980, 1, 1, 0, 0, 0)),
        (2e9 + 1.9, (2033, 5, 18, 3, 33, 20)),
        (5e9, (2107, 12, 31, 23, 59, 58)),
    ],
)
def test_time_out_of_range_is_the_nearest_one(
    modified: float, expected: tuple[int, ...]
) -> None:
    """A ZIP has years from 1980 to 2107, and even seconds."""
    data = write(Member("a", [b"text"], modified=modified))
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert opened.getinfo("a").date_time == expected
    assert read_members(data) == {"a": b"text"}


def test_first_rows_are_sent_before_many_are_made() -> None:
    """A compressor alone gives nothing before it has more than 3,000 of them."""
    taken: list[int] = []
    inflater, received = zlib.decompressobj(-zlib.MAX_WBITS), b""
    chunks = Archive("XLSX").add(Member("a", make_rows(10_000, taken)))
    header = next(chunks)
    while not received:
        received += inflater.decompress(next(chunks))
    assert header.startswith(b"PK\3\4")
    assert received.startswith(b'<row r="1">')
    assert len(taken) < 100


def test_rows_are_sent_all_the_time() -> None:
    """The client has all but the last row and 64 KiB, at any time."""
    made = received = most = 0

    def count_rows() -> Iterator[bytes]:
        nonlocal made
        for row in make_rows(10_000):
            made += len(row)
            yield row

    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    chunks = Archive("XLSX").add(Member("a", count_rows()))
    next(chunks)
    for chunk in chunks:
        most = max(most, made - received)
        if not inflater.eof:
            received += len(inflater.decompress(chunk))
    assert received == made
    assert most <= (1 << 16) + 100


def test_slow_member_is_flushed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a proxy does not close the connection as idle."""
    now = [0.0]

    def make_slow_rows() -> Iterator[bytes]:
        for row in make_rows(500):
            now[0] += 1
            yield row

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    times = []
    chunks = Archive("ZIP").add(Member("a", make_slow_rows()))
    for _ in chunks:
        times.append(now[0])
    waits = [after - before for before, after in pairwise(times)]
    assert max(waits) <= 11


def test_flushes_make_an_archive_little_larger() -> None:
    """Less than a percent, for XML."""
    content = b"".join(make_rows(50_000))
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    least = len(compressor.compress(content) + compressor.flush())
    assert len(write(Member("a", [content]))) < least * 1.01


def test_member_is_taken_after_the_one_before_it() -> None:
    """Neither its name nor its data is needed earlier."""
    log: list[str] = []

    def make_data(name: str) -> Iterator[bytes]:
        log.append(f"data of {name}")
        yield b"text"

    def make_members() -> Iterator[Member]:
        for name in "ab":
            log.append(name)
            yield Member(name, make_data(name))
        log.append("end")

    for chunk in Archive("ZIP").write(make_members()):
        if chunk.startswith(b"PK"):
            log.append(str(chunk[2:4]))
    header, descriptor, central = str(b"\3\4"), str(b"\7\x08"), str(b"\1\2")
    assert log == [
        *("a", header, "data of a", descriptor),
        *("b", header, "data of b", descriptor),
        *("end", central, central, str(b"\5\6")),
    ]


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("a", b"text")],
        [("a", b""), ("folder/ä.txt", b"x" * 100_000)],
        [(str(number), b"x") for number in range(65_535)],
    ],
    ids=["no members", "one", "several", "first that needs ZIP64"],
)
def test_measured_bytes_are_those_of_the_archive(
    members: list[tuple[str, bytes]],
) -> None:
    """For members that are not compressed, and have a size."""
    given_members = [
        Member(name, [data], compress=False, size=len(data), modified=1e9)
        for name, data in members
    ]
    data = write(*given_members)
    assert Archive("ZIP").measure(given_members) == len(data)
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert opened.namelist() == [name for name, _ in members]


def test_measured_bytes_are_right_beyond_4_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a member and for a place beyond it, without their data."""
    block = bytes(1 << 20)
    size = (4 << 30) + 5

    class Zeros:
        """Data that takes no time to check."""

        def __iter__(self) -> Iterator[bytes]:
            yield from [block] * (4 << 10)
            yield block[:5]

    monkeypatch.setattr("zlib.crc32", lambda data, value: 0)
    members = [
        Member("large", Zeros(), compress=False, size=size),
        Member("last", [b"text"], compress=False, size=4),
    ]
    length = sum(map(len, Archive("ZIP").write(members)))
    assert Archive("ZIP").measure(members) == length > size


@pytest.mark.parametrize("data", [b"123", b"12345"], ids=["fewer", "more"])
def test_member_of_another_size_is_rejected(data: bytes) -> None:
    """It would make another length of the response than the one that was declared."""
    member = Member("a.txt", [data[:2], data[2:]], compress=False, size=4)
    with pytest.raises(ValueError, match=r"'a.txt' has (more|fewer) than 4 bytes"):
        write(member)


def test_compressed_member_may_have_another_size() -> None:
    """Its size is only needed for a header that allows more than 4 GiB."""
    for size in (3, 5 << 30):
        assert read_members(write(Member("a", [b"text"], size=size))) == {"a": b"text"}


@pytest.mark.parametrize("compress", [True, False], ids=["deflated", "stored"])
def test_cut_archive_is_not_opened(compress: bool) -> None:
    """At every byte of it."""
    members = [
        Member("a.txt", [b"some text\r\n" * 20], compress),
        Member("b.txt", [b"other text\r\n"], compress),
    ]
    data = write(*members)
    assert opens(data)
    assert not any(opens(data[:end]) for end in range(len(data)))


def test_error_of_a_member_leaves_an_archive_that_is_not_opened() -> None:
    """The error is raised as it is."""

    def fail() -> Iterator[bytes]:
        yield b"text"
        raise LookupError("gone")

    received = b""
    with pytest.raises(LookupError, match="gone"):
        for chunk in Archive("ZIP").write([Member("a", [b"x"]), Member("b", fail())]):
            received += chunk
    assert received and not opens(received)


def test_missing_package_is_reported_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The extra is that of the format."""
    monkeypatch.setitem(sys.modules, "zipstream", None)
    for name in ("ZIP", "XLSX"):
        with pytest.raises(ImportError) as error:
            Archive(name)
        assert str(error.value) == (
            f"{name} needs zipstream-ng. Install it with: "
            f"pip install 'tgstream[{name.lower()}]'"
        )
