"""The options of a stream, checked where they are given."""

from __future__ import annotations

import codecs
import random
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict

from ..formats.protocols import Batched, Format, find_method
from .refusals import is_of_events

if TYPE_CHECKING:
    from typing_extensions import Unpack

Commit: TypeAlias = Literal["end", "each", "manual"] | int
LimitKey: TypeAlias = Callable[[Any], Hashable] | Literal["user", "remote_addr"]
LimitAction: TypeAlias = Literal["refuse", "replace"]
Busy: TypeAlias = Literal["retry"]

clock = time.perf_counter


class StreamOptions(TypedDict, total=False):
    """The options of ``@stream`` and of :class:`Stream`, which describes them."""

    commit: Commit | None
    chunk_size: int | None
    filename: str | None
    charset: str | None
    length: int | None
    max_seconds: float | None
    limit: int | None
    limit_by: LimitKey | None
    limit_action: LimitAction | None
    busy: Busy | None
    recheck_seconds: float | None
    spool: bool | None
    compress: bool | None


_NAMES = StreamOptions.__annotations__.keys()


class Options(NamedTuple):
    """The format and the options of a stream. None is an option that was not given."""

    format: Format | None = None
    commit: Commit | None = None
    chunk_size: int | None = None
    filename: str | None = None
    charset: str | None = None
    length: int | None = None
    max_seconds: float | None = None
    limit: int | None = None
    limit_by: LimitKey | None = None
    limit_action: LimitAction | None = None
    busy: Busy | None = None
    recheck_seconds: float | None = None
    spool: bool | None = None
    compress: bool | None = None
    formats: tuple[Format, ...] | None = None
    """The formats from which the request has chosen, if there were several."""

    def or_else(self, others: Options) -> Options:
        """These options. Those that were not given are taken from ``others``."""
        return others._replace(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by their names."""
        return {name: v for name, v in self._asdict().items() if v is not None}


def check(where: str, format: Any = None, **options: Unpack[StreamOptions]) -> Options:
    """Check the options of a stream.

    :param where: the place that gives them, for error messages.
    :raises TypeError: when an option is unknown or has a wrong type.
    :raises ValueError: when an option has an invalid value.
    """
    if unknown := sorted(options.keys() - _NAMES):
        raise TypeError(
            f"{where}: unknown option {', '.join(unknown)}. The options are "
            f"{', '.join(sorted(_NAMES))}"
        )
    if isinstance(format, type):
        format = format()
    checked = Options(format=format, **options)
    _check_format(where, format)
    _check_commit(where, checked.commit)
    _check_bytes(where, "chunk_size", checked.chunk_size)
    _check_bytes(where, "length", checked.length)
    filename = checked.filename
    if filename is not None and not isinstance(filename, str):
        raise TypeError(
            f"{where}: filename must be a str, got "
            f"{type(filename).__name__}: {filename!r:.80}"
        )
    if checked.charset is not None:
        check_charset(where, checked.charset)
    _check_seconds(where, "max_seconds", checked.max_seconds)
    _check_seconds(where, "recheck_seconds", checked.recheck_seconds)
    _check_limit(where, checked)
    _check_switch(where, "spool", checked.spool)
    _check_switch(where, "compress", checked.compress)
    if checked.spool and format is not None:
        check_spoolable(where, format)
    return checked


def _check_limit(where: str, options: Options) -> None:
    limit, limit_by = options.limit, options.limit_by
    if limit is not None and (not _is_whole(limit) or limit < 1):
        raise ValueError(
            f"{where}: limit must be an integer >= 1 or None, got {limit!r}"
        )
    if not (
        limit_by is None or callable(limit_by) or limit_by in ("user", "remote_addr")
    ):
        raise ValueError(
            f"{where}: limit_by must be 'user', 'remote_addr' or a function that takes "
            f"the request, got {limit_by!r:.80}"
        )
    _check_word(where, "limit_action", options.limit_action, ("refuse", "replace"))
    _check_word(where, "busy", options.busy, ("retry",))
    if options.format is not None:
        _check_busy(where, options)


def check_limit_is_whole(where: str, options: Options) -> None:
    """Check that the options of a limit can be used with the others.

    A :class:`Stream` may have some of them from its decorator.

    :raises ValueError: when there is no limit, or the format has no ``busy``.
    """
    if options.limit is None:
        for name in ("limit_by", "limit_action", "busy"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"{where}: {name}={value!r:.80} needs limit, the number of open "
                    "streams. Set limit, or omit it"
                )
    _check_busy(where, options)


def _check_busy(where: str, options: Options) -> None:
    format = options.format
    if options.busy is not None and not is_of_events(format):
        got = "no format" if format is None else type(format).__name__
        raise ValueError(
            f"{where}: busy={options.busy!r} is for clients of events, and needs a "
            f"format such as SSE, got {got}. Omit it for the status 503"
        )


def _check_word(where: str, option: str, value: Any, words: tuple[str, ...]) -> None:
    if value is not None and value not in words:
        raise ValueError(
            f"{where}: {option} must be {' or '.join(map(repr, words))} or None, got "
            f"{value!r:.80}"
        )


def _check_format(where: str, format: Any) -> None:
    if format is None or (
        hasattr(format, "content_type") and callable(getattr(format, "encode", None))
    ):
        return
    if isinstance(format, list | tuple):
        raise TypeError(
            f"{where}: takes one format, got {type(format).__name__}: {format!r:.80}. "
            "A list of formats is for @stream([CSV, NDJSON])"
        )
    raise TypeError(
        f"{where}: a format must have an attribute content_type and a method "
        f"encode(items), such as tgstream.CSV has, got {type(format).__name__}: "
        f"{format!r:.80}"
    )


def _check_commit(where: str, commit: Any) -> None:
    if commit is None or commit in ("end", "each", "manual"):
        return
    if not _is_whole(commit) or commit < 1:
        raise ValueError(
            f"{where}: commit must be 'end', 'each', 'manual' or a number of items "
            f">= 1, got {commit!r}"
        )


def _check_bytes(where: str, option: str, value: Any) -> None:
    if value is not None and (not _is_whole(value) or value < 0):
        raise ValueError(
            f"{where}: {option} must be a number of bytes, an integer >= 0, or None, "
            f"got {value!r}"
        )


def _check_seconds(where: str, option: str, value: Any) -> None:
    if value is None or (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < float("inf")
    ):
        return
    raise ValueError(
        f"{where}: {option} must be a number of seconds > 0 or None, got {value!r}"
    )


def _check_switch(where: str, option: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(
            f"{where}: {option} must be True, False or None, got "
            f"{type(value).__name__}: {value!r:.80}"
        )


def check_spoolable(where: str, format: Any) -> None:
    """Refuse ``spool=True`` for a format that sends while its generator waits.

    :raises ValueError: when its body has no end, or it sends heartbeats.
    """
    if getattr(format, "endless", False) or getattr(format, "heartbeat", None):
        raise ValueError(
            f"{where}: {type(format).__name__} cannot be spooled, because its items "
            "must be sent when they are made. Omit spool=True"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_charset(where: str, charset: Any) -> None:
    """Check the name of an encoding. It is also sent, in ``Content-Type``.

    :raises ValueError: when it is not the name of a text encoding.
    """
    try:
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:+-]*", charset) is None:
            raise LookupError
        codecs.getincrementalencoder(charset)
        "".encode(charset)  # fails for rot13 and others that do not encode to bytes
    except (LookupError, TypeError, UnicodeError):
        raise ValueError(
            f"{where}: charset must be the name of a text encoding of Python, got "
            f"{charset!r}. Omit it for UTF-8"
        ) from None


class FormatTraits(NamedTuple):
    """The optional attributes of a format, read when a stream starts."""

    commit: Commit | None
    chunk_size: int | None
    charset: str | None
    headers: Mapping[str, str]
    endless: bool
    heartbeat: float | None
    suffix: str | None
    encode_sources: Callable[[Mapping[str, Batched]], Iterator[str | bytes]] | None
    """Encodes several sources by their names. None for a format of one source."""
    measure: Callable[[Any], int | None] | None
    """Returns the bytes of the body of a source, None if they are not known."""

    @classmethod
    def of(cls, format: Format | None) -> FormatTraits:
        """Read the attributes that ``format`` has."""
        if format is None:
            return _NO_TRAITS
        return cls(
            commit=getattr(format, "commit", None),
            chunk_size=getattr(format, "chunk_size", None),
            charset=getattr(format, "charset", None),
            headers=getattr(format, "headers", {}),
            endless=getattr(format, "endless", False),
            heartbeat=getattr(format, "heartbeat", None),
            suffix=getattr(format, "suffix", None),
            encode_sources=getattr(format, "encode_sources", None),
            measure=find_method(format, "measure"),
        )


_NO_TRAITS = FormatTraits(None, None, None, {}, False, None, None, None, None)


class SpoolSettings(NamedTuple):
    """The options of an application for spooled streams."""

    directory: str | None
    """The directory of the temporary files. None for the system's."""
    max_bytes: int
    """Maximum bytes of a body. 0 for no maximum."""


class Plan(NamedTuple):
    """The options of one stream, completed by its format and by the application."""

    controller: str
    format: Format | None
    traits: FormatTraits
    commit_every: int
    """Items after which the stream commits. 0 is a commit at its end."""
    commit_manually: bool
    chunk_size: int
    """Bytes of a chunk. 0 is a chunk for each item."""
    flush_seconds: float
    """Seconds after which a pull sends the output that it has buffered."""
    max_seconds: float | None
    idle_transaction_seconds: float
    disconnect_check_seconds: float
    compress: Callable[[str], bool] | None
    """Whether a response of a content type is compressed. None for no compression."""
    spool: SpoolSettings | None = None
    """None if the body is sent while it is made."""

    def lifetime(self, max_seconds: float) -> float:
        """The seconds until the stream is ended.

        They are up to a tenth less than the maximum if clients reconnect, so that they
        do not reconnect all at once.
        """
        share = random.uniform(0.9, 1) if self.traits.endless else 1
        return max_seconds * share
