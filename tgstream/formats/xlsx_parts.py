"""The parts of a workbook that are not rows: names, relations, styles, sheets' frames.

They are the smallest that ECMA-376 allows. Elements are in the order of its schemas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from .xlsx_cells import HEADER, NUMBER_FORMATS, count_characters, escape_text

_DECLARATION = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_SCHEMAS = "http://schemas.openxmlformats.org"
_MAIN = f"{_SCHEMAS}/spreadsheetml/2006/main"
_RELATIONS = f"{_SCHEMAS}/package/2006/relationships"
_DOCUMENT = f"{_SCHEMAS}/officeDocument/2006/relationships"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"


# Names of sheets.

MAX_NAME = 31
"""Characters of the name of a sheet, in code units of UTF-16."""

_FORBIDDEN = frozenset("[]:*?/\\")


def check_names(names: Iterable[Any]) -> None:
    """Check the names of the sheets of a workbook by the rules of Excel.

    :raises TypeError: when a name is not a ``str``.
    :raises ValueError: when a name is invalid or has been used, or there is none.
    """
    known: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                "XLSX: the name of a sheet must be a str, got "
                f"{type(name).__name__}: {name!r:.80}"
            )
        if problem := _find_problem(name):
            raise ValueError(f"XLSX: sheet {name!r:.80}: {problem}")
        if (other := known.setdefault(name.casefold(), name)) is not name:
            raise ValueError(
                f"XLSX: sheet {name!r}: Excel compares names without case, and "
                f"{other!r} is the name of another sheet. Choose another name"
            )
    if not known:
        raise ValueError(
            "XLSX: a workbook must have a sheet, got an empty mapping. Return a "
            "mapping of names to sources, such as {'Users': rows(...)}"
        )


def _find_problem(name: str) -> str:
    """Return the rule that a name breaks, or an empty string."""
    if not name.strip():
        return "the name must not be empty"
    try:
        if count_characters(name) > MAX_NAME:
            return f"the name must have at most {MAX_NAME} characters"
    except ValueError as error:
        return str(error)
    if found := sorted(_FORBIDDEN.intersection(name)):
        return f"the name must not contain {' '.join(found)}"
    if any(ord(char) < 32 or char in "\ufffe\uffff" for char in name):
        return "the name must not contain control characters"
    if name[0] == "'" or name[-1] == "'":
        return "the name must not begin or end with an apostrophe"
    return "Excel reserves the name" if name.casefold() == "history" else ""


# The parts of the package.


def make_parts(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the paths and the XML of all parts but the sheets.

    :param names: of the sheets.
    """
    paths = [sheet_path(number) for number in range(1, len(names) + 1)]
    sheets = [("worksheet", path.removeprefix("xl/")) for path in paths]
    yield "[Content_Types].xml", _make_content_types(paths)
    yield "_rels/.rels", _make_relations([("officeDocument", "xl/workbook.xml")])
    yield "xl/workbook.xml", _make_workbook(names)
    relations = _make_relations([*sheets, ("styles", "styles.xml")])
    yield "xl/_rels/workbook.xml.rels", relations
    yield "xl/styles.xml", _make_styles()


def sheet_path(number: int) -> str:
    """The path of a sheet, whose number begins with 1."""
    return f"xl/worksheets/sheet{number}.xml"


def _make_content_types(sheets: Sequence[str]) -> str:
    relations = "application/vnd.openxmlformats-package.relationships+xml"
    types = {
        "xl/workbook.xml": f"{_TYPE}.sheet.main+xml",
        "xl/styles.xml": f"{_TYPE}.styles+xml",
        **dict.fromkeys(sheets, f"{_TYPE}.worksheet+xml"),
    }
    return (
        f'{_DECLARATION}<Types xmlns="{_SCHEMAS}/package/2006/content-types">'
        f'<Default Extension="rels" ContentType="{relations}"/>'
        '<Default Extension="xml" ContentType="application/xml"/>'
        + "".join(
            f'<Override PartName="/{path}" ContentType="{content_type}"/>'
            for path, content_type in types.items()
        )
        + "</Types>"
    )


