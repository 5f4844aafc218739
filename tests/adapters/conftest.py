"""The app of these tests, on a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.adapters.mariashop import DRIVERS, MariaShop
from tests.adapters.shop import Shop
from tests.support.databases import Database
from tests.support.mariadb import MariaDatabase


@pytest.fixture(params=["psycopg2", "psycopg"])
def shop(request: pytest.FixtureRequest, database: Database, proxy_to: Any) -> Iterator[Shop]:
    """An app whose database is reached through a proxy, with each driver."""
    with closing(Shop(database, request.param, proxy=proxy_to(database))) as made:
        yield made


@pytest.fixture(params=DRIVERS)
def maria_shop(request: pytest.FixtureRequest, maria_database: MariaDatabase, proxy_to: Any) -> Iterator[MariaShop]:
    """The same on MariaDB."""
    with closing(MariaShop(maria_database, request.param, proxy=proxy_to(maria_database))) as made:
        yield made
