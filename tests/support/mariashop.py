"""The app of the tests on MariaDB."""

from __future__ import annotations

import importlib.util
from typing import Any

import sqlalchemy
from sqlalchemy import text

from tests.support.mariadb import MariaDatabase
from tests.support.shop import Shop
from workerpools import FailureKind, Resource, classify
from workerpools.sqlalchemy import SQLAlchemyEngine, TaskSession

# mysqlclient has no wheels for Linux: it is tried where somebody has built it.
DRIVERS = ["pymysql"] + ["mysqldb"] * (importlib.util.find_spec("MySQLdb") is not None)

#: Long after what is waited for has happened, however slow the machine is.
LATE = 20.0

SESSION = text("select connection_id()")
TIMEOUT = text("select @@max_statement_time")


class MariaShop(Shop):
    """The same app on MariaDB."""

    TABLE = "create table orders (id int primary key)"
    database: MariaDatabase

    @property
    def driver(self) -> str:
        """The driver's name in SQLAlchemy."""
        return str(self.engine.get().dialect.driver)

    def another(self, **options: Any) -> tuple[Resource[sqlalchemy.Engine], type]:
        """Add an engine with other options; return it, and a base whose session uses it."""
        url = self.database.through(self.proxy).url(self.driver)
        engine = self.pools.add(SQLAlchemyEngine(url, **options), name=f"db {options}")
        members = {"abstract": True, "db": engine, "session": TaskSession(engine)}
        return engine, type("Another", (self.base,), members)


def kind_of(error: BaseException) -> FailureKind | None:
    """Return what an exception proves."""
    failure = classify(error)
    return None if failure is None else failure.kind
