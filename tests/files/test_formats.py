"""Programs choose one of several formats of a controller, each in its own way."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

import pandas as pd
import pytest

from tests.conftest import LiveServer

QUERY = """
import sys
from pathlib import Path
import duckdb
import duckdb_extension_httpfs

folder = Path(duckdb_extension_httpfs.__file__).parent
connection = duckdb.connect(config={"allow_unsigned_extensions": True})
connection.execute(f"LOAD '{next(folder.rglob('*.duckdb_extension'))}'")
print(connection.sql(f"SELECT count(*), sum(id) FROM {sys.argv[1]}").fetchone())
"""


@pytest.fixture
def url(live_server: Callable[..., LiveServer]) -> Iterator[str]:
    """The URL of the controller."""
    yield f"http://127.0.0.1:{live_server('waitress', 'tables').port}/users"


@pytest.mark.parametrize(
    "source",
    [
        "read_csv('{}')",
        "'{}.csv'",
        "'{}.ndjson'",
        "read_json('{}.json')",
        "'{}.parquet'",
    ],
)
def test_duckdb_reads_the_url_of_an_export(url: str, source: str) -> None:
    """DuckDB's extension for HTTP sends HEAD, and then GET without a range."""
    python = os.environ["TGSTREAM_DUCKDB"]
    query = source.format(url)
    answer = subprocess.run(
        [python, "-c", QUERY, query], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "(1000, 500500)\n"


def test_pandas_reads_the_url_of_an_export(url: str) -> None:
    """pandas sends no Accept header, so it gets the first format, or the suffix's."""
    assert pd.read_csv(url)["id"].sum() == 500500
    assert pd.read_json(f"{url}.json")["id"].sum() == 500500
    assert pd.read_json(f"{url}.ndjson", lines=True)["id"].sum() == 500500
    assert pd.read_parquet(f"{url}.parquet")["id"].sum() == 500500


def test_curl_names_the_file_by_the_chosen_format(
    url: str, tmp_path: os.PathLike[str]
) -> None:
    """curl saves what it accepts, under the name with the right suffix."""
    command = ["curl", "-sfOJ", "-H", "Accept: application/x-ndjson", url]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert os.listdir(tmp_path) == ["users.ndjson"]
