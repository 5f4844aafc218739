"""Where metrics are exported from: a worker's main process, and not its children."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)

from tests.opentelemetry.conftest import points, read, use
from tests.support.forking import run_in_fork
from workerpools import WorkerPools
from workerpools._stats.memory import Board
from workerpools.opentelemetry import instrument, uninstrument


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


def test_a_worker_exports_once_more_at_its_end(pools: WorkerPools) -> None:
    """While its children's numbers can still be seen; and another one in the process exports again."""
    exporter = _Kept()
    provider = MeterProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)])
    for worker in (1, 2):
        instrument(pools, provider, export_interval=3600.0)
        pools.collector.share(Board.anonymous())

        def child() -> None:
            pools.collector.join(0)
            use(pools)
            pools.close()

        run_in_fork(child)
        assert len(exporter.exported) == worker - 1
        pools.collector.end()
        assert len(exporter.exported) == worker
        opened = points(exporter.exported[-1], "workerpools.connections.opened", {"workerpools.resource": "db"})
        assert [point.value for point in opened] == [1]
        assert exporting_threads() == []
