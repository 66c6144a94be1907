"""Examines an application: sends streams through all of it, and reports each check.

If a stream can show a fault, a stream is sent. Only settings are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from ..testing.leaks import assert_clean
from ..turbogears.guard import Guard
from .client import Exchange
from .finding import FAIL, OK, WARN, Finding, describe_error, describe_origin
from .middleware_trace import Layer, remove_locals, trace_layers
from .probe import Probe, answer_probes
from .settings_checks import check_options, check_settings, read_options
from .stream_checks import (
    ACCEPT_GZIP,
    CONTENT_TYPES,
    IGNORES_UNLESS_DROPPED,
    StreamCheck,
    buffers,
    changes_thread,
    find_layer,
    hides_failure,
    ignores_close,
    rejects,
    sets_length,
)

PLUG = "In config/app_cfg.py: import tgstream; tgstream.plugme(base_config)."


class Application(NamedTuple):
    """An application to examine."""

    config: str
    """The file that it was loaded from."""
    app: Any
    """The outermost WSGI application."""
    tg_apps: list[Any]
    """The TurboGears applications in it."""
    imports_tgstream: bool
    """Whether it has imported tgstream, its root controllers included."""


def report_load_error(config: str, error: Exception) -> list[Finding]:
    """The findings for an application that cannot be loaded.

    :param config: its file.
    :param error: with the application's own error as its cause, if there is one.
    """
    cause, problem, advice = error.__cause__, str(error), ""
    if cause is not None:
        problem = f"{describe_error(cause)}{describe_origin(cause)}"
        advice = "Fix this first."
    message = f"{config} cannot be loaded: {problem}"
    options = check_options(read_options(config))
    return [
        Finding(FAIL, "application", message, advice),
        *[finding for finding in options if finding.mark == FAIL],
    ]


def examine(application: Application, path: str) -> list[Finding]:
    """Every check of an application.

    :param path: the path that the probes request.
    """
    tg_apps = application.tg_apps
    if not tg_apps:
        return [
            Finding(
                FAIL,
                "application",
                f"{application.config} creates no TurboGears application",
                "Name the section that creates one, such as config.ini#name.",
            )
        ]
    with answer_probes(tg_apps):
        probe = Probe()
        with trace_layers(probe):
            exchange = Exchange(application.app, path, probe)
            exchange.pull()
        exchange.end()
        config = probe.config or tg_apps[-1].config
        findings = [Finding(OK, "application", f"{application.config} is loaded")]
        findings += check_settings(config)
        if probe.produced:
            findings += _check_streams(application, probe, path)
        else:
            findings.append(_report_no_stream(exchange, path))
    return findings


def _report_no_stream(exchange: Exchange, path: str) -> Finding:
    if exchange.probe.started:
        lines = exchange.errors.getvalue().strip().splitlines() or [exchange.status]
        error = exchange.error
        reason = lines[-1] if error is None else describe_error(error)
        return Finding(FAIL, "first chunk", f"a stream cannot start: {reason}")
    if exchange.error is None:
        result = f"is answered with {exchange.status or 'no status'}"
        advice = "Use --path with a path that reaches TurboGears without a login."
    else:
        error = exchange.error
        result = f"raises {describe_error(error)}{describe_origin(error)}"
        advice = "Fix this first."
    result = f"a request for {path} does not reach TurboGears: it {result}"
    return Finding(FAIL, "middlewares", result, advice)


def _check_streams(
    application: Application, probe: Probe, path: str
) -> Iterator[Finding]:
    has_guard = any(type(layer.app) is Guard for layer in probe.layers)
    names = ", ".join(_shorten(layer.name) for layer in probe.layers)
    yield Finding(OK, "middlewares", names)
    yield _check_guard(has_guard, application.imports_tgstream)
    examiner = _Examiner(application.app, path, probe.layers, probe.reader)
    yield examiner.check_first_chunk()
    yield examiner.check_length()
    yield examiner.check_gzip()
    yield examiner.check_close()
    yield examiner.check_threads()
    yield examiner.check_failure(has_guard)
    yield _check_leaks()


def _shorten(name: str) -> str:
    """The package and the last name of a layer of TurboGears and its neighbours."""
    package, _, rest = name.partition(".")
    if package in ("tg", "tgstream", "backlash", "repoze"):
        return f"{package}.{rest.rpartition('.')[2]}"
    return name


def _check_guard(has_guard: bool, imports_tgstream: bool) -> Finding:
    if has_guard:
        return Finding(OK, "guard", "installed, outermost")
    reason = "the application was created before tgstream was imported"
    if not imports_tgstream:
        reason = "neither the application nor its root controller imports tgstream"
    return Finding(WARN, "guard", f"not installed: {reason}", PLUG)


class _Examiner:
    """The checks that send streams, each with the layer that is at fault.

    :param app: the outermost WSGI application.
    :param path: the path to request.
    :param layers: those that a request passes through, outermost first.
    :param reader: the function that iterates the stream before the server, if any.
    """

    def __init__(
        self, app: Any, path: str, layers: list[Layer], reader: str | None
    ) -> None:
        self.app, self.path, self.layers, self.reader = app, path, layers, reader

    def _layer(self, check: StreamCheck) -> str:
        return find_layer(self.layers, self.path, check) or "an unknown layer"

    def check_first_chunk(self) -> Finding:
        for content_type in CONTENT_TYPES:
            if problem := rejects(self.app, self.path, content_type):
                return Finding(FAIL, "first chunk", problem)
            check = partial(buffers, content_type=content_type)
            if problem := check(self.app, self.path):
                layer = remove_locals(self.reader or "") or self._layer(check)
                return Finding(
                    FAIL,
                    "first chunk",
                    f"{layer} {problem}",
                    "Make it pass on each chunk at once, or remove it.",
                )
        return Finding(OK, "first chunk", "arrives before the second is produced")

    def check_length(self) -> Finding:
        if problem := sets_length(self.app, self.path):
            return Finding(
                FAIL,
                "Content-Length",
                f"{self._layer(sets_length)} {problem}",
                "Make it set no Content-Length if the response has none. Nobody knows "
                "the length of a stream in advance.",
            )
        return Finding(OK, "Content-Length", "not set")

    def check_gzip(self) -> Finding:
        exchange = Exchange(
            self.app, self.path, Probe(CONTENT_TYPES[1]), headers=ACCEPT_GZIP
        )
        exchange.read()
        encoding = exchange.headers.get("Content-Encoding")
        is_buffered = False
        for content_type in CONTENT_TYPES:
            if problem := rejects(self.app, self.path, content_type, ACCEPT_GZIP):
                return Finding(FAIL, "gzip", problem)
            plain = partial(buffers, content_type=content_type)
            gzipped = partial(plain, headers=ACCEPT_GZIP)
            problem = gzipped(self.app, self.path)
            is_buffered = is_buffered or bool(problem)
            if problem and not plain(self.app, self.path):
                return Finding(
                    FAIL,
                    "gzip",
                    f"{self._layer(gzipped)} compresses and {problem}",
                    "Make it flush after each chunk, or let the proxy compress.",
                )
        if not encoding:
            return Finding(OK, "gzip", "not compressed")
        how = "buffered as without gzip" if is_buffered else "flushed after each chunk"
        return Finding(OK, "gzip", f"{encoding}, {how}")

    def check_close(self) -> Finding:
        if problem := ignores_close(self.app, self.path):
            return Finding(
                WARN if problem == IGNORES_UNLESS_DROPPED else FAIL,
                "close",
                f"{self._layer(ignores_close)} {problem}",
                "Give the iterable that it returns a close() that closes the response "
                "inside.",
            )
        return Finding(OK, "close", "a disconnect ends the stream")

    def check_threads(self) -> Finding:
        if problem := changes_thread(self.app, self.path):
            return Finding(
                FAIL,
                "threads",
                f"{self._layer(changes_thread)} {problem}",
                "Iterate the response on the calling thread. Do not hand it to another "
                "thread.",
            )
        return Finding(OK, "threads", "each chunk is produced on the calling thread")

    def check_failure(self, has_guard: bool) -> Finding:
        if problem := hides_failure(self.app, self.path):
            return Finding(
                FAIL,
                "failure",
                f"{self._layer(hides_failure)} {problem}",
                "It is outside of the error guard. Make it re-raise the error."
                if has_guard
                else PLUG,
            )
        return Finding(OK, "failure", "a failed stream is aborted, without added text")


def _check_leaks() -> Finding:
    try:
        assert_clean()
    except AssertionError as error:
        return Finding(
            FAIL,
            "left behind",
            str(error).removeprefix("left behind: "),
            "Find the code that keeps them after the end of a stream.",
        )
    return Finding(OK, "left behind", "nothing")
