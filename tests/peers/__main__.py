"""Compare the runs of other projects' tests, with tgstream and without.

    python tests/peers/__main__.py FOLDER

The folder has a JUnit XML file for each run, such as ``transaction-plain.xml``. Each
test that passes in the plain run must pass in the other runs of its suite.
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
INTENDED = {
    "tests.test_configuration.TestAppConfig.test_serve_statics": (
        "it compares the class of the outermost middleware, which is the error guard"
    ),
}
"""Intended differences: the test and the reason."""


def results(path: Path) -> dict[str, str]:
    """The outcome of each test of a run: passed, failed, error or skipped."""
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}".strip(".")
        tags = [part.tag for part in case if not part.tag.startswith("system")]
        outcome = {"failure": "failed"}.get(tags[0], tags[0]) if tags else "passed"
        # A second entry reports an error in the teardown of a test that passed.
        if outcomes.get(name, "passed") == "passed":
            outcomes[name] = outcome
    return outcomes


def print_row(suite: str, run: str, outcomes: dict[str, str]) -> None:
    """Print one row of the table."""
    counts = Counter(outcomes.values())
    numbers = [counts[outcome] for outcome in ("passed", "failed", "error", "skipped")]
    print(f"{suite:<16}{run:<10}" + "".join(f"{number:>9}" for number in numbers))


def main(folder: Path) -> int:
    """Print the table, and each test whose outcome tgstream has changed.

    :returns: the number of changes that are not intended.
    """
    changed = []
    print(f"{'suite':<16}{'run':<10}   passed   failed    error  skipped")
    for suite, runs in RUNS.items():
        plain = results(folder / f"{suite}-plain.xml")
        passed = [name for name, outcome in plain.items() if outcome == "passed"]
        assert passed, f"no test of {suite} passes without tgstream"
        print_row(suite, "plain", plain)
        for run in runs:
            outcomes = results(folder / f"{suite}-{run}.xml")
            print_row(suite, run, outcomes)
            changed += [
                (run, name, outcome)
                for name in passed
                if (outcome := outcomes.get(name, "missing")) != "passed"
            ]
    wrong = 0
    for run, name, outcome in changed:
        reason = INTENDED.get(name)
        wrong += reason is None
        print(
            f"{run}: {name}: {outcome}" + (f" (intended: {reason})" if reason else "")
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
