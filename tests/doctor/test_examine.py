"""The doctor on whole applications: their middlewares, and streams through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tg

from tests.conftest import MakeApp, assert_thread_clean
from tests.doctor.applications import (
    failed_checks,
    parse_findings,
    run_command,
    write_application,
)
from tests.doctor.conftest import Run
from tgstream.doctor.examine import Application, examine
from tgstream.doctor.loader import load

# Applications that stream.


@pytest.mark.parametrize("options", ["", "debug = true", "registry_streaming = false"])
def test_application_without_faults_passes_every_check(run: Run, options: str) -> None:
    """The checks have a fixed order, and none of them warns."""
    status, text = run(options=options)
    findings = parse_findings(text)
    assert status == 0
    assert {mark for mark, _ in findings.values()} <= {"ok", "note"}
    assert [*findings] == [
        "application",
        "options",
        "channels",
        "database",
        "transactions",
        "registry_streaming",
        "error tracing",
        "tg.session",
        "orjson",
        "middlewares",
        "guard",
        "first chunk",
        "Content-Length",
        "gzip",
        "close",
        "threads",
        "failure",
        "left behind",
    ]
    assert max(map(len, text.splitlines())) <= 88


def test_middleware_with_any_parameters_is_listed(run: Run) -> None:
    """It may take ``*args``, as ``wsgiref.validate`` does."""
    status, text = run(middleware="AnyArguments")
    layers = parse_findings(text)["middlewares"][1].split(", ")
    assert (status, layers[0]) == (0, "sampleapp_middlewares.AnyArguments")


def test_proxy_of_an_application_is_not_resolved(run: Run) -> None:
    """Its object might run a query, or raise outside of a request."""
    status, text = run(middleware="ProxyPasser")
    assert (status, failed_checks(text)) == (0, [])


@pytest.mark.parametrize("debug", ["false", "true"])
def test_middlewares_are_listed_outermost_first(run: Run, debug: str) -> None:
    """The list has the middlewares and application wrappers of TurboGears, too."""
    _, text = run(middleware="FlushingCompressor", options=f"debug = {debug}")
    layers = parse_findings(text)["middlewares"][1].split(", ")
    assert layers[:3] == [
        "sampleapp_middlewares.FlushingCompressor",
        "sampleapp_middlewares.pass_through.pass_on",
        "tgstream.Guard",
    ]
    assert "tg.DBSessionRemoverMiddleware" in layers
    assert layers[-1].startswith("tg.") and layers[-1].endswith("Wrapper")


def test_compression_that_flushes_each_chunk_passes(run: Run) -> None:
    """The data is decompressed before it is checked."""
    status, text = run(middleware="FlushingCompressor")
    assert status == 0
    assert parse_findings(text)["gzip"] == ("ok", "gzip, flushed after each chunk")


def test_compression_of_tgstream_passes(run: Run) -> None:
    """The option of the application compresses the doctor's streams of text."""
    status, text = run(options="tgstream.compress = true")
    assert status == 0
    assert parse_findings(text)["gzip"] == ("ok", "gzip, flushed after each chunk")


def test_middleware_that_responds_with_exc_info_passes(run: Run) -> None:
    """The server decides whether it sends such an error page."""
    assert run(middleware="ErrorResponder")[0] == 0


# Applications that do not stream.


@pytest.mark.parametrize(
    ("middleware", "check", "problem"),
    [
        (
            "Joiner",
            "first chunk",
            "buffers chunks of text/plain: the client receives nothing until all 64",
        ),
        ("PageJoiner", "first chunk", "buffers chunks of text/html: "),
        (
            "LengthSetter",
            "Content-Length",
            "sets Content-Length: 131072 for a stream of text/plain",
        ),
        (
            "Compressor",
            "gzip",
            "compresses and buffers chunks of text/plain: the client receives nothing "
            "until all 64 are produced",
        ),
        (
            "UnflushedCompressor",
            "gzip",
            "compresses and buffers chunks of text/plain: the client receives nothing",
        ),
        (
            "ErrorSwallower",
            "failure",
            "hides the error of a failed stream, so it looks complete",
        ),
        ("BodyKeeper", "close", "a disconnect does not end the stream"),
        (
            "ThreadSwitcher",
            "threads",
            "produces chunks on a thread that is not the server's",
        ),
        (
            "ThreadChecker",
            "threads",
            "raises RuntimeError when a second thread iterates the response",
        ),
        ("ConnectionLeaker", "left behind", "connections checked out"),
    ],
)
def test_faulty_middleware_is_named(
    run: Run, middleware: str, check: str, problem: str
) -> None:
    """Only the check for its fault fails, with advice, and no other layer is named."""
    status, text = run(middleware=middleware)
    assert status == 1
    assert failed_checks(text) == [check]
    result = parse_findings(text)[check][1]
    assert problem in result
    is_named = f"sampleapp_middlewares.{middleware}" in result
    assert is_named == (middleware != "ConnectionLeaker")
    assert "pass_on" not in result
    assert " -> " in result


def test_middleware_without_close_is_a_warning(run: Run) -> None:
    """In CPython the stream still ends when the server drops the body."""
    status, text = run(middleware="Mapper")
    mark, result = parse_findings(text)["close"]
    assert (status, mark) == (0, "warn")
    assert result.startswith(
        "sampleapp_middlewares.Mapper does not pass on close(): a disconnect ends the "
        "stream only when the server drops the body"
    )


def test_rejected_stream_fails_with_its_content_type(run: Run) -> None:
    """A middleware may reject some content types, or some clients."""
    status, text = run(middleware="Picky", options="trace_errors.enable = false")
    assert status == 1
    assert failed_checks(text) == ["first chunk", "gzip"]
    findings = parse_findings(text)
    first_chunk, gzip = findings["first chunk"][1], findings["gzip"][1]
    assert "a stream of text/html raises ValueError: no page" in first_chunk
    assert "a stream of text/plain is answered with 406 Not Acceptable" in gzip


