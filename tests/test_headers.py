"""The headers of a stream: here the name under which a browser saves it."""

from __future__ import annotations

from email.message import EmailMessage
from typing import Any

import pytest

from tgstream._headers import disposition


def names(value: str) -> tuple[str, str]:
    """The fallback and the name that a client reads, by Python's own MIME parser."""
    message = EmailMessage()
    message["Content-Disposition"] = value
    params: Any = message["Content-Disposition"].params
    return value.partition('filename="')[2].partition('"')[0], params["filename"]


@pytest.mark.parametrize(
    ("filename", "fallback"),
    [
        ("users.csv", "users.csv"),
        ("my users (1).csv", "my users (1).csv"),
        ("a;b,c.csv", "a;b,c.csv"),
    ],
)
def test_disposition_of_a_plain_name_is_the_name(filename: str, fallback: str) -> None:
    """What is ASCII and harmless goes out as it is, once."""
    assert disposition(filename) == f'attachment; filename="{fallback}"'


@pytest.mark.parametrize(
    ("filename", "fallback", "name"),
    [
        ("Übersicht.csv", "Ubersicht.csv", "Übersicht.csv"),
        ("数据.csv", ".csv", "数据.csv"),
        ('a"b.csv', "a_b.csv", 'a"b.csv'),
        ("100%.csv", "100_.csv", "100%.csv"),
    ],
)
def test_disposition_of_another_name_has_a_fallback(
    filename: str, fallback: str, name: str
) -> None:
    """What ASCII cannot say goes out twice, as RFC 6266 advises."""
    value = disposition(filename)
    assert value.isascii()
    assert f'filename="{fallback}"' in value
    assert names(value.replace(f'filename="{fallback}"; ', ""))[1] == name


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\windows\\system.ini", "system.ini"),
        ("a\r\nSet-Cookie: x=1", "aSet-Cookie: x=1"),
        ("a\x00b", "ab"),
        ("photo\u202egpj.exe", "photogpj.exe"),
        ("..", "download"),
        ("", "download"),
        ("x" * 300, "x" * 200),
        ("x" * 300 + ".csv", "x" * 196 + ".csv"),
        ("a." + "x" * 300, "a." + "x" * 198),
    ],
)
def test_disposition_lets_nothing_harmful_through(filename: str, name: str) -> None:
    """No path, no header, no control and no character that turns others around."""
    assert disposition(filename) == f'attachment; filename="{name}"'
