"""MariaDB in place of the other databases. ``.ci/mariadb`` starts the server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa

from tests.model import Model


class MariaModel(Model):
    """The model of an application on MariaDB, which tests can query from outside."""

    def connect(self) -> Any:
        """Open a connection of PyMySQL, without SQLAlchemy."""
        return pymysql.connect(
            user=self.url.username,
            database=self.url.database,
            unix_socket=self.url.query["unix_socket"],
            charset="utf8mb4",
            autocommit=True,
        )

    def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(self.connect()) as outside, outside.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    def idle_in_transaction(self) -> int:
        """The number of open transactions. INNODB_TRX is cached, so not used."""
        ((_, _, status),) = self.fetch("SHOW ENGINE INNODB STATUS")
        listed = status.partition("LIST OF TRANSACTIONS")[2]
        transactions = listed.partition("\n--------\n")[0].split("---TRANSACTION")[1:]
        return sum(
            re.match(r"[^\n]*, ACTIVE", lines) is not None
            for lines in transactions
            if "SHOW ENGINE INNODB STATUS" not in lines.upper()
        )


@pytest.fixture(params=["mysql", "mariadb"])
def url(request: pytest.FixtureRequest) -> str:
    """The URL of the database, with each of SQLAlchemy's two names for it."""
    _, _, rest = os.environ["TGSTREAM_MARIADB"].partition("+")
    return f"{request.param}+{rest}"


@pytest.fixture
def model(url: str) -> Iterator[MariaModel]:
    """The model of an application on MariaDB."""
    model = MariaModel(url)
    yield model
    model.dispose()


@pytest.fixture
def numbers(model: MariaModel) -> sa.TextClause:
    """A statement of many rows."""
    return sa.text("SELECT seq AS i, CONCAT('text', seq) AS text FROM seq_1_to_100000")
