"""The modules: what each may use of other packages, how long functions are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tgstream

FOLDER = Path(tgstream.__file__).parent
MODULES = sorted(
    str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.py")
)
RESERVED = {"model", "lib", "helpers", "controllers", "bootstrap", "public", "partials"}


def tree(module: str) -> ast.Module:
    return ast.parse((FOLDER / f"{module}.py").read_text())


def imports(module: str) -> set[str]:
    """The dotted names that a module imports from other distributions."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_modules_were_found() -> None:
    """The tests below read all modules, in packages too."""
    assert "__init__" in MODULES
    assert len(MODULES) > 50


def test_all_is_a_literal_of_what_can_be_imported() -> None:
    """The only door lists what it hands on, and TG's plug finds none of its names."""
    assigned = next(
        node
        for node in tree("__init__").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert ast.literal_eval(assigned.value) == tgstream.__all__
    assert all(hasattr(tgstream, name) for name in tgstream.__all__)
    names = {part for module in MODULES for part in module.split("/")}
    assert not RESERVED & {*tgstream.__all__, *names}


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_docstring_and_no_long_function(module: str) -> None:
    """A module says what it is for, and no function has more than 40 lines."""
    assert ast.get_docstring(tree(module))
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            text = ast.get_docstring(node, clean=False) or ""
            assert length - text.count("\n") - bool(text) <= 40, node.name


@pytest.mark.parametrize("name", tgstream.__all__)
def test_public_name_has_a_docstring_of_its_own(name: str) -> None:
    """The first sentence is whole."""
    first, _, _ = (getattr(tgstream, name).__doc__ or "").partition("\n")
    assert first.endswith(".")


WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime"}
WALL |= {f"{of}.{name}" for of in ("datetime", "date") for name in ("now", "today")}
WALL |= {"datetime.utcnow", "datetime.datetime.now", "datetime.date.today"}


@pytest.mark.parametrize("module", MODULES)
def test_module_reads_no_wall_clock(module: str) -> None:
    """Somebody may set it; what waits, beats, expires or is numbered does not care."""
    read = {
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute)
    }
    assert not WALL & read
    assert not {"time", "time.time"} & (imports(module) - {"time"})
