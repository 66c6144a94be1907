"""What the doctor has found: a line for each check, and advice where it helps.

Rule: the text is plain, and the same for the same application; nothing here looks.
"""

from __future__ import annotations

import os
import sysconfig
import textwrap
import traceback
from collections.abc import Iterable
from typing import NamedTuple

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
WIDTH = 88
_INDENT = 26

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "FAIL"
"""All is well; good to know; streams suffer in some cases; streams break."""


class Finding(NamedTuple):
    """One check: its mark, its name, what was found, and a sentence of advice."""

    mark: str
    name: str
    found: str
    advice: str = ""


def text_of(findings: Iterable[Finding]) -> str:
    """The findings as lines of text, each check beginning with its mark."""
    lines: list[str] = []
    for mark, name, found, advice in findings:
        wrapped = _wrapped(found)
        if advice:
            first, *more = _wrapped(advice, 3)
            wrapped += [f"-> {first}", *(f"   {line}" for line in more)]
        lines.append(f"{mark:<6}{name:<20}{wrapped[0]}")
        lines += [f"{'':<{_INDENT}}{line}" for line in wrapped[1:]]
    return "\n".join(lines)


def _wrapped(text: str, less: int = 0) -> list[str]:
    width = WIDTH - _INDENT - less
    return textwrap.wrap(
        text, width, break_long_words=False, break_on_hyphens=False
    ) or [""]


def said(error: BaseException) -> str:
    """An error in a sentence: its type and what it says, on one line."""
    message = " ".join(str(error).split())
    if len(message) > 300:
        message = f"{message[:300]}..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def raised_at(error: BaseException) -> str:
    """Where in the application an error came from; nothing if it is not of its code."""
    paths = sysconfig.get_paths()
    installed = paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = os.path.abspath(frame.filename)
        if not frame.filename.startswith("<") and not file.startswith(
            (*installed, _PACKAGE)
        ):
            here = os.path.join(os.getcwd(), "")
            return f", in {file.removeprefix(here)}, line {frame.lineno}"
    return ""