def test_buffering_with_and_without_compression_fails_one_check(run: Run) -> None:
    """The compression is neither the reason for the buffering nor an improvement."""
    status, text = run(middleware="BufferedCompressor")
    assert status == 1
    assert failed_checks(text) == ["first chunk"]
    assert parse_findings(text)["gzip"] == ("ok", "gzip, buffered as without gzip")


def test_webob_middleware_is_named_by_its_function(run: Run) -> None:
    """Its class is WebOb's, so the name of the class would not help."""
    status, text = run(middleware="add_etag")
    assert status == 1
    assert failed_checks(text) == ["first chunk", "Content-Length"]
    for check in "middlewares", *failed_checks(text):
        assert "sampleapp_middlewares.add_etag" in parse_findings(text)[check][1]


def test_application_wrapper_that_reads_the_body_is_named(run: Run) -> None:
    """It is inside of TurboGears, so it cannot be called by itself."""
    status, text = run(factory="wrapped")
    assert status == 1
    assert failed_checks(text) == ["first chunk", "Content-Length"]
    for check in failed_checks(text):
        assert "sampleapp.Minifier" in parse_findings(text)[check][1]


# The error guard.


@pytest.mark.parametrize(
    ("options", "appended"),
    [("", "'Internal Server Error'"), ("debug = true", "'<!DOCTYPE HTML")],
)
def test_error_text_in_the_data_fails(run: Run, options: str, appended: str) -> None:
    """Without a guard, backlash appends it on servers that allow a second start."""
    status, text = run(middleware="remove_guard", options=options)
    assert status == 1
    assert failed_checks(text) == ["failure"]
    findings = parse_findings(text)
    assert f"appends {appended}" in findings["failure"][1]
    guard = findings["guard"][1]
    assert "the application was created before tgstream was imported" in guard


def test_application_that_does_not_import_tgstream_fails(folder: Path) -> None:
    """The command loads it as its server does, with tgstream not imported yet."""
    write_application(folder, factory="unplugged")
    status, text = run_command(folder, "doctor", "test.ini")
    assert status == 1
    assert failed_checks(text) == ["failure"]
    findings = parse_findings(text)
    failure = findings["failure"][1]
    assert failure.startswith("backlash.tracing.errors.middleware.TraceErrorsMiddlewar")
    assert "appends 'Internal Server Error' to the data" in failure
    mark, guard = findings["guard"]
    assert mark == "warn"
    assert "neither the application nor its root controller imports tgstream" in guard
    assert "tgstream.plugme(base_config)" in guard


def test_import_of_tgstream_in_the_root_controller_is_too_late(folder: Path) -> None:
    """In a quickstarted application the first request imports the root controller."""
    controllers = folder / "package/controllers"
    controllers.mkdir(parents=True)
    (folder / "package/__init__.py").touch()
    (controllers / "__init__.py").touch()
    (controllers / "root.py").write_text(
        "import tgstream\nfrom sampleapp import RootController as RootController\n"
    )
    write_application(folder, factory="lazy", options="trace_errors.enable = false")
    status, text = run_command(folder, "doctor", "test.ini")
    assert status == 0  # without error tracing, the error reaches the server
    mark, guard = parse_findings(text)["guard"]
    assert mark == "warn"
    assert "the application was created before tgstream was imported" in guard


# Requests that do not reach TurboGears.


def test_path_that_does_not_reach_turbogears_fails(run: Run) -> None:
    """The finding has the status of the response. ``--path`` chooses another path."""
    status, text = run(middleware="LoginRedirect")
    assert status == 1
    assert failed_checks(text) == ["middlewares"]
    assert parse_findings(text)["middlewares"][1].startswith(
        "a request for /tgstream-doctor does not reach TurboGears: it is answered with "
        "302 Found"
    )
    assert run("/open/door", middleware="LoginRedirect")[0] == 0


def test_middleware_that_raises_fails(run: Run) -> None:
    """The finding has the error, with its file and line."""
    status, text = run(middleware="Raiser")
    assert status == 1
    result = parse_findings(text)["middlewares"][1]
    assert "it raises LookupError: no way, in sampleapp_middlewares.py, line " in result
    assert result.endswith("Fix this first.")


def test_application_without_turbogears_fails(run: Run) -> None:
    """No stream can be sent through it."""
    status, text = run(factory="plain")
    assert status == 1
    result = parse_findings(text)["application"][1]
    assert "test.ini creates no TurboGears application" in result


# Cleanup.


def test_examine_runs_no_controller_and_restores_everything(
    folder: Path, make_app: MakeApp
) -> None:
    """No file, connection, mail, hook, context or setting is left."""

    def files() -> set[Path]:
        paths = folder.rglob("*")
        return {path for path in paths if "__pycache__" not in path.parts}

    hooks_before = {name: [*hooks] for name, hooks in tg.hooks._hooks.items()}
    write_application(folder, middleware="Joiner")
    app, tg_apps = load("test.ini")
    [tg_app] = tg_apps
    files_before = files()
    config, root = dict(tg_app.config), dict(tg_app.controller_instances)
    examine(Application("test.ini", app, tg_apps, True), "/anywhere")
    assert files() == files_before
    assert (tg_app.config, tg_app.controller_instances) == (config, root)
    hooks = {name for name, hooks in tg.hooks._hooks.items() if hooks}
    assert hooks <= {*hooks_before, "before_render", "after_wsgi_middlewares"}
    assert tg.config["trace_errors.reporters"]
    assert_thread_clean()
