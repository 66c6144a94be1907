"""The command line: ``python -m tgstream doctor [config.ini]``.

Rule: the order is here, for it is what counts: the application is loaded when tgstream
has been taken away again, and what asks it is imported after that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import _loading

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
        return _show_environment()
    if not os.path.isfile(given.config.partition("#")[0]):
        doctor.error(f"there is no file {given.config.partition('#')[0]}")
    if not given.path.startswith("/"):
        doctor.error("--path begins with a slash")
    return _examine(given.config, given.path, is_alone)


def _show_environment() -> int:
    from ._doctor import summary
    from ._environment import environment
    from ._findings import text_of

    findings = environment()
    print(text_of(findings))
    print(summary(findings))
    return int(any(each.mark == "FAIL" for each in findings))


def _examine(config: str, path: str, is_alone: bool) -> int:
    if is_alone:
        _loading.forget()
    try:
        loaded, error = _loading.load(config), None
    except _loading.LoadError as raised:
        loaded, error = None, raised
    from tgstream._doctor import examine, refused, summary
    from tgstream._findings import text_of

    if loaded is None:
        assert error is not None
        findings = refused(config, error)
    else:
        findings = examine(config, loaded, path)
    print(text_of(findings))
    print(summary(findings))
    return int(any(each.mark == "FAIL" for each in findings))


if __name__ == "__main__":
    sys.exit(main(is_alone=True))