def _make_relations(targets: Sequence[tuple[str, str]]) -> str:
    return (
        f'{_DECLARATION}<Relationships xmlns="{_RELATIONS}">'
        + "".join(
            f'<Relationship Id="rId{number}" Type="{_DOCUMENT}/{kind}" '
            f'Target="{target}"/>'
            for number, (kind, target) in enumerate(targets, 1)
        )
        + "</Relationships>"
    )


def _make_workbook(names: Sequence[str]) -> str:
    return (
        f'{_DECLARATION}<workbook xmlns="{_MAIN}" xmlns:r="{_DOCUMENT}">'
        "<bookViews><workbookView/></bookViews><sheets>"
        + "".join(
            f'<sheet name="{escape_attribute(name)}" sheetId="{number}" '
            f'r:id="rId{number}"/>'
            for number, name in enumerate(names, 1)
        )
        + "</sheets></workbook>"
    )


def escape_attribute(text: str) -> str:
    """Return a text as it is written between double quotes."""
    return escape_text(text).replace('"', "&quot;")


_FIRST_FORMAT = 164
"""The smallest number of a number format that is not built in."""


def _make_styles() -> str:
    """The styles of :mod:`.xlsx_cells`: the second one is bold, for the header."""
    custom = [text for text in NUMBER_FORMATS if text != "General"]
    formats = {text: _FIRST_FORMAT + index for index, text in enumerate(custom)}
    xfs = [
        f'<xf numFmtId="{formats.get(text, 0)}" fontId="{int(index == HEADER)}" '
        f'fillId="0" borderId="0" xfId="0" applyNumberFormat="{int(text in formats)}" '
        f'applyFont="{int(index == HEADER)}"/>'
        for index, text in enumerate(NUMBER_FORMATS)
    ]
    font = '<sz val="11"/><name val="Calibri"/><family val="2"/>'
    return (
        f'{_DECLARATION}<styleSheet xmlns="{_MAIN}"><numFmts count="{len(formats)}">'
        + "".join(
            f'<numFmt numFmtId="{number}" formatCode="{escape_attribute(text)}"/>'
            for text, number in formats.items()
        )
        + f'</numFmts><fonts count="2"><font>{font}</font><font><b/>{font}</font>'
        '</fonts><fills count="2"><fill><patternFill patternType="none"/></fill>'
        '<fill><patternFill patternType="gray125"/></fill></fills>'
        '<borders count="1"><border><left/><right/><top/><bottom/><diagonal/></border>'
        '</borders><cellStyleXfs count="1"><xf numFmtId="0" fontId="0" fillId="0" '
        f'borderId="0"/></cellStyleXfs><cellXfs count="{len(xfs)}">'
        + "".join(xfs)
        + '</cellXfs><cellStyles count="1"><cellStyle name="Normal" xfId="0" '
        'builtinId="0"/></cellStyles></styleSheet>'
    )


# The frame of a sheet.

MAX_ROWS = 1_048_576
MAX_COLUMNS = 16_384


@lru_cache(MAX_COLUMNS)
def column_letters(index: int) -> str:
    """The letters of a column, whose index begins with 0."""
    head, tail = divmod(index, 26)
    return (column_letters(head - 1) if head else "") + chr(ord("A") + tail)


def start_sheet(widths: Sequence[float], has_header: bool, is_first: bool) -> str:
    """Return the XML before the rows of a sheet.

    :param widths: of the columns, in characters.
    :param has_header: whether the first row must stay in view.
    :param is_first: whether the sheet is shown when the file is opened.
    """
    selected = ' tabSelected="1"' if is_first else ""
    pane = (
        '<pane ySplit="1" topLeftCell="A2" activePane="bottomLeft" state="frozen"/>'
        if has_header
        else ""
    )
    columns = "".join(
        f'<col min="{number}" max="{number}" width="{width:g}" customWidth="1"/>'
        for number, width in enumerate(widths, 1)
    )
    return (
        f'{_DECLARATION}<worksheet xmlns="{_MAIN}"><sheetViews><sheetView{selected} '
        f'workbookViewId="0">{pane}</sheetView></sheetViews>'
        + (f"<cols>{columns}</cols>" if columns else "")
        + "<sheetData>"
    )


END_SHEET = "</sheetData></worksheet>"
"""The XML after the rows of a sheet."""
