"""The text of findings."""

from __future__ import annotations

from tgstream.doctor.finding import Finding, format_findings, summarize


def test_findings_are_plain_text_of_limited_width() -> None:
    """A word that is longer than a line is not split."""
    long = "x" * 70
    text = format_findings(
        [Finding("warn", "check", f"result {long}", "do_this, " * 10)]
    )
    lines = text.splitlines()
    assert lines[0] == "warn  check               result"
    assert lines[1] == " " * 26 + long
    assert lines[2].startswith(" " * 26 + "-> do_this,")
    assert lines[3].startswith(" " * 29 + "do_this,")


def test_summary_counts_failed_checks_and_advice() -> None:
    """The failed checks come first, because they set the exit status."""
    ok, note, fail = (Finding(mark, "check", "") for mark in ("ok", "note", "FAIL"))
    assert summarize([ok, ok]) == "2 checks passed."
    assert summarize([ok, note]) == "2 checks passed, 1 with advice."
    assert summarize([ok, note, fail]) == "1 of 3 checks failed: streams will break."
