"""The doctor: what stands in the way of an application's streams, check by check.

Rule: what can be proved by a stream is proved by a stream; only settings are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..testing.leaks import assert_clean
from . import stream_checks as _proofs
from .client import Exchange
from .finding import FAIL, NOTE, OK, WARN, Finding, raised_at, said
from .loader import Loaded, LoadError, options
from .middleware_trace import followed, short
from .probe import Probe, installed
from .settings_checks import options as check_options
from .settings_checks import settings
from .stream_checks import GZIP, TYPES, Proof, culprit, of_type

PLUG = "In config/app_cfg.py: import tgstream; tgstream.plugme(base_config)."


def refused(config: str, error: LoadError) -> list[Finding]:
    """What is to say of an application that cannot be loaded."""
    cause = error.__cause__
    why = str(error)
    advice = ""
    if cause is not None:
        why = f"{error} {said(cause)}{raised_at(cause)}"
        advice = "Mend this first."
    found = [Finding(FAIL, "application", f"{config} cannot be loaded: {why}", advice)]
    bad = check_options(options(config))
    return found + [each for each in bad if each.mark == FAIL]


def examine(config: str, loaded: Loaded, path: str) -> list[Finding]:
    """Every check of an application.

    :param config: how it is called.
    :param loaded: the application.
    :param path: what the probes ask for.
    """
    if not loaded.tg_apps:
        return [
            Finding(
                FAIL,
                "application",
                f"{config} has no application of TurboGears that was made with it",
                "Name the section that has one, as config.ini#name.",
            )
        ]
    with installed(loaded.tg_apps):
        probe = Probe()
        with followed(probe):
            exchange = Exchange(loaded.app, path, probe)
            exchange.pull()
        exchange.end()
        settled = probe.config or loaded.tg_apps[-1].config
        findings = [Finding(OK, "application", f"{config} is loaded")]
        findings += settings(settled)
        if not probe.made:
            return [*findings, _unreached(exchange, path)]
        findings += _streams(loaded, probe, path)
    return findings


def _unreached(exchange: Exchange, path: str) -> Finding:
    if exchange.probe.begun:
        errors = exchange.errors.getvalue().strip().splitlines() or [exchange.status]
        why = errors[-1] if exchange.error is None else said(exchange.error)
        return Finding(FAIL, "first chunk", f"a stream cannot begin: {why}")
    answer = exchange.status or "without a status"
    what = f"is answered {answer} before TurboGears has it"
    advice = "Choose a path that everybody may ask TurboGears for, with --path."
    if exchange.error is not None:
        what = f"raises {said(exchange.error)}{raised_at(exchange.error)}"
        advice = "Mend this first."
    return Finding(
        FAIL,
        "middlewares",
        f"a request for {path} {what}, so that no stream can be sent",
        advice,
    )


def _streams(loaded: Loaded, probe: Probe, path: str) -> Iterator[Finding]:
    guarded = any(
        each.name == "tgstream.turbogears.guard.Guard" for each in probe.layers
    )
    yield Finding(OK, "middlewares", ", ".join(_short(n.name) for n in probe.layers))
    yield _guard(guarded, loaded.imported)
    asked = _Asked(loaded.app, path, probe)
    yield asked.first_chunk()
    yield asked.length()
    yield asked.gzip()
    yield asked.close()
    yield asked.threads()
    yield asked.failure(guarded)
    yield _left()


def _short(name: str) -> str:
    """What is TurboGears' own is known by its last name."""
    package, _, own = name.partition(".")
    if package in ("tg", "tgstream", "backlash", "repoze"):
        return f"{package}.{own.rpartition('.')[2]}"
    return name


def _guard(guarded: bool, imported: bool) -> Finding:
    if guarded:
        return Finding(OK, "guard", "it stands outside everything of TurboGears")
    why = "the application was made before tgstream was imported"
    if not imported:
        why = "nothing in the application or its root controller imports tgstream"
    return Finding(WARN, "guard", f"there is none: {why}", PLUG)


