"""Compare the runs of other projects' tests, with tgstream and without.

    python tests/peers/__main__.py FOLDER

The folder has a file of JUnit's XML for each run: ``transaction-plain.xml``. For each
other run of that suite, any test that passes in the plain one must pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

RUNS = {
    "TurboGears2": ["imported", "streamed"],
    "zope.sqlalchemy": ["imported"],
    "transaction": ["imported"],
}
MEANT = {
    "tests.test_configuration.TestAppConfig.test_serve_statics": (
        "it compares the class of the outermost middleware, which is the error guard"
    ),
}
"""Differences that are right: the test, and the reason."""


def results(path: Path) -> dict[str, str]:
    """How each test of a run ended: passed, failed, error or skipped."""
    ended: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}".strip(".")
        kinds = [each.tag for each in case if not each.tag.startswith("system")]
        kind = {"failure": "failed"}.get(kinds[0], kinds[0]) if kinds else "passed"
        # A test that has passed may have a second entry, for an error in its teardown.
        if ended.get(name, "passed") == "passed":
            ended[name] = kind
    return ended


def print_row(suite: str, run: str, ended: dict[str, str]) -> None:
    """One row of the table."""
    counts = Counter(ended.values())
    numbers = [counts[kind] for kind in ("passed", "failed", "error", "skipped")]
    print(f"{suite:<16}{run:<10}" + "".join(f"{number:>9}" for number in numbers))


def main(folder: Path) -> int:
    """Print the table, and then each test that tgstream has changed.

    :returns: how many of these are not meant.
    """
    changed = []
    print(f"{'suite':<16}{'run':<10}   passed   failed    error  skipped")
    for suite, runs in RUNS.items():
        plain = results(folder / f"{suite}-plain.xml")
        passed = [name for name, kind in plain.items() if kind == "passed"]
        assert passed, f"no test of {suite} passes without tgstream"
        print_row(suite, "plain", plain)
        for run in runs:
            ended = results(folder / f"{suite}-{run}.xml")
            print_row(suite, run, ended)
            changed += [
                (run, name, kind)
                for name in passed
                if (kind := ended.get(name, "missing")) != "passed"
            ]
    wrong = 0
    for run, name, kind in changed:
        reason = MEANT.get(name)
        wrong += reason is None
        print(f"{run}: {name}: {kind}" + (f" (meant: {reason})" if reason else ""))
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
