"""A histogram's values reach the SDK in a bounded number of recordings, in the very buckets and with the very sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import Histogram as HistogramType
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import (
    DropAggregation,
    ExplicitBucketHistogramAggregation,
    ExponentialBucketHistogramAggregation,
    View,
)

from tests.opentelemetry.conftest import read
from workerpools import WorkerPools
from workerpools import opentelemetry as exporter
from workerpools._stats.metrics import BOUNDS, FIRST, WIDTH
from workerpools._stats.snapshot import ProcessStats, ResourceStats, WorkerStats

NAME = "db.client.connection.use_time"
MANY = 100_000


class Worker:
    """What the snapshots of a worker say of one database: how often a connection was used, for 2 and for 20 ms."""

    def __init__(self) -> None:
        self.short = self.long = 0
        self.pools = WorkerPools()

    def stats(self) -> WorkerStats:
        row = [0.0] * WIDTH
        first = FIRST["use_time"]
        row[first + 1], row[first + 3] = self.short, self.long
        row[first + len(BOUNDS) + 1], row[first + len(BOUNDS) + 2] = self.sum, 0.02
        db = ResourceStats("db", "database", tuple(row))
        return WorkerStats(1.0, 1, processes=(ProcessStats(1, resources=(db,)),))

    @property
    def sum(self) -> float:
        return self.short * 0.002 + self.long * 0.02


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    made = Worker()
    monkeypatch.setattr(made.pools, "stats", made.stats)
    yield made
    exporter.uninstrument(made.pools)
    made.pools.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the values that go through the API."""
    made: list[float] = []
    instrument = type(MeterProvider().get_meter("probe").create_histogram("probe"))
    real = instrument.record

    def record(self: HistogramType, amount: float, attributes: Any) -> None:
        made.append(amount)
        real(self, amount, attributes)

    monkeypatch.setattr(instrument, "record", record)
    return made


def test_a_recording_per_bucket_however_many_values(worker: Worker, calls: list[float]) -> None:
    """And each reader sees all of them, whichever collects first."""
    one, other = InMemoryMetricReader(), InMemoryMetricReader()
    exporter.instrument(worker.pools, MeterProvider([one, other]))
    for reader, turn in ((one, 1), (other, 2), (one, 3)):
        worker.short, worker.long = turn * MANY, turn * MANY // 2
        calls.clear()
        (point,) = read(reader, NAME)
        assert len(calls) == 2
        assert point.bucket_counts == (0, turn * MANY, 0, turn * MANY // 2, *[0] * (len(BOUNDS) - 3))
        assert point.count == sum(point.bucket_counts)
        assert math.isclose(point.sum, worker.sum, rel_tol=1e-9)
    (point,) = read(other, NAME)
    assert point.count == 3 * MANY + 3 * MANY // 2


def test_a_reader_of_deltas_gets_each_value_once(worker: Worker) -> None:
    """Beside one that adds up."""
    deltas = InMemoryMetricReader(preferred_temporality={HistogramType: AggregationTemporality.DELTA})
    sums = InMemoryMetricReader()
    exporter.instrument(worker.pools, MeterProvider([deltas, sums]))
    worker.short = 1000
    assert [point.count for point in read(deltas, NAME)] == [1000]
    worker.short = 1500
    assert [point.count for point in read(sums, NAME)] == [1500]
    assert [point.count for point in read(deltas, NAME)] == [500]
    assert read(deltas, NAME) == []


def test_other_bounds_and_fewer_attributes_by_a_view(worker: Worker, calls: list[float]) -> None:
    """The values of a bucket of ours are alike, and so lie in one of the view's."""
    reader = InMemoryMetricReader()
    view = View(instrument_name=NAME, aggregation=ExplicitBucketHistogramAggregation((0.0, 0.01)), attribute_keys=set())
    exporter.instrument(worker.pools, MeterProvider([reader], views=[view]))
    worker.short, worker.long = MANY, MANY
    (point,) = read(reader, NAME)
    assert (point.bucket_counts, dict(point.attributes), len(calls)) == ((0, MANY, MANY), {}, 2)


def test_a_histogram_that_is_dropped(worker: Worker, calls: list[float]) -> None:
    """Costs no more than the others."""
    reader = InMemoryMetricReader()
    exporter.instrument(
        worker.pools, MeterProvider([reader], views=[View(instrument_name=NAME, aggregation=DropAggregation())])
    )
    worker.short = MANY
    assert read(reader, NAME) == []
    assert len(calls) == 1


def test_other_aggregations_get_the_values_one_by_one(
    worker: Worker, calls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bounded number per collection, and the rest with the next ones: none is lost, none is told twice."""
    monkeypatch.setattr(exporter, "RECORDINGS", 10)
    reader = InMemoryMetricReader()
    view = View(instrument_name=NAME, aggregation=ExponentialBucketHistogramAggregation())
    exporter.instrument(worker.pools, MeterProvider([reader], views=[view]))
    worker.short, worker.long = 12, 11
    for count in (10, 20, 23, 23):
        calls.clear()
        (point,) = read(reader, NAME)
        assert point.count == count
        assert len(calls) <= 10
    assert math.isclose(point.sum, worker.sum, rel_tol=1e-9)
