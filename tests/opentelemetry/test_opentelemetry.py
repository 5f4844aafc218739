"""The statistics in OpenTelemetry's SDK, read by its own in-memory reader."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
)
from opentelemetry.semconv._incubating.attributes import db_attributes, http_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics, http_metrics
from opentelemetry.semconv.attributes import server_attributes

from tests.opentelemetry.conftest import points, read, use, value_of
from tests.support.paths import environment
from tests.support.upstream import EchoUpstream
from workerpools import WorkerPools
from workerpools._stats.snapshot import Alert, WorkerStats
from workerpools.httpx import HttpxClient
from workerpools.opentelemetry import instrument, uninstrument
from workerpools.opentelemetry._conventions import INSTRUMENTS, Form

POOL = {"db.client.connection.pool.name": "db"}


class _Noting:
    """A meter that notes with what instruments are made."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Form, str]] = []

    def create_counter(self, name: str, description: str, unit: str) -> None:
        self.made.append((name, Form.COUNTER, unit))

    def create_up_down_counter(self, name: str, description: str, unit: str) -> None:
        self.made.append((name, Form.UP_DOWN_COUNTER, unit))

    def create_histogram(self, name: str, description: str, unit: str) -> None:
        self.made.append((name, Form.HISTOGRAM, unit))


def test_names_units_and_kinds_are_those_of_the_conventions() -> None:
    """As OpenTelemetry generates them from its conventions."""
    meter: Any = _Noting()
    for module, names in (
        (
            db_metrics,
            ("count", "max", "pending_requests", "timeouts", "create_time", "wait_time", "use_time"),
        ),
        (http_metrics, ("open_connections", "connection_duration")),
    ):
        prefix = "create_db_client_connection_" if module is db_metrics else "create_http_client_"
        for name in names:
            getattr(module, prefix + name)(meter)
    assert len(meter.made) == 9
    # Renamed in 1.45, which has no module of the SDK's yet.
    renamed = {"db.client.connection.max": "db.client.connection.limit"}
    made = {(renamed.get(name, name), form, unit) for name, form, unit in meter.made}
    ours = {(each.name, each.form, each.unit) for each in INSTRUMENTS if not each.name.startswith("workerpools.")}
    assert ours == made


def test_what_a_script_shows(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider, echo: EchoUpstream
) -> None:
    """Counts, times and limits of what it used, with the attributes of the conventions."""
    instrument(pools, provider)
    use(pools, 3)
    with value_of(pools, "db").connect():
        data = reader.get_metrics_data()
    states = {
        point.attributes[db_attributes.DB_CLIENT_CONNECTION_STATE]: point.value
        for point in points(
            data, db_metrics.DB_CLIENT_CONNECTION_COUNT, {db_attributes.DB_CLIENT_CONNECTION_POOL_NAME: "db"}
        )
    }
    assert states == {"used": 1, "idle": 0}
    (limit,) = points(data, "db.client.connection.limit")
    assert (limit.value, dict(limit.attributes)) == (3, POOL)
    (waits,) = points(data, db_metrics.DB_CLIENT_CONNECTION_WAIT_TIME)
    (creations,) = points(data, db_metrics.DB_CLIENT_CONNECTION_CREATE_TIME)
    (uses,) = points(data, db_metrics.DB_CLIENT_CONNECTION_USE_TIME)
    assert (waits.count, creations.count, uses.count) == (4, 1, 3)
    open_connections = points(data, http_metrics.HTTP_CLIENT_OPEN_CONNECTIONS)
    host, _, port = echo.url.removeprefix("http://").partition(":")
    assert {
        (
            point.attributes[http_attributes.HTTP_CONNECTION_STATE],
            point.attributes[server_attributes.SERVER_ADDRESS],
            point.attributes[server_attributes.SERVER_PORT],
        ): point.value
        for point in open_connections
    } == {("idle", host, int(port)): 1, ("active", host, int(port)): 0}
    assert [
        each.value for each in points(data, "workerpools.acquisitions.reused", {"workerpools.resource": "api"})
    ] == [2]
    assert [each.value for each in points(data, "workerpools.processes.running")] == [1]
    assert points(data, http_metrics.HTTP_CLIENT_CONNECTION_DURATION) == []
    pools.close()
    ((duration,),) = [read(reader, http_metrics.HTTP_CLIENT_CONNECTION_DURATION)]
    assert (duration.count, duration.attributes[server_attributes.SERVER_PORT]) == (1, int(port))


