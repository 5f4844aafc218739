"""The adapter for asynchronous SQLAlchemy keeps the contract, on a real server."""

from __future__ import annotations

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.support.databases import Database
from workerpools.sqlalchemy import AsyncSQLAlchemyEngine
from workerpools.testing import AdapterContract

pytest.importorskip("sqlalchemy", minversion="2.1")


class AsyncContract(AdapterContract):
    """A committed transaction is a write. The driver is the subclass's."""

    driver = ""
    answer_to = b"COMMIT"
    database: Database

    @property
    def secret(self) -> str:  # type: ignore[override]
        return self.database.password

    @pytest.fixture
    def server(self, database: Database) -> tuple[str, int]:
        self.database = database
        database.execute("CREATE TABLE orders (number int)")
        return database.host, database.port

    def adapter(self, host: str, port: int) -> AsyncSQLAlchemyEngine:
        url = sqlalchemy.make_url(self.database.url(self.driver)).set(host=host, port=port)
        return AsyncSQLAlchemyEngine(url.render_as_string(hide_password=False))

    async def read(self, value: AsyncEngine) -> object:
        async with value.connect() as connection:
            return await connection.scalar(text("SELECT 1"))

    async def write(self, value: AsyncEngine) -> object:
        async with value.begin() as connection:
            return await connection.execute(text("INSERT INTO orders (number) VALUES (1)"))

    def written(self) -> int:
        return int(str(self.database.execute("SELECT count(*) FROM orders")[0][0]))

    async def hold(self, value: AsyncEngine) -> object:
        connection = await value.connect()
        await connection.scalar(text("SELECT 1"))
        return connection


class TestPsycopg3(AsyncContract):
    """The whole of it."""

    driver = "psycopg"


class TestAsyncpg(AsyncContract):
    """The whole of it."""

    driver = "asyncpg"
