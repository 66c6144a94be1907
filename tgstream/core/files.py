"""Files whose size is known: their validators, and reading parts of them.

A :class:`StoredFile` is the source of a response that can be resumed. The response
sends :class:`FileParts` of it.

The ``ETag`` of a file on a disk is strong. It depends on the inode, the size, and the
times in nanoseconds at which the content and the inode changed:

- A file that is replaced within the same second gets another ``ETag``.
- So does a file whose time was set back, as ``cp -p`` and ``rsync`` do. Only the kernel
  sets the time of the inode.
- Copies on several machines have different ones, so that a download that continues on
  another machine starts again. That costs time, and equal tags of different bytes would
  damage files.

The ``ETag`` of content in memory is a hash of it.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

from .cleanup import close
from .errors import StreamError
from .ranges import Representation

BLOCK_SIZE = 65536
"""Maximum bytes of an item that is a block of a file."""


_KERNEL_SIZES = 0, 4096
"""The sizes of the files of ``/proc`` and ``/sys``, whatever their content is."""


class StoredFile:
    """An open, seekable binary file, whose bytes from ``start`` on are the content.

    :param file: has ``seek()`` and ``read()``. It is closed at the end.
    :param content: the size of the content in bytes, and its validators.
    :param start: the position of the first byte of the content.
    """

    content_type: str | None = None
    """The content type, if the caller of ``send_file()`` has given it."""
    max_age: int | None = None
    """Seconds for which a client may use the content again without a request."""
    default_type: str | None = None
    """The content type if the response has none."""

    def __init__(self, file: Any, content: Representation, start: int = 0) -> None:
        self.file = file
        self.content = content
        self.start = start

    def __iter__(self) -> Iterator[bytes]:
        """The blocks of the whole content."""
        return iter(FileParts(self, [range(self.content.size)]))

    def close(self) -> None:
        """Close the file."""
        close(self.file)


def open_file(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file on a disk for reading, without waiting for a writer of a pipe.

    :raises OSError: when there is no such file, it is not a regular file, or it may not
        be read.
    """
    file = io.FileIO(path, opener=_open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def find_stored(file: Any, start: int | None = None) -> StoredFile | None:
    """The file, if it is on a disk or in memory, so that its size is known.

    :param start: the position of the first byte. None for the position that it has.
    :returns: None for others: pipes, sockets, archives, text, files of the kernel.
    """
    info = _find_stat(file)
    if info is None and not _is_in_memory(file):
        return None
    if start is None:
        start = file.tell()
    if info is None:
        return StoredFile(
            file, Representation(_measure(file, start), _hash(file, start)), start
        )
    if file.writable():
        file.flush()
        info = _find_stat(file) or info
    size = max(0, info.st_size - start)
    if info.st_size in _KERNEL_SIZES:
        read = len(file.read(size or 1))
        file.seek(start)
        if read != size:
            return None
    identity = (info.st_mtime_ns, info.st_ctime_ns, info.st_ino, size, start)
    content = Representation(size, _make_etag(repr(identity)), int(info.st_mtime))
    return StoredFile(file, content, start)


def wrap_seekable(file: Any) -> StoredFile:
    """A seekable file of any type, from its first byte, without validators.

    :raises OSError: when it cannot be sought.
    """
    return StoredFile(file, Representation(_measure(file, 0)))


def _measure(file: Any, start: int) -> int:
    """The bytes from ``start`` to the end. The file is at ``start`` afterwards."""
    file.seek(0, os.SEEK_END)
    end: int = file.tell()  # seek() returns None in some classes
    file.seek(start)
    return max(0, end - start)


def _find_stat(file: Any) -> os.stat_result | None:
    """The status of a regular file. None for other objects.

    The method ``fileno()`` is not enough: a ``GzipFile`` has that of its archive.
    """
    if type(file).__module__ == tempfile.__name__:  # a wrapper, whose class is private
        file = getattr(file, "file", file)
    if type(file) in (io.BufferedReader, io.BufferedRandom):
        file = file.raw
    if type(file) is not io.FileIO:
        return None
    info = os.fstat(file.fileno())
    return info if stat.S_ISREG(info.st_mode) else None


def _is_in_memory(file: Any) -> bool:
    """Whether it is in memory, or was there until it got too large."""
    if isinstance(file, tempfile.SpooledTemporaryFile):
        return not isinstance(getattr(file, "encoding", None), str)  # not text
    return isinstance(file, io.BytesIO)


def _hash(file: Any, start: int) -> str:
    digest = sha256()
    while block := file.read(BLOCK_SIZE):
        digest.update(block)
    file.seek(start)
    return f'"{digest.hexdigest()[:32]}"'


def _make_etag(identity: str) -> str:
    """A strong ``ETag``. It does not show what it is made of, such as the inode."""
    return f'"{sha256(identity.encode()).hexdigest()[:32]}"'


class FileParts:
    """The bytes of a response: parts of a file, and bytes between them.

    :param stored: the file.
    :param parts: bytes, and the positions of the content that are sent.
    """

    def __init__(self, stored: StoredFile, parts: Sequence[bytes | range]) -> None:
        self.parts = parts
        self.length = sum(map(len, parts))
        """The number of bytes."""
        self._stored = stored

    def __iter__(self) -> Iterator[bytes]:
        """Read the parts, in blocks.

        :raises StreamError: when the file has become shorter.
        """
        for part in self.parts:
            if isinstance(part, bytes):
                yield part
            else:
                yield from self._read(part)

    def _read(self, part: range) -> Iterator[bytes]:
        stored, missing = self._stored, len(part)
        file, content = stored.file, stored.content
        if getattr(file, "closed", False) is True:
            raise StreamError(
                f"the file {describe(file)} was closed before it was sent. Open it "
                "without 'with': tgstream closes it after the response"
            )
        file.seek(stored.start + part.start)
        while missing:
            block = file.read(min(missing, BLOCK_SIZE))
            if not block:
                raise StreamError(
                    f"the file {describe(file)} has become shorter while it was sent: "
                    f"byte {part.stop - missing} of {content.size} is missing. Replace "
                    "a file with os.replace(), and do not truncate it"
                )
            missing -= len(block)
            yield block

    def close(self) -> None:
        """Close the file."""
        self._stored.close()

    def read_at(self, position: int, size: int) -> bytes:
        """Read from the only part, without an iterator.

        :param position: counted from the start of the part.
        :param size: the maximum number of bytes.
        :raises StreamError: when the file has become shorter.
        """
        part = self.parts[0]
        assert isinstance(part, range)
        return next(self._read(part[position : position + size]), b"")


def describe(file: Any) -> str:
    """The name of a file, or its type if it has no name."""
    name = find_name(file)
    return type(file).__name__ if name is None else repr(name)


def find_name(file: Any) -> str | None:
    """The name or the path of a file, if it has one. Some have a number."""
    name = getattr(file, "name", None)
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None
