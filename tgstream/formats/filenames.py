"""Names of files, made from any text: no path, no trick, and not too long.

``filename`` and the names of a ZIP's members come from users, and are written to disks
of any system.
"""

from __future__ import annotations

import re
import unicodedata

_MAX_BYTES = 200
"""Of a file name. File systems allow 255, and browsers add ``(1).crdownload``."""

_SPACES = [0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
_TRIMMED = "." + "".join(map(chr, _SPACES))
"""Characters that a file name must not begin or end with."""

_DEVICE = re.compile(
    r"(con|prn|aux|nul|(com|lpt)[1-9¹²³]|con(in|out)\$)\s*(\.|$)", re.IGNORECASE
)
"""Names that Windows reserves for its devices, with any suffix."""

_FORBIDDEN = re.compile(r'[<>:"|?*]')
"""Characters that Windows allows in no name."""


def clean_filename(filename: str) -> str:
    """The last part of a path, without what a user or a file system could misread."""
    return _clean_part(re.split(r"[/\\]", filename)[-1]) or "download"


def clean_path(name: str) -> str:
    """A path with ``/`` between its folders, each cleaned like the name of a file.

    Empty parts, ``.`` and ``..`` are removed. So are characters that Windows forbids,
    because its Explorer cannot open an archive that has such a name.
    """
    parts = map(_clean_part, re.split(r"[/\\]", _FORBIDDEN.sub("_", name)))
    return "/".join(filter(None, parts)) or "download"


def _clean_part(part: str) -> str:
    """A part of a path, cleaned. Empty if there is nothing left."""
    name = "".join(c for c in part if not _is_hidden(c))
    stem, dot, suffix = name.rpartition(".")
    if dot and not stem.strip(_TRIMMED):
        suffix = suffix.strip(_TRIMMED)
        name = f"download.{suffix}" if suffix else ""
    name = _truncate(name.strip(_TRIMMED)).strip(_TRIMMED)
    name = re.sub(r"^([A-Za-z]):", r"\1_", name)  # a drive
    return f"_{name}" if _DEVICE.match(name) else name


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


def _truncate(name: str) -> str:
    """The name cut to the length that a file system allows, with a short suffix."""
    stem, dot, suffix = name.rpartition(".")
    ending = (dot + suffix).encode()
    if not dot or len(ending) > 11:
        stem, ending = name, b""
    start = stem.encode()[: _MAX_BYTES - len(ending)].decode(errors="ignore")
    return start + ending.decode()
