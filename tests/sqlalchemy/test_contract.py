"""The adapter for SQLAlchemy keeps the contract, on real servers."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.mariadb import MariaDatabase
from workerpools.sqlalchemy import SQLAlchemyEngine
from workerpools.testing import AdapterContract


class SQLAlchemyContract(AdapterContract):
    """A committed transaction is a write."""

    answer_to = b"COMMIT"
    database: Any

    @property
    def secret(self) -> str:  # type: ignore[override]
        return str(self.database.password)

    def read(self, value: sqlalchemy.Engine) -> object:
        with value.connect() as connection:
            return connection.scalar(text("SELECT 1"))

    def write(self, value: sqlalchemy.Engine) -> object:
        with value.begin() as connection:
            return connection.execute(text("INSERT INTO orders (number) VALUES (1)"))

    def written(self) -> int:
        return int(self.database.execute("SELECT count(*) FROM orders")[0][0])

    def hold(self, value: sqlalchemy.Engine) -> object:
        connection = value.connect()
        connection.scalar(text("SELECT 1"))
        return connection


class OnPostgreSQL(SQLAlchemyContract):
    """The driver is the subclass's."""

    driver = ""

    @pytest.fixture
    def server(self, database: Database) -> tuple[str, int]:
        self.database = database
        database.execute("CREATE TABLE orders (number int)")
        return database.host, database.port

    def adapter(self, host: str, port: int) -> SQLAlchemyEngine:
        url = sqlalchemy.make_url(self.database.url(self.driver)).set(host=host, port=port)
        return SQLAlchemyEngine(url.render_as_string(hide_password=False))


class TestPsycopg2(OnPostgreSQL):
    """The whole of it."""

    driver = "psycopg2"


class TestPsycopg3(OnPostgreSQL):
    """The whole of it."""

    driver = "psycopg"


class TestPyMySQL(SQLAlchemyContract):
    """The whole of it, on MariaDB."""

    @pytest.fixture
    def server(self, maria_database: MariaDatabase) -> tuple[str, int]:
        self.database = maria_database
        maria_database.execute("CREATE TABLE orders (number int)")
        return maria_database.host, maria_database.port

    def adapter(self, host: str, port: int) -> SQLAlchemyEngine:
        url = sqlalchemy.make_url(self.database.url("pymysql")).set(host=host, port=port)
        return SQLAlchemyEngine(url.render_as_string(hide_password=False))
