"""ZIP archives, read by Info-ZIP, 7-Zip and libarchive, also larger than 4 GiB."""

from __future__ import annotations

import os
import random
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stream_unzip import stream_unzip

from tgstream import ZIP

GIB = 1 << 30
BLOCK = bytes(1 << 20)
LARGE = 4 * GIB + 5

READERS = {
    "unzip": ["unzip", "-t"],
    "7z": ["7z", "t", "-bd"],
    "bsdtar": ["bsdtar", "-xOf"],
}
"""Commands that read all members of an archive, and check them."""


def passes(reader: str, path: Path) -> bool:
    """Whether a program takes an archive as complete."""
    run = subprocess.run([*READERS[reader], path], stdout=subprocess.DEVNULL)
    return run.returncode == 0


def write(path: Path, *items: Any, compress: bool = True) -> Path:
    """Write an archive to a file."""
    with path.open("wb") as file:
        file.writelines(ZIP(compress).encode(items))
    return path


def make_zeros() -> Iterator[bytes]:
    """The data of a member that is larger than 4 GiB."""
    for _ in range(LARGE // len(BLOCK)):
        yield BLOCK
    yield BLOCK[: LARGE % len(BLOCK)]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A file that is larger than 4 GiB, and takes no room on the disk."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(LARGE)
    return tmp_path / "sparse"


def list_sizes(path: Path) -> dict[str, int]:
    """The names and the sizes of the members, as bsdtar lists them."""
    text = subprocess.run(
        ["bsdtar", "-tvf", path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    ).stdout
    lines = [line.split(maxsplit=8) for line in text.splitlines()]
    return {line[8]: int(line[4]) for line in lines}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("compress", [True, False], ids=["deflated", "stored"])
def test_archive_is_read(tmp_path: Path, reader: str, compress: bool) -> None:
    """With members of all kinds, and with names that are not ASCII."""
    (tmp_path / "file").write_bytes(os.urandom(200_000))
    archive = write(
        tmp_path / "archive.zip",
        ("bytes.bin", os.urandom(100_000)),
        ("folder/ä☃数.txt", "text\r\n" * 10_000),
        ("empty", b""),
        ("file", tmp_path / "file"),
        ("iterable", iter([b"a", b"b"])),
        compress=compress,
    )
    assert passes(reader, archive)
    assert list_sizes(archive) == {
        "bytes.bin": 100_000,
        "folder/ä☃数.txt": 60_000,
        "empty": 0,
        "file": 200_000,
        "iterable": 2,
    }


@pytest.mark.parametrize("reader", READERS)
def test_archive_of_no_members_is_read(tmp_path: Path, reader: str) -> None:
    """unzip reports that it is empty."""
    archive = write(tmp_path / "archive.zip")
    assert passes(reader, archive) or reader == "unzip"


@pytest.mark.parametrize("reader", READERS)
def test_cut_archive_is_not_complete(tmp_path: Path, reader: str) -> None:
    """At the parts of each member, and at many other places.

    bsdtar reads an archive that is cut in its central directory from the beginning, and
    finds all members. The central directory is sent after the last commit.
    """
    generator = random.Random(1)
    archive = write(
        tmp_path / "archive.zip",
        *((f"{n}.bin", generator.randbytes(n * 1000)) for n in range(1, 6)),
        ("text.csv", "text\r\n" * 10_000),
    )
    data, cut = archive.read_bytes(), tmp_path / "cut.zip"
    signatures = re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x07\x08)", data)
    places = {match.start() + n for match in signatures for n in (0, 1, 4)}
    places |= {generator.randrange(1, len(data)) for _ in range(100)}
    end = data.index(b"PK\x01\x02") + 4 if reader == "bsdtar" else len(data)
    for place in places & {*range(1, end + 1)}:
        cut.write_bytes(data[:place])
        assert not passes(reader, cut), place
    assert passes(reader, archive)


class Large(NamedTuple):
    """A content of more than 4 GiB.

    :param size_is_known: before its data is read.
    """

    make: Callable[[Path], Any]
    compress: bool
    size_is_known: bool


LARGE_CONTENTS = {
    "iterable": Large(lambda path: make_zeros(), True, False),
    "path": Large(lambda path: path, True, True),
    "stored path": Large(lambda path: path, False, True),
}


@pytest.mark.parametrize("kind", LARGE_CONTENTS)
def test_member_of_more_than_4_gib_is_read(
    tmp_path: Path, sparse: Path, kind: str
) -> None:
    """By all readers, with a member after it.

    libarchive needs to know in advance that a member is so large, but only if it reads
    from a pipe. ``path`` and ``stored path`` have that in their header.
    """
    content, compress, size_is_known = LARGE_CONTENTS[kind]
    items = [("first", b"1"), ("zeros", content(sparse)), ("last", b"last")]
    length = ZIP(compress).measure(items)
    archive = write(tmp_path / "archive.zip", *items, compress=compress)
    assert length == (archive.stat().st_size if kind == "stored path" else None)
    assert list_sizes(archive) == {"first": 1, "zeros": LARGE, "last": 4}
    assert [reader for reader in READERS if not passes(reader, archive)] == []
    with zipfile.ZipFile(archive) as opened:
        assert opened.read("last") == b"last"
    with archive.open("rb") as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        sizes = [sum(map(len, chunks)) for _, _, chunks in stream_unzip(blocks)]
    assert sizes == [1, LARGE, 4]
    piped = subprocess.run(f"cat {archive} | bsdtar -xOf - >/dev/null", shell=True)
    assert (piped.returncode == 0) == size_is_known


def test_many_members_are_read(tmp_path: Path) -> None:
    """More than the 65,535 that fit into a ZIP without ZIP64."""
    items = [(f"{n // 1000}/{n}.txt", str(n)) for n in range(70_000)]
    length = ZIP(compress=False).measure(items)
    archive = write(tmp_path / "archive.zip", *items, compress=False)
    assert length == archive.stat().st_size
    assert [reader for reader in READERS if not passes(reader, archive)] == []
    with zipfile.ZipFile(archive) as opened:
        assert len(opened.namelist()) == 70_000
        assert opened.read("69/69999.txt") == b"69999"
