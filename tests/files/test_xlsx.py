"""LibreOffice and DuckDB read workbooks with equal values, types and dates."""

from __future__ import annotations

import csv
import datetime as dt
import json
import os
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from openpyxl.utils.escape import unescape

from tests.conftest import MakeApp, Root
from tests.wsgi import Call
from tgstream import XLSX

DATETIME = dt.datetime(2026, 11, 29, 13, 14, 15)

CASES: dict[str, tuple[Any, str]] = {
    "integer": (-17, "-17"),
    "float": (1.5, "1.5"),
    "decimal": (Decimal("12.50"), "12.5"),
    "long integer": (2**53 + 1, "9007199254740993"),
    "true": (True, "TRUE"),
    "empty": (None, ""),
    "text": ("plain", "plain"),
    "zeros": ("0049", "0049"),
    "formula": ("=1+1", "=1+1"),
    "markup": ('<b>&amp;"', '<b>&amp;"'),
    "spaces": ("  a b ", "  a b "),
    "lines": ("one\ntwo\tthree", "one\ntwo\tthree"),
    "return": ("a\rb", "a\rb"),
    "control": ("a\x0bb", "a\x0bb"),
    "escape": ("_x0041_", "_x0041_"),
    "escape and control": ("_x0041\x0b", "_x0041\x0b"),
    "emoji": ("\U0001f600", "\U0001f600"),
    "date": (dt.date(2026, 11, 29), "2026-11-29"),
    "first of March": (dt.date(1900, 3, 1), "1900-03-01"),
    "last date": (dt.date(9999, 12, 31), "9999-12-31"),
    "datetime": (DATETIME, "2026-11-29 13:14:15"),
    "datetime in UTC": (DATETIME.replace(tzinfo=dt.timezone.utc), str(DATETIME)),
    "time": (dt.time(23, 59, 59), "23:59:59"),
    "midnight": (dt.time(0), "00:00:00"),
    "duration": (dt.timedelta(hours=30, minutes=5), "30:05:00"),
}
"""The values, and the texts that a spreadsheet shows for them."""


@pytest.fixture
def workbook(make_app: MakeApp, tmp_path: Path) -> Path:
    """A workbook of two sheets, as a client gets it."""
    items = [{"case": name, "value": value} for name, (value, _) in CASES.items()]
    numbers = [(n, f"name {n}", n / 4) for n in range(5000)]
    root = Root(lambda: {"Cases": items, 'A "b" & c': iter(numbers)}, format=XLSX)
    path = tmp_path / "users.xlsx"
    path.write_bytes(Call(make_app(root)).read())
    return path


def convert(path: Path, target: str, suffix: str) -> list[Path]:
    """Convert a file with LibreOffice, and return the new files."""
    folder = path.parent / "converted"
    subprocess.run(
        [
            *("soffice", f"-env:UserInstallation=file://{path.parent}/profile"),
            *("--headless", "--convert-to", target, "--outdir", folder, path),
        ],
        check=True,
        capture_output=True,
    )
    return sorted(folder.glob(f"*{suffix}"))


def test_libreoffice_shows_the_values(workbook: Path) -> None:
    """Each sheet becomes a CSV file, with the texts that LibreOffice shows."""
    options = "44,34,76,1,,1033,false,true,true,false,false,-1"  # -1: all sheets
    target = f"csv:Text - txt - csv (StarCalc):{options}"
    numbers, cases = convert(workbook, target, ".csv")
    with cases.open(newline="", encoding="utf-8") as file:
        shown = dict(csv.reader(file))
    assert shown == {
        "case": "value",
        **{name: text for name, (_, text) in CASES.items()},
    }
    with numbers.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [[f"{n}", f"name {n}", f"{n / 4:g}"] for n in range(5000)]


def test_libreoffice_keeps_values_and_types(workbook: Path) -> None:
    """The workbook that LibreOffice saves has the cells of ours.

    LibreOffice does not escape a text that looks like an escape, so those are omitted.
    """
    [saved] = convert(workbook, "xlsx:Calc MS Excel 2007 XML", ".xlsx")
    ours, theirs = map(openpyxl.load_workbook, (workbook, saved))
    assert theirs.sheetnames == ["Cases", 'A "b" & c']
    for sheet, other in zip(ours.worksheets, theirs.worksheets, strict=True):
        for row, other_row in zip(sheet, other, strict=True):
            if "escape" not in str(row[0].value):
                assert list(map(read, other_row)) == list(map(read, row))
    assert theirs["Cases"]["A1"].font.b and not theirs["Cases"]["A2"].font.b


def read(cell: Any) -> Any:
    """The value of a cell. openpyxl does not decode the escapes of texts."""
    value = {"=TRUE()": True}.get(cell.value, cell.value)
    return unescape(value) if isinstance(value, str) else value


QUERY = """
import json, sys
from pathlib import Path
import duckdb
import duckdb_extension_excel

folder = Path(duckdb_extension_excel.__file__).parent
connection = duckdb.connect(config={"allow_unsigned_extensions": True})
connection.execute(f"LOAD '{next(folder.rglob('*.duckdb_extension'))}'")
result = connection.sql(sys.argv[1])
print(json.dumps([list(map(str, result.types)), result.fetchall()], default=str))
"""


def query(statement: str) -> Any:
    """The types and the rows that DuckDB reads."""
    command = [os.environ["TGSTREAM_DUCKDB"], "-c", QUERY, statement]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


def test_duckdb_reads_values_and_types(make_app: MakeApp, tmp_path: Path) -> None:
    """It finds the type of a column from its cells."""
    items = [
        {
            **{"n": n, "x": n / 4, "even": n % 2 == 0, "name": f"=name {n}"},
            **{"day": dt.date(2026, 1, 1), "at": DATETIME, "hour": dt.time(1, 2, 3)},
        }
        for n in range(1000)
    ]
    path = tmp_path / "items.xlsx"
    path.write_bytes(Call(make_app(Root(lambda: items, format=XLSX))).read())
    types, rows = query(f"SELECT * FROM read_xlsx('{path}')")
    assert types == [
        *("DOUBLE", "DOUBLE", "BOOLEAN", "VARCHAR"),
        *("DATE", "TIMESTAMP", "TIME"),
    ]
    assert rows == json.loads(
        json.dumps([list(i.values()) for i in items], default=str)
    )


def test_duckdb_reads_every_sheet(workbook: Path) -> None:
    """A sheet is chosen by its name."""
    sheet = f"read_xlsx('{workbook}', sheet='A \"b\" & c', header=false)"
    _, rows = query(f"SELECT count(*), sum(A1), max(B1) FROM {sheet}")
    assert rows == [[5000, 12497500.0, "name 999"]]
