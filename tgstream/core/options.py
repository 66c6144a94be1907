"""The options of a stream: what may be asked, checked where it is asked.

Rule: an option that makes no sense is refused at decoration, in one sentence that says
where, what was wrong, and what to write instead.
"""

from __future__ import annotations

import codecs
import random
import re
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from ..formats.protocols import Format

Commit: TypeAlias = Literal["end", "each", "manual"] | int

clock = time.perf_counter


class Options(NamedTuple):
    """What was asked of a stream, checked; None where it was left open."""

    format: Format | None
    commit: Commit | None
    chunk_size: int | None
    filename: str | None
    charset: str | None
    length: int | None
    max_seconds: float | None
    limit: int | None

    def or_else(self, others: Options) -> Options:
        """These options, and where one was left open, that of ``others``."""
        own = {name: v for name, v in self._asdict().items() if v is not None}
        return others._replace(**own)


def check(
    where: str,
    format: Any = None,
    commit: Any = None,
    chunk_size: Any = None,
    filename: Any = None,
    charset: Any = None,
    length: Any = None,
    max_seconds: Any = None,
    limit: Any = None,
) -> Options:
    """The options of the stream ``where``.

    :raises TypeError: when one is of a wrong type.
    :raises ValueError: when one has a value that makes no sense.
    """
    if isinstance(format, type):
        format = format()
    _check_format(where, format)
    _check_commit(where, commit)
    _check_bytes(where, "chunk_size", chunk_size, "bytes, or 0 for a chunk an item")
    _check_bytes(where, "length", length, "bytes, all that the stream will yield")
    if filename is not None and not isinstance(filename, str):
        raise TypeError(f"{where}: filename={filename!r} is no text; give it a str")
    if charset is not None:
        check_charset(where, charset)
    _check_seconds(where, max_seconds)
    if limit is not None and (not _is_whole(limit) or limit < 1):
        raise ValueError(
            f"{where}: limit must be an integer >= 1 or None, got {limit!r}"
        )
    return Options(
        *(format, commit, chunk_size, filename, charset, length, max_seconds, limit)
    )


def _check_format(where: str, format: Any) -> None:
    if format is None or (
        hasattr(format, "content_type") and callable(getattr(format, "encode", None))
    ):
        return
    raise TypeError(
        f"{where}: {format!r} is no format; a format has an attribute content_type and "
        "a method encode(items)"
    )


def _check_commit(where: str, commit: Any) -> None:
    if commit is None or commit in ("end", "each", "manual"):
        return
    if not _is_whole(commit) or commit < 1:
        raise ValueError(
            f"{where}: commit={commit!r} makes no sense; it is 'end', 'each', 'manual' "
            "or a number of items, from 1 on"
        )


def _check_bytes(where: str, option: str, value: Any, what: str) -> None:
    if value is not None and (not _is_whole(value) or value < 0):
        raise ValueError(
            f"{where}: {option}={value!r} makes no sense; it is a number of {what}"
        )


def _check_seconds(where: str, value: Any) -> None:
    if value is None or (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < float("inf")
    ):
        return
    raise ValueError(
        f"{where}: max_seconds={value!r} makes no sense; it is a number of seconds "
        "above 0, or None for no bound"
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_charset(where: str, charset: Any) -> None:
    """Refuse what cannot be a charset: its name is also sent, in ``Content-Type``.

    :raises ValueError: when it is not the name of an encoding for text.
    """
    try:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:+-]*", charset) is None:
            raise LookupError
        codecs.getincrementalencoder(charset)
        "".encode(charset)  # which refuses rot13: from text to text, or from bytes
    except (LookupError, TypeError, UnicodeError):
        raise ValueError(
            f"{where}: charset must be the name of a text encoding of Python, got "
            f"{charset!r}. Omit it for UTF-8"
        ) from None


class Plan(NamedTuple):
    """How a body is to be made: the options of a stream, resolved for one request."""

    controller: str
    format: Format | None
    every: int  # items after which it commits, 0: at the end
    manual: bool
    chunk_size: int  # bytes, 0: a chunk an item
    flush_seconds: float
    charset: Callable[[], str]
    length: Callable[[], int | None]  # bytes of the whole body, where they are known
    max_seconds: float | None = None  # of its life
    idle_transaction_seconds: float = 0.0  # before a warning; 0: never
    disconnect_check_seconds: float = 10.0

    def lifetime(self) -> float:
        """Seconds that it may live. Where clients come back, not all at once."""
        if self.max_seconds is None:
            return float("inf")
        share = random.uniform(0.9, 1) if getattr(self.format, "endless", False) else 1
        return self.max_seconds * share
