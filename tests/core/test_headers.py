"""``filename=``: the name under which a browser saves a download."""

from __future__ import annotations

import re
import unicodedata
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tg import TGController, expose

from tests.conftest import MakeApp
from tests.wsgi import get
from tgstream import Stream
from tgstream.core.headers import make_content_disposition

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = r'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
ATTR_CHAR = r"[!#$&+.^_`|~0-9A-Za-z-]"  # RFC 5987, 3.2.1
EXT_VALUE = rf"(?i:UTF-8)''(?:%[0-9A-Fa-f]{{2}}|{ATTR_CHAR})*"


def parameters(value: str) -> dict[str, str]:
    """The parameters of a ``Content-Disposition``, by the grammar of RFC 6266, 4.1."""
    disposition, rest = re.fullmatch(rf"({TOKEN})(.*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
    assert disposition == "attachment"
    parsed: dict[str, str] = {}
    while rest:
        match = re.match(rf"; *({TOKEN})=({QUOTED}|{TOKEN})", rest)
        assert match is not None, rest
        name, value, rest = match[1].lower(), match[2], rest[match.end() :]
        assert name not in parsed
        if name.endswith("*"):
            assert re.fullmatch(EXT_VALUE, value)
            encoded = value.partition("''")[2].encode()
            value = re.sub(
                b"%(..)", lambda m: bytes.fromhex(m[1].decode()), encoded
            ).decode()
        elif value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        parsed[name] = value
    return parsed


def names(filename: str) -> tuple[str, str]:
    """The name that an old client uses, and the name that any other client uses."""
    parsed = parameters(make_content_disposition(filename))
    assert parsed.keys() <= {"filename", "filename*"}
    return parsed["filename"], parsed.get("filename*", parsed["filename"])


def parse_as_email(value: str) -> Any:
    """The name that Python's own MIME parser finds."""
    message = EmailMessage()
    message["Content-Disposition"] = value
    params: Any = message["Content-Disposition"].params
    return params["filename"]


@pytest.mark.parametrize(
    "filename",
    ["users.csv", "my users (1).csv", "a;b,c=d.csv", "a'b.csv", "a.tar.gz", "README"],
)
def test_plain_file_name_is_sent_unchanged(filename: str) -> None:
    """A harmless ASCII name is sent once, as it is."""
    value = make_content_disposition(filename)
    assert value == f'attachment; filename="{filename}"'
    assert parse_as_email(value) == filename
    assert names(filename) == (filename, filename)


@pytest.mark.parametrize(
    ("filename", "fallback"),
    [
        ("Übersicht.csv", "Ubersicht.csv"),
        ("数据.csv", "download.csv"),
        ("数据 2026.csv", "2026.csv"),
        ("数据", "download"),
        ("売上　1\uff0f2.csv", "12.csv"),
        ("🧑🏽 ①.csv", "download.csv"),
        ("é.数", "e"),
        ("cön.csv", "_con.csv"),
        ('a"b.csv', "a_b.csv"),
        ("100%.csv", "100_.csv"),
        ("%41%2F.csv", "_41_2F.csv"),
        ("*'()!.数", "*'()!"),
    ],
)
def test_file_name_that_is_not_ascii_has_a_fallback(
    filename: str, fallback: str
) -> None:
    """The name is sent twice (RFC 6266)."""
    assert names(filename) == (fallback, filename)
    value = make_content_disposition(filename)
    assert parse_as_email(value.replace(f'filename="{fallback}"; ', "")) == filename


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("C:\\windows\\system.ini", "system.ini"),
        ("C:evil.exe", "C_evil.exe"),
        ("a\r\nSet-Cookie: x=1", "aSet-Cookie: x=1"),
        ('a"; filename="b.exe', 'a"; filename="b.exe'),
        ("a\x00b", "ab"),
        ("a\x7f\x85\x9bb", "ab"),
        ("a\u2028b\u2029c", "abc"),
        ("photo\u202egpj.exe", "photogpj.exe"),
        ("\u2066a\u2069\u200e\u061c", "a"),
        ("a\u200b\ufeff\u2060\u00ad.csv", "a.csv"),
        ("\U000e0041a", "a"),
        ("a\ud800b\udfff", "ab"),
        ("\ue000a\uffff", "a"),
        ("..", "download"),
        (". . .", "download"),
        ("a/", "download"),
        ("a/..", "download"),
        ("", "download"),
        ("\r\n", "download"),
        ("\u202e", "download"),
        (".csv", "download.csv"),
        ("\u202e..csv", "download.csv"),
        (".htaccess", "download.htaccess"),
        ("..a.csv", "a.csv"),
        (" a.csv. ", "a.csv"),
        ("\u3000a\xa0", "a"),
        ("\u2003a\u200a\u205f", "a"),
        (". csv", "download.csv"),
        ("CON", "_CON"),
        ("nul.csv", "_nul.csv"),
        ("Com1 .tar.gz", "_Com1 .tar.gz"),
        ("LPT³", "_LPT³"),
        ("conin$", "_conin$"),
        ("console.csv", "console.csv"),
        ("com10", "com10"),
    ],
    ids=ascii,
)
def test_file_name_loses_its_harmful_parts(filename: str, name: str) -> None:
    """Paths, headers, devices, and characters that reverse others are removed."""
    assert names(filename)[1] == name


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("x" * 200, "x" * 200),
        ("x" * 300, "x" * 200),
        ("x" * 300 + ".csv", "x" * 196 + ".csv"),
        ("a." + "x" * 300, "a." + "x" * 198),
        ("." + "x" * 300, "download." + "x" * 191),
        ("x" * 199 + " " + "y" * 100, "x" * 199),
        ("x" * 300 + "." + "y" * 11, "x" * 200),
        (" " * 300 + "a.csv", "a.csv"),
        ("数" * 300, "数" * 66),
        ("数" * 300 + ".csv", "数" * 65 + ".csv"),
        ("x" + "数" * 300 + ".数据", "x" + "数" * 64 + ".数据"),
        ("🧑" * 300 + ".csv", "🧑" * 49 + ".csv"),
    ],
    ids=lambda name: f"{name[:2]}{len(name)}",
)
def test_long_file_name_is_truncated(filename: str, name: str) -> None:
    """It has at most as many bytes as a file system allows, and keeps its suffix."""
    assert names(filename)[1] == name
    assert len(name.encode()) <= 200


