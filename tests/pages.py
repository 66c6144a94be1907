"""The pages of ``docs/``, whose code is run, and where it finds an application."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text: str, language: str = "python") -> list[str]:
    """The blocks of a page in one language, where the page stands in the margin."""
    pattern = rf"code-block:: {language}\n\n((?: {{4}}.*\n|\n)+)"
    found = re.findall(pattern, text)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def commands(text: str) -> list[str]:
    """The lines of the shell blocks of a page."""
    lines = "".join(blocks(text, "sh")).splitlines()
    return [line.strip() for line in lines if line]


def run_blocks(text: str, **names: Any) -> dict[str, Any]:
    """What a page's Python blocks define, run one after the other.

    A block that is indented goes on with the class of the one before.
    """
    exec(compile("".join(blocks(text)), "<page>", "exec"), names)
    return names


def provide(name: str, **members: Any) -> None:
    """Make the module ``name`` importable in this process, with these members."""
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        provide(parent)
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
