"""The command line: ``python -m tgstream doctor [config.ini]``.

Rule: the order is here, for it is what counts: the application is loaded when tgstream
has been taken away again, and what asks it is imported after that.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import loader as _loading

if TYPE_CHECKING:
    from .finding import Finding

EXAMINE = """\
Say, check by check, whether an application's stack streams, by streams that are sent
through all of it. No controller of the application runs. Without a file, say what is
installed.

Exit status: 1 where streams will break, or the application cannot be loaded; 2 for a
wrong command line; else 0.
"""


def main(arguments: Sequence[str] | None = None, is_alone: bool = False) -> int:
    """Run the command line.

    :param arguments: what stands behind ``python -m tgstream``; None for the process's.
    :param is_alone: whether nothing else in this process needs tgstream.
    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m tgstream")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="say whether an application's stack streams",
        description=EXAMINE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "config",
        nargs="?",
        help="the application's file, as config.ini or config.ini#name",
    )
    doctor.add_argument(
        "--path",
        default="/tgstream-doctor",
        help="what to ask for, where not every path leads to TurboGears (%(default)s)",
    )
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_usage()
        return 2
    if given.config is None:
        return _environment()
    file = given.config.partition("#")[0]
    if os.path.isdir(file):
        doctor.error(f"{file} is a directory; name the file, as {file}/config.ini")
    if not os.path.isfile(file):
        doctor.error(f"there is no file {file!r}")
    if not given.path.startswith("/"):
        doctor.error("--path begins with a slash")
    return _examine(given.config, given.path, is_alone)


def _environment() -> int:
    from .package_checks import environment

    return _tell(environment())


def _examine(config: str, path: str, is_alone: bool) -> int:
    if is_alone:
        _loading.forget()
    try:
        loaded = _loading.load(config)
    except _loading.LoadError as error:
        from tgstream.doctor.examine import refused

        return _tell(refused(config, error))
    from tgstream.doctor.examine import examine

    return _tell(examine(config, loaded, path))


def _tell(findings: list[Finding]) -> int:
    """Print what was found; what is to be the exit status."""
    from tgstream.doctor.examine import summary
    from tgstream.doctor.finding import text_of

    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have what it cannot say
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text_of(findings), summary(findings), sep="\n", flush=True)
    except BrokenPipeError:  # head has had enough; Python's own flush is not to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(any(each.mark == "FAIL" for each in findings))
