"""What the tests of counting share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import sqlalchemy

from tests.support.databases import Database
from tests.support.shop import Shop
from workerpools import WorkerPools
from workerpools._stats.snapshot import ResourceStats
from workerpools.sqlalchemy import SQLAlchemyEngine


@contextmanager
def counted_pools() -> Iterator[WorkerPools]:
    with closing(Shop()) as shop:
        yield shop.pools


def stats(pools: WorkerPools, name: str) -> ResourceStats:
    (process,) = pools.stats().processes
    return next(each for each in process.resources if each.name == name)


def closed(pools: WorkerPools, name: str) -> dict[str, float]:
    return {reason: count for reason, count in stats(pools, name).labelled("closed").items() if count}


def eventually(condition: Callable[[], Any], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def engine_of(pools: WorkerPools, database: Database, **options: Any) -> sqlalchemy.Engine:
    return pools.add(SQLAlchemyEngine(database.url(), **options), name="db").get()