def test_histograms_are_what_was_counted(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """The very buckets and the very sum, whenever it is looked at."""
    instrument(pools, provider)
    for times in (1, 4, 2):
        use(pools, times)
        (point,) = read(reader, "db.client.connection.use_time")
        counted = next(each for each in pools.stats().totals() if each.name == "db").histogram("use_time")
        assert point.bucket_counts == counted.buckets
        assert point.explicit_bounds == counted.bounds
        assert math.isclose(point.sum, counted.sum, rel_tol=1e-9)
    assert point.count == 7


def test_deltas(pools: WorkerPools) -> None:
    """For back-ends that add up themselves: each time what was added since."""
    temporality = {Counter: AggregationTemporality.DELTA, Histogram: AggregationTemporality.DELTA}
    temporality[ObservableCounter] = AggregationTemporality.DELTA
    reader = InMemoryMetricReader(preferred_temporality=temporality)
    instrument(pools, MeterProvider([reader]))
    for times in (3, 2):
        use(pools, times)
        data = reader.get_metrics_data()
        assert [each.count for each in points(data, "db.client.connection.use_time")] == [times]
        reused = points(data, "workerpools.acquisitions.reused", {"workerpools.resource": "api"})
        assert [each.value for each in reused] == [2]


def test_two_readers_see_the_same(pools: WorkerPools, reader: InMemoryMetricReader) -> None:
    """What one reader's look has recorded is there for the other, once."""
    other = InMemoryMetricReader()
    instrument(pools, MeterProvider([reader, other]))
    use(pools, 2)
    for each in (reader, other, reader, other):
        assert [point.count for point in read(each, "db.client.connection.use_time")] == [2]
        assert [point.value for point in read(each, "workerpools.processes.running")] == [1]


def test_one_snapshot_serves_all_instruments(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each look, and not one for each of thirty instruments."""
    taken: list[WorkerStats] = []
    real = pools.stats

    def stats() -> WorkerStats:
        taken.append(real())
        return taken[-1]

    monkeypatch.setattr(pools, "stats", stats)
    instrument(pools, provider)
    use(pools)
    for _ in range(3):
        reader.get_metrics_data()
    assert len(taken) == 3


def test_calling_it_again_changes_nothing(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """Each use is told once."""
    instrument(pools, provider)
    instrument(pools, provider)
    use(pools, 2)
    assert [each.count for each in read(reader, "db.client.connection.use_time")] == [2]


def test_uninstrument_shows_nothing_more(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """Until it is asked for again; unknown pools are none of its business."""
    uninstrument(WorkerPools())
    instrument(pools, provider)
    use(pools)
    assert read(reader, "workerpools.connections.opened") != []
    uninstrument(pools)
    assert read(reader, "workerpools.connections.opened") == []
    instrument(pools, provider)
    assert read(reader, "workerpools.connections.opened") != []


def test_several_pools_of_one_provider(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider, echo: EchoUpstream
) -> None:
    """All of them are shown, also those that come later; and nothing is kept alive by it."""
    instrument(pools, provider)
    other = WorkerPools()
    more = other.add(HttpxClient(base_url=echo.url, trust_env=False), name="more")
    instrument(other, provider)
    more.get().get("/echo/1")
    opened = {
        point.attributes["workerpools.resource"]: point.value
        for point in read(reader, "workerpools.connections.opened")
    }
    assert opened == {"api": 0, "db": 0, "more": 1}
    other.close()
    del other, more
    gc.collect()
    assert read(reader, "workerpools.connections.opened", workerpools__resource="more") == []


def test_alerts_are_1_while_raised_and_0_afterwards(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their rule and resource."""
    alerts: tuple[Alert, ...] = (Alert("wait", "db", 7),)
    monkeypatch.setattr(pools, "stats", lambda: WorkerStats(1.0, 1, alerts=alerts))
    instrument(pools, provider)
    for expected in (1, 0):
        (point,) = read(reader, "workerpools.alert.active")
        assert dict(point.attributes) == {"workerpools.rule": "wait", "workerpools.resource": "db"}
        assert point.value == expected
        alerts = ()


def test_a_provider_that_is_set_later() -> None:
    """The global one; what was used before is counted, too."""
    code = """
import sqlalchemy
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from workerpools import WorkerPools
from workerpools.opentelemetry import instrument
from workerpools.sqlalchemy import SQLAlchemyEngine

pools = WorkerPools()
db = pools.add(SQLAlchemyEngine("sqlite://"), name="db")
instrument(pools)
with db.get().connect() as connection:
    connection.execute(sqlalchemy.text("select 1"))
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))
instrument(pools)
for resource in reader.get_metrics_data().resource_metrics:
    for scope in resource.scope_metrics:
        for metric in scope.metrics:
            if metric.name in ("db.client.connection.use_time", "workerpools.connections.opened"):
                point, = metric.data.data_points
                print(metric.name, getattr(point, "count", None) or point.value)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["db.client.connection.use_time 1", "workerpools.connections.opened 1"]
    assert "already" not in done.stderr
