"""ZIP: the format that writes an archive while its members are made."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any
from unicodedata import normalize

from .archive import Archive, Member, import_zipstream
from .filenames import clean_path
from .protocols import Batched
from .values import BYTES_TYPES

_BLOCK_SIZE = 1 << 16
_KNOWN_TYPES = (str, *BYTES_TYPES, os.PathLike)
_MAX_NAME = 0xFFFF  # bytes (APPNOTE.TXT, 4.4.10)


class ZIP:
    """A ZIP archive (APPNOTE.TXT). Each item is a pair of a name and a content.

    The content of a member is one of these:

    - ``bytes``, or text, which is encoded as UTF-8
    - a path (``os.PathLike``), whose file is opened when it is the member's turn
    - an open binary file, from its position to its end
    - an iterable of bytes, or :func:`copy`
    - a :class:`Stream`, which is encoded by its own format in the running stream

    A name may have folders (``2026/users.csv``). Its parts are cleaned like
    ``filename``, and ``..`` and drives are removed. Files and iterables are closed
    after their member, also if the stream fails or the client disconnects. The member
    of a path has the modification time of its file. All other members have the same
    time (1980-01-01), so that equal content gives equal bytes.

    :param compress: whether to compress the members. If not, and the controller returns
        a list of members whose sizes are known, the response has a ``Content-Length``.
        Sizes are known of bytes, text, paths, seekable files and of a ``Stream`` with
        ``length``.
    :raises ImportError: when zipstream-ng is not installed.
    :raises TypeError: when ``compress`` is not a bool.
    """

    content_type = "application/zip"
    suffix = "zip"

    def __init__(self, compress: bool = True) -> None:
        if not isinstance(compress, bool):
            raise TypeError(
                f"ZIP: compress must be True or False, got {type(compress).__name__}: "
                f"{compress!r:.80}"
            )
        import_zipstream("ZIP")
        self._compress = compress

    def encode(self, items: Iterable[Any]) -> Iterator[bytes]:
        """Yield the archive. Its central directory comes after the last item.

        :raises TypeError: when an item is not a pair, or has an unknown content.
        :raises ValueError: when two items have the same name, or one has the name of
            a folder, or the size of a content has changed.
        :raises OSError: when a file cannot be read.
        """
        with closing(self._make_members(items)) as members:
            yield from Archive("ZIP").write(members)

    def measure(self, source: Any) -> int | None:
        """The bytes of the archive, None if they are not known.

        :param source: the items. They are read only if they are a list or a tuple.
        """
        if self._compress or not isinstance(source, list | tuple):
            return None
        members = []
        for item in source:
            if not _is_pair(item):
                return None  # encode() raises the error of the item
            name, content = clean_path(item[0]), item[1]
            size, modified = _measure(content), _find_time(content)
            if size is None or _is_too_long(name):
                return None
            members.append(Member(name, (), False, size, modified))
        return Archive("ZIP").measure(members)

    def _make_members(self, items: Iterable[Any]) -> Generator[Member, None, None]:
        names = _Names()
        for number, item in enumerate(items, 1):
            _check_pair(number, item)
            name, content = item
            name = clean_path(name)
            where = f"item {number}, {name!r:.80}"
            with ExitStack() as stack:
                _close_later(stack, content)
                names.add(where, name, number)
                _check_content(where, content)
                is_path = isinstance(content, os.PathLike)
                # To measure a compressed file, for example, is to read it.
                known = is_path or not self._compress
                size = _measure(content) if known else None
                modified = _find_time(content)
                if is_path:
                    content = stack.enter_context(_open(where, content))
                chunks = stack.enter_context(closing(_read(where, content)))
                yield Member(name, chunks, self._compress, size, modified)


def _check_pair(number: int, item: Any) -> None:
    """Check that an item is a name and a content.

    :raises TypeError: when it is not.
    """
    if _is_pair(item):
        return
    if isinstance(item, tuple) and len(item) == 2:
        raise TypeError(
            f"item {number}: the name must be a str, got {type(item[0]).__name__}: "
            f"{item[0]!r:.80}"
        )
    raise TypeError(
        f"item {number} must be a pair of a name and a content, such as "
        f"('users.csv', b'...'), got {type(item).__name__}: {item!r:.80}"
    )


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, Sequence)
        and not isinstance(item, str)
        and len(item) == 2
        and isinstance(item[0], str)
    )


class _Names:
    """The names of an archive's members, each of which must be new."""

    def __init__(self) -> None:
        self._members: dict[str, int] = {}  # the numbers of the items
        self._folders: dict[str, int] = {}  # the first item in each of them

    def add(self, where: str, name: str, number: int) -> None:
        """Add a name. Windows and macOS compare names without case.

        :raises ValueError: when it is not new or too long, or when a file would have
            the name of a folder.
        """
        if _is_too_long(name):
            raise ValueError(f"{where}: a name may have {_MAX_NAME} bytes. Shorten it")
        key = normalize("NFC", name).casefold()
        first = self._members.setdefault(key, number)
        if first != number:
            raise ValueError(
                f"{where}: item {first} has the same name, or one that differs only in "
                "upper and lower case. Give each member another name"
            )
        other = self._folders.get(key)
        while other is None and (key := key.rpartition("/")[0]):
            other = self._members.get(key)
            if self._folders.setdefault(key, number) != number:
                break  # its own folders were checked with it
        if other is not None:
            raise ValueError(
                f"{where}: one name is a file and a folder, here and in item {other}, "
                "so that the archive could not be extracted. Rename one of them"
            )


