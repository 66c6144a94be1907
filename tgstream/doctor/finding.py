"""The findings of the doctor, and how they are printed."""

from __future__ import annotations

import io
import os
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
WIDTH = 88
_INDENT = 26

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "FAIL"
"""All is well. Good to know. Some streams will suffer. Streams will break."""


class Finding(NamedTuple):
    """The result of a check: its mark, the check's name, the result, and advice."""

    mark: str
    check: str
    result: str
    advice: str = ""


def print_findings(findings: Sequence[Finding]) -> int:
    """Print findings and a summary.

    :returns: the exit status: 1 if a check failed, else 0.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may not be encodable
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(format_findings(findings), summarize(findings), sep="\n", flush=True)
    except BrokenPipeError:  # the reader was head. Python's own flush must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(any(finding.mark == FAIL for finding in findings))


def format_findings(findings: Iterable[Finding]) -> str:
    """The findings as lines of text. The first line of each begins with its mark."""
    lines: list[str] = []
    for mark, check, result, advice in findings:
        wrapped = _wrap(result)
        if advice:
            first, *more = _wrap(advice, 3)
            wrapped += [f"-> {first}", *(f"   {line}" for line in more)]
        lines.append(f"{mark:<6}{check:<20}{wrapped[0]}")
        lines += [f"{'':<{_INDENT}}{line}" for line in wrapped[1:]]
    return "\n".join(lines)


def _wrap(text: str, indent: int = 0) -> list[str]:
    """The lines of a text, at least one. A word is never split."""
    width = WIDTH - _INDENT - indent
    return textwrap.wrap(
        text, width, break_long_words=False, break_on_hyphens=False
    ) or [""]


def summarize(findings: Sequence[Finding]) -> str:
    """The last line: how many checks passed or failed."""
    marks = [finding.mark for finding in findings]
    if FAIL in marks:
        return f"{marks.count(FAIL)} of {len(marks)} checks failed: streams will break."
    count = marks.count(WARN) + marks.count(NOTE)
    advice = f", {count} with advice" if count else ""
    return f"{len(marks)} checks passed{advice}."


def describe_error(error: BaseException) -> str:
    """The type and the message of an error, on one line."""
    message = " ".join(str(error).split())
    if len(message) > 300:
        message = f"{message[:300]}..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def describe_origin(error: BaseException) -> str:
    """The file and line of the application that raised an error, or ``""``."""
    paths = sysconfig.get_paths()
    installed = paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = os.path.abspath(frame.filename)
        if not frame.filename.startswith("<") and not file.startswith(
            (*installed, _PACKAGE)
        ):
            folder = os.path.join(os.getcwd(), "")
            return f", in {file.removeprefix(folder)}, line {frame.lineno}"
    return ""
