"""Escape the cells that a spreadsheet would run as formulas.

Excel and LibreOffice run a cell of a CSV file that begins with ``=``, ``+``, ``-`` or
``@``. Numbers and phone numbers may begin with a sign and are not escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from numbers import Number
from typing import Any

_FORMULA_SIGNS = "=+-@\uff1d\uff0b\uff0d\uff20"
"""The signs that begin a formula. East Asian versions of Excel run the wide forms."""

_INVISIBLE_RANGES = (
    *((0x00, 0x1F), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C)),
    *((0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F)),
    *((0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800)),
    *((0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
    (0xE0000, 0xE0FFF),
)
"""Ranges of invisible characters (controls, spaces, marks) that a spreadsheet may drop.
The space itself is not in them: a text that begins with a space stays text."""

_FORMULA_STARTS = frozenset(_FORMULA_SIGNS).union(
    *(map(chr, range(first, last + 1)) for first, last in _INVISIBLE_RANGES)
)
"""The first characters of all texts that a spreadsheet may run."""

_invisible = "".join(f"{chr(first)}-{chr(last)}" for first, last in _INVISIBLE_RANGES)
_match_formula = re.compile(
    f"[{re.escape(_FORMULA_SIGNS)}\t\r\n]"
    f"|[{_invisible}][ {_invisible}]*[{re.escape(_FORMULA_SIGNS)}]"
).match

_NEVER_FORMULA = {type(None), bool, int, float, Decimal}

_EQUAL_GROUP_SEPARATORS = (" \xa0\u202f", "'\u2019")
"""Characters that users type in place of each other."""


class FormulaEscaper:
    """Puts a ``'`` before the texts that a spreadsheet would run.

    It does not change numbers, the texts of numbers in one locale, and phone numbers: a
    ``+`` and a digit, then only digits and blanks.

    :param decimal: the decimal separator of the locale.
    :param group: its separator of thousands.
    """

    def __init__(self, decimal: str, group: str) -> None:
        for characters in _EQUAL_GROUP_SEPARATORS:
            if group in characters:
                group = characters
        point, between = re.escape(decimal), f"[{re.escape(group)}]"
        self._match_number = re.compile(
            rf"[+-](?:[0-9]+|[0-9]{{1,3}}(?:{between}[0-9]{{2,3}})*{between}[0-9]{{3}})"
            rf"(?:{point}[0-9]+)?(?:[eE][+-]?[0-9]+)?|\+[0-9][0-9 ]*"
        ).fullmatch

    def escape(self, cell: Any) -> Any:
        """Return a cell, with a ``'`` before it if a spreadsheet would run it."""
        if type(cell) in _NEVER_FORMULA:
            return cell
        text = cell if isinstance(cell, str) else str(cell)
        if self._is_formula(cell, text):
            return "'" + text
        return cell if isinstance(cell, Number) else text

    def escape_column(
        self, column: Sequence[Any], texts: Sequence[str]
    ) -> Sequence[str]:
        """Return the texts of a column, with a ``'`` before those of formulas.

        :param column: the cells.
        """
        if _FORMULA_STARTS.isdisjoint({text[:1] for text in texts}):
            return texts
        return [
            "'" + text if self._is_formula(cell, text) else text
            for cell, text in zip(column, texts, strict=True)
        ]

    def _is_formula(self, cell: Any, text: str) -> bool:
        if text[:1] not in _FORMULA_STARTS or not _match_formula(text):
            return False
        if text[0] not in "+-":
            return True
        # A number may begin with its sign. Any other formula in the text of a subclass
        # of Number is escaped.
        return not isinstance(cell, Number) and not self._match_number(text)
