"""LibreOffice reads the CSV of ``CSV.for_excel()`` in the language of each locale."""

from __future__ import annotations

import subprocess
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import openpyxl
import pytest

from tgstream import CSV

LANGUAGES = {
    **{"de_DE": 1031, "fr_FR": 1036, "sv_SE": 1053, "sk_SK": 1051, "nl_NL": 1043},
    **{"en_US": 1033, "en_GB": 2057, "ja_JP": 1041, "ko_KR": 1042, "de_CH": 2055},
}
"""The number that Windows gives to the language of each locale."""

MOMENT = datetime(2026, 12, 31, 3, 4, 5)


@pytest.mark.parametrize("locale", LANGUAGES)
def test_libreoffice_reads_numbers_and_dates_of_a_locale(
    tmp_path: Path, locale: str
) -> None:
    """A date is a date, a number a number, and an escaped formula is not run."""
    format = CSV.for_excel(locale, escape_formulas=True)
    row = [MOMENT.date(), MOMENT, -1234.5, Decimal("0.25"), "+49 30 1234567", "=1+1"]
    path = tmp_path / "rows.csv"
    text = "".join(map(str, format.encode([row])))
    path.write_text(text, "utf-8", newline="")
    delimiter = ord(";" if ";" in text else ",")
    subprocess.run(
        [
            *("soffice", f"-env:UserInstallation=file://{tmp_path}/profile"),
            *("--headless", "--convert-to", "xlsx", "--outdir", tmp_path),
            # UTF-8, from line 1, in this language, and with special numbers detected.
            f"--infilter=CSV:{delimiter},34,76,1,,{LANGUAGES[locale]},false,true",
            path,
        ],
        check=True,
        capture_output=True,
    )
    book = openpyxl.load_workbook(tmp_path / "rows.xlsx")
    [cells] = book.worksheets[0].iter_rows(values_only=True)
    book.close()
    day = datetime(MOMENT.year, MOMENT.month, MOMENT.day)
    assert cells == (day, MOMENT, -1234.5, 0.25, "+49 30 1234567", "'=1+1")