class _Asked:
    """What probes say of an application, each a finding."""

    def __init__(self, app: Any, path: str, probe: Probe) -> None:
        self.app, self.path, self.probe = app, path, probe

    def _by(self, proof: Proof) -> str:
        return culprit(self.probe.layers, self.path, proof) or "something"

    def first_chunk(self) -> Finding:
        for content_type in TYPES:
            if what := _proofs.refused(self.app, self.path, content_type):
                return Finding(FAIL, "first chunk", what)
            proof = of_type(content_type)
            if what := proof(self.app, self.path):
                return Finding(
                    FAIL,
                    "first chunk",
                    f"{what} ({content_type}): "
                    f"{short(self.probe.reader or '') or self._by(proof)} holds them "
                    "back",
                    "Let it pass on each chunk as it comes, or take it out.",
                )
        return Finding(OK, "first chunk", "it arrives before the second is made")

    def length(self) -> Finding:
        if what := _proofs.counted(self.app, self.path):
            return Finding(
                FAIL,
                "Content-Length",
                f"{what}, by {self._by(_proofs.counted)}",
                "Let it set none where the response has none: a stream has no length "
                "that anybody knows.",
            )
        return Finding(OK, "Content-Length", "nothing sets it")

    def gzip(self) -> Finding:
        exchange = Exchange(self.app, self.path, Probe(TYPES[1]), GZIP)
        exchange.read()
        encoding = exchange.headers.get("Content-Encoding")
        held = False
        for content_type in TYPES:
            if what := _proofs.refused(self.app, self.path, content_type, GZIP):
                return Finding(FAIL, "gzip", what)
            plain, packed = of_type(content_type), of_type(content_type, GZIP)
            what = packed(self.app, self.path)
            held = held or bool(what)
            if what and not plain(self.app, self.path):
                return Finding(
                    FAIL,
                    "gzip",
                    f"{what} ({content_type}), where they are compressed by "
                    f"{self._by(packed)}",
                    "Let it flush after each chunk and collect nothing, or leave it to "
                    "the proxy.",
                )
        if encoding:
            how = "held back as without it" if held else "a chunk at a time"
            return Finding(OK, "gzip", f"{encoding}, {how}")
        return Finding(OK, "gzip", "nothing compresses")

    def close(self) -> Finding:
        if what := _proofs.unclosed(self.app, self.path):
            return Finding(
                WARN if what == _proofs.DROPPED else FAIL,
                "close",
                f"{what}: {self._by(_proofs.unclosed)} does not pass on close()",
                "Let what it returns have a close() that closes what it has got.",
            )
        return Finding(OK, "close", "a client that leaves ends the stream")

    def threads(self) -> Finding:
        if what := _proofs.astray(self.app, self.path):
            return Finding(
                FAIL,
                "threads",
                f"{what}, by {self._by(_proofs.astray)}",
                "Let it pull where it is pulled.",
            )
        return Finding(OK, "threads", "each chunk is made where it is pulled")

    def failure(self, guarded: bool) -> Finding:
        if what := _proofs.whole(self.app, self.path):
            return Finding(
                FAIL,
                "failure",
                f"when a stream fails, {what}, by {self._by(_proofs.whole)}",
                "Let the error through, outside of the guard." if guarded else PLUG,
            )
        return Finding(
            OK, "failure", "a stream that fails breaks, and has no other text"
        )


def _left() -> Finding:
    try:
        assert_clean()
    except AssertionError as error:
        return Finding(
            FAIL,
            "left behind",
            str(error).removeprefix("left behind: "),
            "Something holds on to a stream that has ended.",
        )
    return Finding(OK, "left behind", "nothing, of all these streams")


def summary(findings: list[Finding]) -> str:
    """The last line: how many checks there were, and how many failed."""
    marks = [each.mark for each in findings]
    if FAIL in marks:
        return f"{marks.count(FAIL)} of {len(marks)} checks failed: streams will break."
    asides = marks.count(WARN) + marks.count(NOTE)
    rest = f", {asides} with advice" if asides else ""
    return f"{len(marks)} checks, none failed{rest}."
