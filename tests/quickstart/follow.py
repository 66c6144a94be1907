"""Follow ``docs/tutorial.rst`` exactly, and print each command and its output.

    python3 -m tests.quickstart.follow FOLDER

FOLDER contains only the clone of tgstream. The command stops with exit code 1 at the
first command that fails, or whose output differs from the page.

It uses the standard library only, because it also runs without any package.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent

from tests.quickstart.tutorial import TUTORIAL, Block, apply, blocks, is_logged, matches

SERVE = "gearbox serve"
ADDRESS = ("127.0.0.1", 8080)
LOG = "server.log"
END = "end of command"


class Shell:
    """One shell for the whole tutorial, as a reader has."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / LOG
        self.process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._execute("set -m")  # so that background processes receive Ctrl-C

    def run(self, command: str) -> str:
        """Run one command, print it and its output, and return the output."""
        print(f"$ {command}", flush=True)
        if command == SERVE:
            self.stop_server()
            # Disowned, as if another terminal ran it: ``wait`` does not wait for it.
            self._execute(f"{SERVE} > {self.log} 2>&1 & server=$!; disown")
            self._wait_for_server()
            return ""
        code, printed = self._execute(command)
        print(printed, end="", flush=True)
        if code:
            raise SystemExit(f"exit code {code}\n{self.logged()}")
        return printed

    def stop_server(self) -> None:
        """Press Ctrl-C if a server runs."""
        self._execute('[ -z "$server" ] || kill -INT "$server"')
        self._execute('while kill -0 "$server"; do sleep 0.1; done; server=')

    def logged(self) -> str:
        """The log of the server."""
        return self.log.read_text() if self.log.exists() else ""

    def end(self) -> None:
        """Stop the server, and exit the shell."""
        self.stop_server()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _execute(self, command: str) -> tuple[int, str]:
        """Run a command, and return its exit code and its output."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{{ {command}\n}} < /dev/null\n")
        self.process.stdin.write(f"printf '\\n{END} %s\\n' $?\n")
        self.process.stdin.flush()
        printed = ""
        for line in self.process.stdout:
            if line.startswith(END):
                return int(line.removeprefix(END)), printed.removesuffix("\n")
            printed += line
        raise SystemExit(f"the shell has ended\n{printed}")

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if is_served():
                return
            time.sleep(0.1)
        raise SystemExit(f"the server does not respond\n{self.logged()}")


def is_served() -> bool:
    """Whether a server listens on the port of the application."""
    with socket.socket() as client:
        return client.connect_ex(ADDRESS) == 0


def follow(shell: Shell, folder: Path, steps: list[Block]) -> None:
    """Do each step, and compare its output with the page.

    :raises SystemExit: if a command fails, or its output differs.
    """
    printed = ""
    for step in steps:
        if step.language == "sh":
            print("", flush=True)
            printed = "".join(map(shell.run, step.text.splitlines()))
        elif step.is_for_a_file:
            print(f"\n# {step.caption}\n{indented(step.text)}", end="", flush=True)
            apply(step, folder)
        elif step.caption:
            if not is_logged(step.text, shell.logged()):
                raise SystemExit(f"the page has\n{step.text}\nbut {shell.logged()}")
            print(f"\n# {step.caption}, as the page shows it", flush=True)
            print(indented(step.text), end="", flush=True)
        else:
            if not matches(step.text, printed):
                raise SystemExit(f"the page shows another output:\n{step.text}")
            print("# as the page shows it", flush=True)


def indented(text: str) -> str:
    """The text of a block, indented as on the page."""
    return indent(text, "    ")


def main(folder: Path) -> None:
    """Follow the tutorial in a folder."""
    if is_served():
        raise SystemExit("port 8080 is in use. The tutorial needs it: stop that server")
    # If a script runs this with &, Ctrl-C is ignored, by the servers too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in "VIRTUAL_ENV", "PYTHONPATH", "PIP_REQUIRE_VIRTUALENV":
        os.environ.pop(name, None)
    os.environ["PIP_QUIET"] = "2"  # or most of the output would be pip's
    start = time.monotonic()
    steps = blocks(TUTORIAL.read_text())
    shell = Shell(folder)
    try:
        follow(shell, folder / "myapp", steps)
        print(f"\nthe server's log\n\n{shell.logged()}", flush=True)
    finally:
        shell.end()
    seconds = time.monotonic() - start
    print(f"the tutorial is complete: {len(steps)} blocks in {seconds:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
