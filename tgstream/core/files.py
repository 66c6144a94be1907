"""Files whose size is known: their validators, and reading parts of them.

A :class:`StoredFile` is the source of a response that can be resumed. The response
sends :class:`FileParts` of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from .cleanup import close
from .errors import StreamError
from .ranges import Representation

BLOCK_SIZE = 65536
"""Maximum bytes of an item that is a block of a file."""


class StoredFile:
    """An open, seekable binary file, whose bytes from ``start`` on are the content.

    :param file: has ``seek()`` and ``read()``. It is closed at the end.
    :param content: the size of the content in bytes, and its validators.
    :param start: the position of the first byte of the content.
    """

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


def describe(file: Any) -> str:
    """The name of a file, or its type if it has no name."""
    name = getattr(file, "name", None)
    return (
        repr(name)
        if isinstance(name, str | bytes | os.PathLike)
        else type(file).__name__
    )
