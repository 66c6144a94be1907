"""ZIP archives that are written while their members are made, for ZIP and XLSX.

The container is that of zipstream-ng: the headers of the members, their data
descriptors and the central directory. The data of a member is compressed here, because
zipstream-ng cannot flush it. A compressor keeps up to 16,384 matches and letters before
it gives any output. In XML that is more than 3,000 rows.

- *The output is flushed* (``Z_SYNC_FLUSH``) after the first 4 KiB of a member and then
  after each 64 KiB, always at the same places, whatever the sizes of the chunks are. A
  flush every 64 KiB makes compressed XML 0.2 % and CSV 0.1 % larger (4 KiB: 8 % and
  3 %). A member that takes more than 10 seconds to make 64 KiB is also flushed by the
  clock, so that no proxy closes an idle connection.
- *Equal members give equal bytes* on every machine with the same zlib, unless the clock
  has flushed a member. Members have no time and no permissions of the machine.
- *Sizes need not be known.* They stand behind the data of the member (APPNOTE.TXT,
  4.3.9). The header of a member has ZIP64 fields only if it is known to be larger than
  4 GiB, because Excel and older versions of macOS cannot read such a header. If another
  member gets larger, the sizes behind it and in the central directory have 64 bits, as
  Go and opczip write them. Of the readers in the tests only libarchive, reading from a
  pipe, needs the header for such a member.
- *The central directory is made when the last member has ended*. Without it no reader
  opens the archive.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from datetime import datetime, timezone
from struct import pack
from typing import Any, NamedTuple

_LEVEL = 6
"""Of zlib. Level 1 is 2.6 times as fast for XML and 3.4 times for CSV, but the file is
29 % and 26 % larger. Level 9 takes 5 and 3 times as long and saves 6 % and 2 %."""

_FIRST_FLUSH, _FLUSH = 1 << 12, 1 << 16
_FLUSH_SECONDS = 10.0

_FIXED_TIME = (1980, 1, 1, 0, 0, 0)
_LAST_TIME = (2107, 12, 31, 23, 59, 58)
_REGULAR_FILE = 0o100644 << 16
_UNIX = 3  # the system whose permissions a member has
_HAS_DESCRIPTOR = 0x8
_STORED, _DEFLATED = 0, 8
_MAX_SIZE = 0xFFFFFFFF  # in a field of 32 bits
_VERSION, _ZIP64_VERSION = 20, 45  # of a reader (APPNOTE.TXT, 4.4.3)


class Member(NamedTuple):
    """A member of an archive.

    :param name: with ``/`` between folders.
    :param chunks: its data. They are taken when it is the member's turn.
    :param compress: whether to deflate the data.
    :param size: the bytes of the data if they are known, else None. A member that is
        not compressed must have exactly as many.
    :param modified: the time of the member in seconds since 1970, None for a fixed one.
    :param level: of zlib, from 1 to 9.
    """

    name: str
    chunks: Iterable[bytes]
    compress: bool = True
    size: int | None = None
    modified: float | None = None
    level: int = _LEVEL


def import_zipstream(format_name: str) -> Any:
    """Import zipstream-ng.

    :param format_name: the format that needs it. Its extra has the same name.
    :raises ImportError: when it is not installed.
    """
    try:
        from zipstream import ng
    except ImportError as error:
        raise ImportError(
            f"{format_name} needs zipstream-ng. Install it with: "
            f"pip install 'tgstream[{format_name.lower()}]'"
        ) from error
    return ng


class Archive:
    """An archive, written member by member.

    :param format_name: the format that writes it, for error messages.
    """

    def __init__(self, format_name: str) -> None:
        self._package = import_zipstream(format_name)
        self._central = self._package.ZipStream()
        self._position = 0

    def write(self, members: Iterable[Member]) -> Generator[bytes, None, None]:
        """Yield the archive. The central directory comes after the last member.

        A member is taken from ``members`` when the one before it has been written.
        """
        for member in members:
            yield from self.add(member)
        yield from self.finish()

    def add(self, member: Member) -> Iterator[bytes]:
        """Yield the header of a member, its data, and the sizes behind it.

        :raises ValueError: when it has more or fewer bytes than its ``size``.
        """
        info = self._make_info(member)
        yield self._count(self._make_header(info, member))
        data = _count_data(info, member)
        for chunk in _deflate(data, member.level) if member.compress else data:
            # An empty chunk lets the stream commit, or end, before the next one.
            info.compress_size += len(chunk)
            yield self._count(chunk)
        yield self._count(self._make_descriptor(info, member))
        self._central._filelist.append(info)

    def finish(self) -> Iterator[bytes]:
        """Yield the central directory, without which no reader opens the archive."""
        self._central._pos = self._position
        footer: Iterator[bytes] = self._central.footer()
        return footer

    def measure(self, members: Iterable[Member]) -> int:
        """Return the bytes that :meth:`write` would yield. It takes no data.

        The members must have their ``size``, and must not be compressed.
        """
        for member in members:
            info = self._make_info(member)
            self._count(self._make_header(info, member))
            info.file_size = info.compress_size = member.size
            self._position += info.file_size
            self._count(self._make_descriptor(info, member))
            self._central._filelist.append(info)
        return self._position + sum(map(len, self.finish()))

    def _count(self, data: bytes) -> bytes:
        self._position += len(data)
        return data

    def _make_info(self, member: Member) -> Any:
        modified = _FIXED_TIME
        if member.modified is not None:
            utc = datetime.fromtimestamp(member.modified, timezone.utc)
            modified = min(max(utc.timetuple()[:6], _FIXED_TIME), _LAST_TIME)
        info = self._package.ZipStreamInfo(member.name, modified)
        if member.modified is not None and 0 <= member.modified < 1 << 31:
            # The time in UTC, because a ZIP has times without a zone (Info-ZIP's "UT").
            info.extra = pack("<2sHBl", b"UT", 5, 1, int(member.modified))
        info.compress_type = _DEFLATED if member.compress else _STORED
        info.create_system = _UNIX
        info.external_attr = _REGULAR_FILE
        if member.compress or member.size != 0:
            info.flag_bits = _HAS_DESCRIPTOR
        info.header_offset = self._position
        info.CRC = info.file_size = info.compress_size = 0
        return info

    def _make_header(self, info: Any, member: Member) -> bytes:
        zip64 = _is_known_large(member)
        if member.compress or member.size is None:
            info.extract_version = _ZIP64_VERSION  # it may get large
            header: bytes = info.FileHeader(zip64)
            info.extract_version = _VERSION
            return header
        # Its size is in the header too. Else the end of data that is not compressed
        # could only be found in the central directory, which a stream has at its end.
        flags, info.flag_bits = info.flag_bits, 0
        info.file_size = info.compress_size = member.size
        header = info.FileHeader(zip64)
        info.flag_bits, info.file_size, info.compress_size = flags, 0, 0
        return header[:6] + bytes([header[6] | flags]) + header[7:]

    def _make_descriptor(self, info: Any, member: Member) -> bytes:
        if not info.flag_bits:
            return b""
        is_large = max(info.file_size, info.compress_size) > _MAX_SIZE
        descriptor: bytes = info.DataDescriptor(is_large or _is_known_large(member))
        return descriptor


def _is_known_large(member: Member) -> bool:
    return member.size is not None and member.size > _MAX_SIZE


def _count_data(info: Any, member: Member) -> Iterator[bytes]:
    """The data of a member, while its size and its checksum are kept.

    :raises ValueError: when it is not as long as it should be.
    """
    exact = None if member.compress else member.size
    for chunk in member.chunks:
        info.CRC = zlib.crc32(chunk, info.CRC)
        info.file_size += len(chunk)
        if exact is not None and info.file_size > exact:
            break
        yield chunk
    if exact is not None and info.file_size != exact:
        more = "more" if info.file_size > exact else "fewer"
        raise ValueError(
            f"the member {member.name!r} has {more} than {exact} bytes, which was its "
            "size when the response started"
        )


def _deflate(chunks: Iterable[bytes], level: int) -> Iterator[bytes]:
    """The chunks, compressed and flushed now and then."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    missing, flushed = _FIRST_FLUSH, time.monotonic()
    for chunk in chunks:
        view = memoryview(chunk)
        while len(view) >= missing:
            yield compressor.compress(view[:missing])
            yield compressor.flush(zlib.Z_SYNC_FLUSH)
            view = view[missing:]
            missing, flushed = _FLUSH, time.monotonic()
        missing -= len(view)
        yield compressor.compress(view)
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            yield compressor.flush(zlib.Z_SYNC_FLUSH)
            missing, flushed = _FLUSH, time.monotonic()
    yield compressor.flush()
