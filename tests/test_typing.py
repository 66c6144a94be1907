"""The types of tgstream, as mypy checks them in an application."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGURATION = """
[mypy]
strict = True
explicit_package_bases = True
# TG and some packages around it have no types.
ignore_missing_imports = True
disallow_subclassing_any = False
disallow_untyped_decorators = False
# In a clone, mypy would check the code of tgstream too.
[mypy-tgstream.*]
ignore_errors = True
[mypy-examples.*]
# Applications of TG usually have no types.
disallow_untyped_defs = False
disallow_untyped_calls = False
"""


def test_mypy_checks_the_calls_of_applications(tmp_path: Path) -> None:
    """In strict mode, correct calls have useful types and wrong calls are errors."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(CONFIGURATION)
    # mypy without its cache takes seven seconds.
    cache = ROOT / ".mypy_cache" / "applications"
    options = ["--config-file", str(settings), "--cache-dir", str(cache)]
    mypy = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", *options),
            *("tests/typing_examples.py", "examples"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (mypy.returncode, mypy.stderr) == (0, ""), mypy.stdout
    assert "no issues found in 6 source files" in mypy.stdout
