"""The command line: ``doctor`` and ``create-tables``.

The application is loaded and examined in a child process, because this process has
imported tgstream already (:mod:`tgstream.doctor.loader` explains why that matters). The
child has the same interpreter, options, environment, folder, input and output.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .finding import print_findings
from .package_checks import check_packages

DESCRIPTION = """\
Check whether streams pass through the whole stack of an application. The doctor sends
streams of its own, and no controller of the application runs. Without a file, check
the installed packages.

Exit status: 0 if no check failed, 1 if streams will break or the application cannot be
loaded, 2 for a wrong command line.
"""

CREATE_TABLES = """\
Create the tables of channels in the database of an application, for the option
tgstream.channels = database://. Tables that exist are not changed.

Exit status: 0 if the tables exist now, 1 if they could not be created, 2 for a wrong
command line.
"""

_CHILD = """\
import os, runpy, sys
if sys.path[0] == "":  # python -m has the whole path here
    sys.path[0] = os.getcwd()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except KeyboardInterrupt:
    sys.exit(130)
"""
"""It runs the file of the loader, and neither imports the package nor adds its folder
to ``sys.path``, where its modules would hide the application's own."""

_FLAGS = {
    "isolated": "I",
    "ignore_environment": "E",
    "no_user_site": "s",
    "safe_path": "P",
    "no_site": "S",
    "dont_write_bytecode": "B",
    "optimize": "O",
    "bytes_warning": "b",
}
"""Attributes of ``sys.flags``, and the interpreter's options that set them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param arguments: those after ``python -m tgstream``, by default this process's.
    :returns: the exit status.
    :raises SystemExit: for ``--help`` and for a wrong command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tgstream")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="check whether an application's stack streams",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "config",
        nargs="?",
        help="the application's file, such as config.ini or config.ini#name",
    )
    doctor.add_argument(
        "--path",
        default="/tgstream-doctor",
        help="the path to request, if TurboGears does not get every path (%(default)s)",
    )
    tables = commands.add_parser(
        "create-tables",
        help="create the tables of tgstream.channels = database://",
        description=CREATE_TABLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tables.add_argument("config", help="the application's file, such as config.ini")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_usage()
        return 2
    if options.config is None:
        return print_findings(check_packages())
    if options.command == "create-tables":
        _check_file(tables, options.config)
        return _run_in_child(options.config)
    _check_file(doctor, options.config)
    if not options.path.startswith("/"):
        doctor.error(f"--path must begin with a slash, got {options.path!r}")
    return _run_in_child(options.config, options.path)


def _check_file(command: argparse.ArgumentParser, config: str) -> None:
    file = config.partition("#")[0]
    if os.path.isdir(file):
        command.error(f"{file} is a directory. Name a file, such as {file}/config.ini")
    if not os.path.isfile(file):
        command.error(f"file not found: {file!r}")


def _run_in_child(*arguments: str) -> int:
    """Load the application in a child process, and run the command there.

    :param arguments: those of the loader.
    :returns: the child's exit status. 128 + N if signal N has ended it.
    """
    loader = str(Path(__file__).with_name("loader.py"))
    command = [sys.executable, *_interpreter_options(), "-c", _CHILD]
    # call() kills the child at any exception. A terminal sends Ctrl-C to both.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        status = subprocess.call([*command, loader, *arguments])
    except KeyboardInterrupt:
        return 130
    return status if status >= 0 else 128 - status


def _interpreter_options() -> list[str]:
    """The options that this interpreter was started with, such as ``-I -W error``."""
    letters = [letter * getattr(sys.flags, name, 0) for name, letter in _FLAGS.items()]
    extra = [
        f"-X{name}" if value is True else f"-X{name}={value}"
        for name, value in sys._xoptions.items()
    ]
    warnings = [f"-W{option}" for option in sys.warnoptions]
    return [f"-{letter}" for letter in letters if letter] + extra + warnings
