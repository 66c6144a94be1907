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
MAY_IMPORT = {
    "formats": set[str](),
    "core": {"formats"},
    "database": {"formats", "core"},
    "exports": {"formats", "core", "database"},
    "live": {"formats", "core", "database"},
    "turbogears": {"formats", "core", "database"},
    "metrics": {"formats", "core", "live"},
    "testing": {"formats", "core", "database"},
    "doctor": {"core", "database", "live", "turbogears", "testing"},
}
"""The packages that each package may import. The modules outside may import all."""

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


def dotted(module: str) -> str:
    """``core/__init__`` is ``tgstream.core``."""
    return "tgstream." + module.replace("/", ".").removesuffix(".__init__")


FILES = {dotted(module).removesuffix(".__init__"): module for module in MODULES}


def own_imports(module: str) -> set[str]:
    """The modules of tgstream that a module imports.

    It counts imports for types, imports in functions, and names of modules in strings,
    as :func:`importlib.import_module` takes them.
    """
    path = ["tgstream", *module.split("/")]
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {ast.unparse(argument).strip("'") for argument in node.args}
    names = {name if name in FILES else name.rpartition(".")[0] for name in found}
    return {FILES[name] for name in names & {*FILES}} - {"__init__", module}


def package_of(module: str) -> str:
    package, slash, _ = module.partition("/")
    return package if slash else ""


def test_modules_were_found() -> None:
    """The tests below read all modules, in packages too."""
    assert "__init__" in MODULES
    assert len(MODULES) > 50


def test_packages_are_those_with_a_rule() -> None:
    """A new package gets a row before it gets code."""
    assert {package_of(module) for module in MODULES} == {"", *MAY_IMPORT}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_the_packages_of_its_row(package: str) -> None:
    """Imports for types and imports in functions count, too."""
    allowed = {package, *MAY_IMPORT[package]}
    wrong = {
        f"{module} -> {imported}"
        for module in MODULES
        if package_of(module) == package
        for imported in own_imports(module)
        if package_of(imported) not in allowed
    }
    assert wrong == set()


def test_no_modules_import_each_other() -> None:
    """There is no circle, neither of two modules nor of more."""
    graph = {module: own_imports(module) for module in MODULES}
    while leaves := {module for module, below in graph.items() if not below & {*graph}}:
        graph = {module: graph[module] for module in graph.keys() - leaves}
    circles = {
        f"{module} -> {below}" for module in graph for below in graph[module] & {*graph}
    }
    assert circles == set()


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
    """Each module has a docstring, and no function has more than 40 lines."""
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
    """A clock that is set must not change waits, heartbeats, ends or numbers."""
    read = {
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute)
    }
    assert not WALL & read
    assert not {"time", "time.time"} & (imports(module) - {"time"})
