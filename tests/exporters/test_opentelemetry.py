"""The statistics in OpenTelemetry's SDK, read by its own in-memory reader."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.semconv._incubating.attributes import db_attributes, http_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics, http_metrics
from opentelemetry.semconv.attributes import server_attributes
from sqlalchemy import text

from tests.support.databases import Database
from tests.support.forking import run_in_fork
from tests.support.paths import environment
from tests.support.upstream import EchoUpstream
from workerpools import WorkerPools
from workerpools._core.alerts import Alert
from workerpools._core.board import Board
from workerpools._core.conventions import INSTRUMENTS, Form
from workerpools._core.stats import WorkerStats
from workerpools.httpx import HttpxClient
from workerpools.opentelemetry import instrument, uninstrument
from workerpools.sqlalchemy import SQLAlchemyEngine

POOL = {"db.client.connection.pool.name": "db"}
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
    found = pools.find(name)
    assert found is not None
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
    ours = {(each.name, each.form, each.unit) for each in INSTRUMENTS if not each.name.startswith("workerpools.")}
    assert ours == set(meter.made)


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
    (limit,) = points(data, db_metrics.DB_CLIENT_CONNECTION_MAX)
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


def test_a_child_that_publishes_shows_nothing(
    pools: WorkerPools, reader: InMemoryMetricReader, provider: MeterProvider
) -> None:
    """Its parent does, for it and after its end; a child of another server shows what is its own."""
    instrument(pools, provider)
    use(pools, 2)

    def child(index: int | None) -> dict[str, int]:
        if index is not None:
            pools.collector.join(index)
        use(pools)
        opened = {
            str(point.attributes["workerpools.resource"]): point.value
            for point in read(reader, "workerpools.connections.opened")
        }
        pools.close()
        return opened

    assert run_in_fork(lambda: child(None)) == {"api": 1, "db": 1}
    pools.collector.share(Board.anonymous())
    assert run_in_fork(lambda: child(0)) == {}
    # One that found no slot is not seen, and does not answer for its siblings.
    assert run_in_fork(lambda: child(1000)) == {}
    opened = read(reader, "workerpools.connections.opened", workerpools__resource="db")
    assert [point.value for point in opened] == [2]
    assert [point.count for point in read(reader, "db.client.connection.use_time")] == [3]


class _Kept(MetricExporter):
    def __init__(self) -> None:
        super().__init__()
        self.exported: list[MetricsData] = []

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: Any) -> MetricExportResult:
        self.exported.append(metrics_data)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **_: Any) -> None:
        """Nothing is held."""


def exporting_threads() -> list[str]:
    names = ("workerpools-opentelemetry", "OtelPeriodicExportingMetricReader")
    return [each.name for each in threading.enumerate() if each.name in names]


def test_exporting_by_a_thread_that_children_do_not_have(pools: WorkerPools) -> None:
    """Every so often, once more at the end, and not in a child: its exporter's connection is the parent's."""
    exporter = _Kept()
    provider = MeterProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)])
    instrument(pools, provider, export_interval=0.02)
    instrument(pools, provider, export_interval=0.02)
    assert exporting_threads() == ["workerpools-opentelemetry"]
    use(pools)
    deadline = time.monotonic() + 30
    while not any(points(each, "db.client.connection.use_time") for each in exporter.exported):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Neither does a child export what is left when it ends as a worker's does.
    assert run_in_fork(lambda: (exporting_threads(), len(exporter.exported), uninstrument(pools))[0]) == []
    use(pools)
    uninstrument(pools)
    assert [point.count for point in points(exporter.exported[-1], "db.client.connection.use_time")] == [2]
    assert exporting_threads() == []
    provider.shutdown()


def test_a_reader_with_a_thread_exports_in_children_too(pools: WorkerPools) -> None:
    """What the documentation warns of is what the SDK does."""
    exporter = _Kept()
    provider = MeterProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)])
    assert run_in_fork(exporting_threads) == ["OtelPeriodicExportingMetricReader"]
    provider.shutdown()


@pytest.mark.parametrize("interval", [0, -1.0, float("nan")])
def test_an_interval_that_cannot_be(interval: float, pools: WorkerPools, provider: MeterProvider) -> None:
    """Refused with what is wanted, before anything is made."""
    with pytest.raises(ValueError, match="export_interval"):
        instrument(pools, provider, export_interval=interval)


def test_a_provider_that_cannot_export(pools: WorkerPools) -> None:
    """The one that is global until another is set."""
    with pytest.raises(ValueError, match="meter provider of the SDK"):
        instrument(pools, export_interval=1.0)
