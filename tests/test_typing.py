"""What an editor, or mypy, tells an application that uses tgstream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGURATION = """
[mypy]
strict = True
explicit_package_bases = True
# TG and some of what is around it ship no types.
ignore_missing_imports = True
disallow_subclassing_any = False
disallow_untyped_decorators = False
# In a clone it lies beside, and mypy would look at how it is made.
[mypy-tgstream.*]
ignore_errors = True
[mypy-examples.*]
# They are written as TG's users write, without types.
disallow_untyped_defs = False
disallow_untyped_calls = False
"""


def test_mypy_understands_what_applications_write(tmp_path: Path) -> None:
    """Right calls have useful types and wrong ones are errors, in strict mode."""
    settings = tmp_path / "mypy.ini"
    settings.write_text(CONFIGURATION)
    options = ["--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]
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
    assert "no issues found in 4 source files" in mypy.stdout