def _is_too_long(name: str) -> bool:
    return len(name.encode()) > _MAX_NAME


def _check_content(where: str, content: Any) -> None:
    if isinstance(content, _KNOWN_TYPES) or hasattr(content, "encode_member"):
        return
    if isinstance(content, io.TextIOBase):
        raise TypeError(f"{where} is a text file. Open it with the mode 'rb'")
    if isinstance(content, Batched | Mapping) or not (
        hasattr(content, "__iter__") or hasattr(content, "read")
    ):
        raise TypeError(
            f"{where} must have bytes, text, a path, a binary file, an iterable of "
            f"bytes or a Stream, got {type(content).__name__}: {content!r:.80}. "
            "To encode rows, pass Stream(rows(...), CSV)"
        )


def _measure(content: Any) -> int | None:
    """The bytes of a content, None if they are not known."""
    if isinstance(content, str):
        return len(content.encode(errors="replace"))
    if isinstance(content, BYTES_TYPES):
        return memoryview(content).nbytes
    try:
        if isinstance(content, os.PathLike):
            status = os.stat(content)
            return status.st_size if stat.S_ISREG(status.st_mode) else None
        if hasattr(content, "measure_member"):
            size: int | None = content.measure_member()
            return size
        if hasattr(content, "read") and content.seekable():
            position = content.tell()
            size = content.seek(0, os.SEEK_END) - position
            content.seek(position)
            return size
    except (AttributeError, OSError, ValueError):
        pass  # encode() raises the error of the file, if it has one
    return None


def _find_time(content: Any) -> float | None:
    """The modification time of a path's file. Other contents have none."""
    if isinstance(content, os.PathLike):
        try:
            return os.stat(content).st_mtime
        except OSError:
            pass  # encode() raises it
    return None


def _open(where: str, path: os.PathLike[Any]) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        reason = f"{where}: {error.strerror}"
        raise OSError(error.errno, reason, error.filename) from error


def _close_later(stack: ExitStack, content: Any) -> None:
    if hasattr(content, "close"):
        stack.callback(content.close)


def _read(where: str, content: Any) -> Generator[bytes, None, None]:
    """The chunks of a content.

    :raises TypeError: when it yields other values than bytes.
    """
    if isinstance(content, str):
        try:
            yield content.encode()
        except UnicodeEncodeError as error:
            error.reason += f" in {where}. Replace the character"
            raise
    elif isinstance(content, BYTES_TYPES):
        data = bytes(content)
        for start in range(0, len(data), _BLOCK_SIZE):
            yield data[start : start + _BLOCK_SIZE]
    elif hasattr(content, "encode_member"):
        yield from content.encode_member()
    else:
        chunks = content
        if hasattr(content, "read"):
            chunks = iter(lambda: content.read(_BLOCK_SIZE), b"")
        for chunk in chunks:
            if not isinstance(chunk, BYTES_TYPES):
                raise TypeError(
                    f"{where} yielded {type(chunk).__name__}: {chunk!r:.80}, but a "
                    "member must yield bytes. To encode rows, pass "
                    "Stream(rows(...), CSV)"
                )
            yield bytes(chunk)