def test_very_long_file_name_takes_linear_time() -> None:
    """Many characters that might be trimmed do not slow down a regular expression."""
    for part in (" ", ".", "a ", ". ", "a:", "\u202e", "/", "数"):
        assert len(make_content_disposition("a" + part * 100_000 + "b")) < 1000


@pytest.mark.parametrize(
    "filename",
    [
        "a\uff0fb",
        "\u2025\uff0f\u2025\uff0fetc\uff0fpasswd",
        "a\uff3cb",
        "\u2100",
        "a\uff02b",
        "\uff0541",
        "\uff0e\uff0e",
    ],
)
def test_fallback_does_not_convert_look_alikes_to_ascii(filename: str) -> None:
    """A wide slash is harmless in a file name, but an ASCII slash starts a path."""
    assert not re.search(r'[/\\"%]', names(filename)[0])
    assert not names(filename)[0].startswith(".")


TRICKY = (
    ".. /\\\"%:;*'=\r\n\0\t\x7f\x85\xa0\xad\u200b\u200d\u2028\u2029\u202e\u2066\u3000"
    "\ufeff\uff0f\uff3c\uff02\u2100\u2025é数🧑\U000e0041\ud800\uffffconulCOM1¹"
)
texts = st.text(st.sampled_from(TRICKY) | st.characters(), max_size=20)


@settings(deadline=None, max_examples=250, derandomize=True, database=None)
@given(texts | texts.map(lambda text: text * 40))
@example("C:D:x")
@example("C:.D:x")
def test_any_text_makes_a_harmless_file_name(filename: str) -> None:
    """There is one header with two parameters, and file systems accept both names."""
    value = make_content_disposition(filename)
    assert re.fullmatch("[ -~]+", value)
    for name in names(filename):
        assert not re.search(r"[/\\]|^[A-Za-z]:|^[\s.]|[\s.]$|^$", name)
        assert not {"Zl", "Zp"} & {unicodedata.category(c) for c in name}
        assert all(unicodedata.category(c)[0] != "C" for c in name)
        assert not re.match(r"(?i)(con|prn|aux|nul|com[1-9]|lpt[1-9]) *(\.|$)", name)
        assert len(name.encode()) <= 201  # the underscore before the name of a device
        assert names(name)[1] == name
    assert not re.search(r'["%]', names(filename)[0])


@pytest.mark.parametrize("filename", ['a"\r\nX-Evil: 1\r\n\r\n.csv', "\ud800é\0.csv"])
def test_hostile_file_name_makes_one_header(make_app: MakeApp, filename: str) -> None:
    """It adds no other header, and the server can send the response."""

    class Root(TGController):
        @expose(content_type="text/plain")
        def download(self) -> Any:
            return Stream(["a"], filename=filename)

    call = get(make_app(Root()), "/download")
    assert call.headers["Content-Disposition"] == make_content_disposition(filename)
    assert "X-Evil" not in call.headers
    assert call.text == "a"
