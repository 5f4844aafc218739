"""Pools over real servers, and what OpenTelemetry's in-memory reader finds of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricsData
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.upstream import EchoUpstream
from workerpools import WorkerPools
from workerpools.httpx import HttpxClient
from workerpools.opentelemetry import uninstrument
from workerpools.sqlalchemy import SQLAlchemyEngine

ONE = text("select 1")


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    made = MeterProvider([reader])
    yield made
    made.shutdown()


@pytest.fixture
def pools(echo: EchoUpstream, database: Database) -> Iterator[WorkerPools]:
    with WorkerPools() as made:
        made.add(HttpxClient(base_url=echo.url, trust_env=False), name="api")
        made.add(SQLAlchemyEngine(database.url(), pool_size=2, max_overflow=1), name="db")
        yield made
        uninstrument(made)


def value_of(pools: WorkerPools, name: str) -> Any:
    (found,) = (each for each in pools.resources if each.name == name)
    return found.get()


def use(pools: WorkerPools, times: int = 1) -> None:
    for number in range(times):
        value_of(pools, "api").get(f"/echo/{number}").raise_for_status()
        with value_of(pools, "db").connect() as connection:
            connection.execute(ONE)


def points(data: MetricsData | None, name: str, attributes: Mapping[str, object] | None = None) -> list[Any]:
    """Return the data points of a metric that have these attributes."""
    return [
        point
        for resource in (data.resource_metrics if data is not None else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
        if (attributes or {}).items() <= dict(point.attributes or {}).items()
    ]


def read(reader: InMemoryMetricReader, name: str, **attributes: object) -> list[Any]:
    dotted = {key.replace("__", "."): value for key, value in attributes.items()}
    return points(reader.get_metrics_data(), name, dotted)
