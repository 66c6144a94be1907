"""How fast is an Excel workbook made, when is it sent, and what memory does it use?

The peers read the rows of the same table with SQLAlchemy in constant memory, and write
them as their manuals show it for large files. Each has the same cells, styles and
widths. The speed is that of one core: all three need nothing but the processor.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any
from urllib.request import urlopen

import sqlalchemy as sa

from .driver import pull
from .exports import MILLION, thousands
from .measure import Result, in_turn, ratio
from .people import FIELDS, fill, person, records
from .servers import MIB, Server

STREAM = "tgstream, rows()"
PEERS = "XlsxWriter, constant_memory", "openpyxl, write_only"
DATETIME = "yyyy-mm-dd hh:mm:ss"
WIDTHS = 10, 16, 26, 21, 10, 16
ROWS = 100_000
"""Rows of a round. The peers need more than half a minute for a million."""


def write_with_xlsxwriter(engine: sa.Engine) -> int:
    """Return the size of the workbook."""
    import xlsxwriter

    file = io.BytesIO()
    workbook = xlsxwriter.Workbook(file, {"constant_memory": True})
    sheet = workbook.add_worksheet()
    moment = workbook.add_format({"num_format": DATETIME})
    bold = workbook.add_format({"bold": True})
    for index, width in enumerate(WIDTHS):
        sheet.set_column(index, index, width)
    sheet.freeze_panes(1, 0)
    sheet.write_row(0, 0, FIELDS, bold)
    for number, (id, name, email, created, amount, note) in enumerate(
        records(engine), 1
    ):
        sheet.write_number(number, 0, id)
        sheet.write_string(number, 1, name)
        sheet.write_string(number, 2, email)
        sheet.write_datetime(number, 3, created, moment)
        sheet.write_number(number, 4, amount)
        if note is not None:
            sheet.write_string(number, 5, note)
    workbook.close()
    return file.tell()


def write_with_openpyxl(engine: sa.Engine) -> int:
    """Return the size of the workbook."""
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.styles import Font

    workbook = openpyxl.Workbook(write_only=True)
    sheet = workbook.create_sheet()
    for letter, width in zip("ABCDEF", WIDTHS, strict=True):
        sheet.column_dimensions[letter].width = width
    sheet.freeze_panes = "A2"
    header = [WriteOnlyCell(sheet, name) for name in FIELDS]
    for cell in header:
        cell.font = Font(bold=True)
    sheet.append(header)
    for row in records(engine):
        sheet.append(tuple(row))
    file = io.BytesIO()
    workbook.save(file)
    return file.tell()


def find_row_of_first_byte() -> int:
    """Return how many rows were made when the first row of the sheet was sent."""
    from tgstream import XLSX

    made = 0

    def generate() -> Iterator[Any]:
        nonlocal made
        for made in range(1, 100_000):
            yield person(made)

    data = b""
    for chunk in XLSX().encode(generate()):
        data += chunk
        start = data.find(b"PK\3\4", data.find(b"xl/styles.xml"))
        start += 30 + int.from_bytes(data[start + 26 : start + 28], "little")
        if b"<row " in zlib.decompressobj(-15).decompress(data[start:]):
            break
    return made


def time_cpu(work: Callable[[], Any]) -> float:
    """Return the seconds of a processor that ``work`` takes."""
    start = process_time()
    work()
    return process_time() - start


def measure_growth(server: Server, rows: int) -> float:
    """Return the MiB by which a server grows, from the first byte to the last row.

    :raises RuntimeError: when the workbook does not have all rows.
    """
    body, measured = bytearray(), 0
    before = highest = 0.0
    with urlopen(f"http://127.0.0.1:{server.port}/xlsx") as response:
        while chunk := response.read1(MIB):
            body += chunk
            before = before or server.memory()
            if len(body) - measured > MIB:
                measured, highest = len(body), max(highest, server.memory())
    highest = max(highest, server.memory())
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        found = archive.read("xl/worksheets/sheet1.xml").count(b"@")
    if found != rows:
        raise RuntimeError(f"/xlsx sent {found} of {rows} rows")
    return highest - before


def run(folder: Path, quick: bool) -> list[Result]:
    """Measure the speed in process, the first byte, and the memory of a server.

    :param folder: for the databases.
    """
    from .peers.streams import make_app

    url = f"sqlite:///{folder}/workbook.db"
    fill(url, ROWS)
    engine = sa.create_engine(url)
    ways: dict[str, Callable[[], Any]] = {
        STREAM: partial(pull, make_app(url), "/xlsx"),
        PEERS[0]: partial(write_with_xlsxwriter, engine),
        PEERS[1]: partial(write_with_openpyxl, engine),
    }
    rounds = 3 if quick else 5
    seconds = in_turn(rounds, {way: partial(time_cpu, ways[way]) for way in ways})
    engine.dispose()
    speed = {way: [ROWS / each for each in seconds[way]] for way in ways}
    results = [
        Result(
            f"XLSX, SQLite, in process: {STREAM}, {peer} beside",
            thousands(speed[peer]),
            thousands(speed[STREAM]),
            ratio(speed[STREAM], speed[peer]),
            5,
            at_least=True,
        )
        for peer in PEERS
    ]
    first = find_row_of_first_byte()
    what = "XLSX: row that is made when the first row is sent"
    results.append(Result(what, "", f"row {first}", first, 999, "rows"))
    return [*results, measure_memory(folder, MILLION // 10 if quick else MILLION)]


def measure_memory(folder: Path, rows: int) -> Result:
    """Measure the growth of a server during an export of all rows."""
    url = f"sqlite:///{folder}/large_workbook.db"
    fill(url, rows)
    server = Server("unbuffered", "streams", url)
    try:
        server.read("/nothing", 1)  # the first request imports modules
        grown = measure_growth(server, rows)
    finally:
        server.stop()
    what = f"XLSX, {rows:,} rows, waitress: growth"
    return Result(what, "", f"{grown:.1f} MiB", grown, 10, "MiB")
