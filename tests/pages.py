"""Run the code of the pages of ``docs/``, with an application that it can import."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text: str, language: str = "python") -> list[str]:
    """The code blocks of a page in one language, without their indentation."""
    pattern = rf"code-block:: {language}\n\n((?: {{4}}.*\n|\n)+)"
    indented = re.findall(pattern, text)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in indented]


def commands(text: str) -> list[str]:
    """The lines of the shell blocks of a page."""
    lines = "".join(blocks(text, "sh")).splitlines()
    return [line.strip() for line in lines if line]


def run_blocks(text: str, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page in order, and return the names they define.

    An indented block continues the class of the block before it.
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
