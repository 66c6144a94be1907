"""The ladder of modules, who may import what, and the only door."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tgstream

FOLDER = Path(tgstream.__file__).parent
LADDER = {
    "_options": set(),
    "_batches": {"_options"},
    "_fields": set(),
    "_orjson": set(),
    "_columns": {"_orjson"},
    "_csv": {"_columns", "_fields", "_options"},
    "_encoder": {"_fields", "_orjson"},
    "_json_columns": {"_encoder", "_fields", "_orjson"},
    "_json": {"_encoder", "_json_columns", "_options"},
    "_sse": {"_encoder"},
    "_config": set(),
    "_headers": {"_options"},
    "_source": {"_cleanup", "_options"},
    "_thread": {"_body", "_database", "_registry"},  # for their types alone
    "_cleanup": set(),
    "_seats": set(),
    "_heart": set(),
    "_plan": {"_options"},
    "_report": {"_body", "_options", "_plan"},  # the body for a type alone
    "_advice": {"_body"},  # for a type alone
    "_client": set(),
    # The body and the report for types alone.
    "_watch": {"_advice", "_body", "_client", "_feed", "_plan", "_report"},
    "_postgresql": {"_options"},
    "_transaction": {"_postgresql", "_report"},
    # The first two for types alone.
    "_context": {"_body", "_database", "_options", "_thread"},
    "_registry": {"_thread"},
    "_objects": set(),
    "_outbox": {"_config", "_context", "_report", "_thread"},
    "_database": {
        *("_cleanup", "_objects", "_outbox", "_registry", "_report"),
        "_transaction",
    },
    "_chunks": {"_batches", "_cleanup", "_options", "_plan"},
    "_body": {
        *("_advice", "_chunks", "_cleanup", "_client", "_context", "_database"),
        *("_options", "_plan", "_report", "_seats", "_stream", "_watch"),
    },
    "_stream": {
        *("_body", "_cleanup", "_heart", "_plan", "_thread"),
        *("_database", "_options", "_seats", "_source"),
    },
    "_guard": {
        *("_advice", "_body", "_cleanup", "_database"),
        *("_headers", "_options", "_report", "_stream"),
    },
    "_controller": {
        *("_body", "_config", "_context", "_database", "_plan"),
        *("_guard", "_headers", "_options", "_registry", "_seats", "_source"),
        "_stream",
    },
    "_templates": {"_cleanup", "_config", "_context", "_options"},
    "_effects": set(),
    # The database for its type alone.
    "_reading": {
        *("_batches", "_report", "_stream", "_thread", "_database", "_transaction"),
        "_effects",
    },
    "_statement": {"_fields", "_options", "_reading"},
    "_cursor": {"_effects", "_plan", "_reading", "_report"},
    "_mysql": {"_options"},
    "_key": {"_mysql", "_options"},
    "_keyset": {"_effects", "_key", "_options", "_reading"},
    # The database for its type alone.
    "_rows": {
        *("_batches", "_config", "_cursor", "_database", "_effects", "_keyset"),
        *("_mysql", "_options", "_reading", "_statement"),
    },
    "_copy": {
        *("_batches", "_csv", "_effects", "_options"),
        *("_reading", "_rows", "_statement"),
    },
    "_resume": {"_context", "_options"},
    "_feed": {"_plan", "_sse"},
    "_memory": {"_feed", "_sse"},
    "_redis_streams": {"_feed", "_sse"},
    "_redis": {"_plan", "_feed", "_redis_streams", "_report", "_sse"},
    "channels": {
        *("_config", "_context", "_memory", "_outbox"),
        *("_redis", "_report", "_sse"),
    },
    "_items": {"_sse"},
    "_leaks": {"_config", "_report", "_thread"},
    "testing": {
        *("_cleanup", "_headers", "_items", "_leaks"),
        *("_report", "_sse"),
    },
    "pytest_plugin": {"testing"},
    "_findings": set(),
    "_loading": set(),  # and nothing ever
    "_layers": {"_advice"},
    "_probe": {"_advice", "_controller", "_layers"},
    "_exchange": {"_cleanup", "_layers", "_probe"},
    "_proofs": {"_exchange", "_findings", "_layers", "_probe"},
    "_settings": {"_config", "_findings", "_redis", "_report", "channels"},
    "_environment": {"_findings"},
    "_doctor": {
        *("_exchange", "_findings", "_layers", "_leaks", "_loading"),
        *("_probe", "_proofs", "_settings"),
    },
    "__main__": {"_doctor", "_environment", "_findings", "_loading"},
    "__init__": {
        *("_config", "_controller", "_copy", "_csv", "_json", "_options"),
        *("_report", "_resume", "_rows", "_sse", "_stream", "_templates"),
        *("_watch", "channels"),
    },
}
MAY_TOUCH = {
    "transaction": {"_database", "_outbox", "_reading", "_transaction"},
    "sqlalchemy": {
        *("_copy", "_cursor", "_database", "_effects", "_key", "_keyset"),
        *("_mysql", "_objects", "_outbox"),
        *("_reading", "_registry", "_report", "_rows", "_statement"),
        "_transaction",
    },
    "zope": {"_transaction"},
    "redis": {"_redis"},
    "tg.request_local": {"_context", "_thread"},
}
RESERVED = {"model", "lib", "helpers", "controllers", "bootstrap", "public", "partials"}


def tree(module: str) -> ast.Module:
    return ast.parse((FOLDER / f"{module}.py").read_text())


def imports(module: str) -> set[str]:
    """The dotted names that a module imports, its own package's with a leading dot."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [a.name for a in node.names]
            found |= {f".{name}" for name in names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_ladder_names_every_module() -> None:
    """A new module has its place, or an argument, before it has code."""
    assert {path.stem for path in FOLDER.glob("*.py")} == LADDER.keys()


@pytest.mark.parametrize("module", LADDER)
def test_module_imports_only_what_is_below_it(module: str) -> None:
    """The ladder, as it is written above."""
    below = {name[1:] for name in imports(module) if name.startswith(".")}
    assert below <= LADDER[module]


@pytest.mark.parametrize("package", MAY_TOUCH)
def test_only_one_rung_touches(package: str) -> None:
    """What TG and the database keep of a thread is touched in one place each."""
    touching = {
        module
        for module in LADDER
        for name in imports(module)
        if name == package or name.startswith(f"{package}.")
    }
    assert touching <= MAY_TOUCH[package]


def test_all_is_a_literal_of_what_can_be_imported() -> None:
    """The only door lists what it hands on, and TG's plug finds none of its names."""
    assigned = next(
        node
        for node in tree("__init__").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert ast.literal_eval(assigned.value) == tgstream.__all__
    assert all(hasattr(tgstream, name) for name in tgstream.__all__)
    assert not RESERVED & {*tgstream.__all__, *LADDER}


@pytest.mark.parametrize("module", LADDER)
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


@pytest.mark.parametrize("module", LADDER)
def test_module_reads_no_wall_clock(module: str) -> None:
    """Somebody may set it; what waits, beats, expires or is numbered does not care."""
    read = {
        ast.unparse(node)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute)
    }
    assert not WALL & read
    assert not {"time", "time.time"} & (imports(module) - {"time"})
